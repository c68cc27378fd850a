"""The parts of a diffusion UNet: residual blocks, attention, and what changes the sides between levels.

Maps of features (n, C, H, W) lie in memory with their channels innermost ("channels last"): convolutions are faster so,
and a map's pixels are an attention's tokens (n, H W, C) without a copy. Modules carry diffusers' names, but for the
fused projections of attention.

Shapes: n samples, C channels, T = H W tokens, L tokens of the context, E channels of the time's embedding.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FF_RATIO = 4
TRANSFORMER_NORM_EPS = 1e-6


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3 x 3 convolution, with the time in between; a 1 x 1 convolution beside them where channels
    change (ADM, arXiv 2105.05233).

    Args:
        embedding: E.
        scale_shift: the time scales and shifts the second norm's output, instead of being added before it.
        resample: halve or double the sides between the first SiLU and its convolution, as in BigGAN (arXiv 1809.11096).
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        groups: int,
        eps: float,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = Conv(c_in, c_out)
        self.time_emb_proj = nn.Linear(embedding, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = Conv(c_out, c_out)
        self.conv_shortcut = PointwiseConv(c_in, c_out) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (n, c_in, H, W) and time (n, E), after its SiLU, to (n, c_out, H, W), or halved or doubled sides."""
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = double(h), double(x)
        h = self.conv1(h)
        vector = self.time_emb_proj(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = vector.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + vector)
        return self.conv2(F.silu(h)) + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def products(self, pixels: int) -> int:
        """Multiplications of one sample, of that many pixels after resampling."""
        shortcut = 0 if self.conv_shortcut is None else self.conv_shortcut.weight.numel()
        weights = self.conv1.weight.numel() + self.conv2.weight.numel() + shortcut
        return pixels * weights + self.time_emb_proj.weight.numel()


class SelfAttention(nn.Module):
    """Residual attention over all pixels, without text (ADM's)."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(n, C, H, W), unchanged in shape. There is no context to read."""
        query, key, value = self.to_qkv(tokens_of(self.group_norm(x))).chunk(3, dim=-1)
        return x + map_of(self.to_out(attend(query, key, value, self.heads)), x)

    def products(self, pixels: int, length: int) -> int:
        """Multiplications of one sample."""
        c = self.to_out.in_features
        return 4 * pixels * c * c + 2 * pixels * pixels * c


class SpatialTransformer(nn.Module):
    """A residual transformer over all pixels that reads a context (LDM, arXiv 2112.10752, section 3.3).

    Args:
        depth: its blocks.
        context_dim: channels of the context.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (n, C, H, W), unchanged in shape; context (n, L, context_dim)."""
        tokens = self.proj_in(tokens_of(self.norm(x)))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + map_of(self.proj_out(tokens), x)

    def products(self, pixels: int, length: int) -> int:
        """Multiplications of one sample, with `length` tokens of context."""
        c = self.proj_in.in_features
        return 2 * pixels * c * c + sum(block.products(pixels, length) for block in self.transformer_blocks)  # type: ignore[operator]


class TransformerBlock(nn.Module):
    """Attention among the pixels, attention to the context, and an MLP gated by GELU (GEGLU, arXiv 2002.05202)."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = PixelAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = ContextAttention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = GatedMLP(channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens (n, T, C), unchanged in shape; context (n, L, context_dim)."""
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        return tokens + self.ff(self.norm3(tokens))

    def products(self, t: int, length: int) -> int:
        """Multiplications of one sample, with t pixels and `length` tokens of context."""
        c = self.norm1.normalized_shape[0]
        return t * (6 + 3 * FF_RATIO) * c * c + length * self.attn2.to_kv.weight.numel() + 2 * t * (t + length) * c


class PixelAttention(nn.Module):
    """Attention of tokens among themselves. Query, key and value are one matrix: one product instead of three."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T, C) to (n, T, C)."""
        query, key, value = self.to_qkv(tokens).chunk(3, dim=-1)
        return self.to_out(attend(query, key, value, self.heads))


class ContextAttention(nn.Module):
    """Attention of tokens to a context, whose key and value are one matrix."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """tokens (n, T, C) and context (n, L, context_dim) to (n, T, C)."""
        key, value = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(tokens), key, value, self.heads))


class GatedMLP(nn.Module):
    """Two layers; one half of the first's outputs gates the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, 2 * FF_RATIO * channels)
        self.down = nn.Linear(FF_RATIO * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T, C) to (n, T, C)."""
        hidden, gate = self.up(tokens).chunk(2, dim=-1)
        return self.down(hidden * F.gelu(gate))


class Downsample(nn.Module):
    """Half the sides: a 3 x 3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, stride=2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, C, H, W) to (n, C, H/2, W/2). There is nothing for the time to do."""
        return self.conv(x)

    def products(self, pixels: int) -> int:
        """Multiplications of one sample, of that many pixels afterwards."""
        return pixels * self.conv.weight.numel()


class Upsample(nn.Module):
    """Double the sides: nearest neighbours, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, C, H, W) to (n, C, 2H, 2W). There is nothing for the time to do."""
        return self.conv(double(x))

    def products(self, pixels: int) -> int:
        """Multiplications of one sample, of that many pixels afterwards."""
        return pixels * self.conv.weight.numel()


class Conv(nn.Module):
    """A 3 x 3 convolution.

    Its weight is kept as (c_out, 3, 3, c_in), the order in which channels-last kernels read it. So it needs no copy at
    each call, however an engine has cut, sent and put together what it is a view of. On CPUs, small maps of many
    channels are multiplied by it as one matrix: there kernels for convolutions spend longer on arranging the weight and
    its gradient.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(c_out, 3, 3, c_in), a=5**0.5))
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) to (n, c_out, H / stride, W / stride)."""
        return convolve(x, self.weight, self.bias, self.stride)


class PointwiseConv(nn.Linear):
    """A 1 x 1 convolution, computed as what it is on channels-last maps: one matrix product over pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_features, H, W) to (n, out_features, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """A 3 x 3 convolution of (n, c_in, H, W) by a weight (c_out, 3, 3, c_in); see `Conv`."""
    n, _, height, width = x.shape
    if x.is_cpu and not torch.compiler.is_compiling() and n * height * width < len(weight) * stride**2:
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        shifts = [(i, j) for i in range(3) for j in range(3)]
        shifted = [padded[:, i : i + height : stride, j : j + width : stride] for i, j in shifts]
        return F.linear(torch.cat(shifted, dim=-1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight.permute(0, 3, 1, 2), bias, stride, padding=1)


def double(x: Tensor) -> Tensor:
    """Twice the sides, by nearest neighbours."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def tokens_of(x: Tensor) -> Tensor:
    """A map (n, C, H, W) as tokens (n, T, C): a view where channels lie innermost."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def map_of(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (n, T, C) as a channels-last map (n, C, H, W) of the sides of `like`."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax attention in heads of (n, tokens, C), to (n, T, C)."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
