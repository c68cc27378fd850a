"""The KL-regularised autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, appendix G).

A convolutional encoder halves the image's sides between its levels and gives mean and log variance of each latent; the
decoder mirrors it, one residual block deeper. Both attend over all positions at the coarsest level, and after every
residual block of the levels that are to. Modules carry the names of diffusers' AutoencoderKL, so its weights are ours
as they are.

Shapes: n samples, C channels, f the downsampling factor.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flops import forward_flops

EPS = 1e-6
# Types of levels, as diffusers names them: whether they attend.
DOWN_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCKS = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


class Reconstruction(NamedTuple):
    """What an autoencoder makes of n images in training.

    Args:
        images: (n, out_channels, H, W).
        latents: (n, C, H/f, W/f) float32, as a denoiser would see them, unscaled: sampled, or not yet quantised.
        penalty: (n,) float32 that regularises the latents: the Kullback-Leibler divergence from a standard normal,
            summed over a sample's latents; or the codebook's loss, averaged over them.
        codes: (n, H/f, W/f) int64, indices into the codebook; None where there is none.
    """

    images: Tensor
    latents: Tensor
    penalty: Tensor
    codes: Tensor | None


class DiagonalGaussian(NamedTuple):
    """The posterior of the latents: mean and log variance, (n, C, H, W) each."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal noise (n, C, H, W) picks."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def divergence(self) -> Tensor:
        """(n,) Kullback-Leibler divergence from a standard normal, summed over each sample's latents."""
        square = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * square.flatten(1).sum(1)


class Autoencoder(nn.Module):
    """What autoencoders share: counting, first values, and diffusers' names for modules."""

    block_lists: ClassVar[tuple[str, ...]] = ("encoder.down_blocks", "decoder.up_blocks")
    own_config: ClassVar[dict[str, Any]] = {}  # what diffusers' class does not know
    config: dict[str, Any]

    def flops(self, height: int, width: int) -> float:
        """FLOPs of reconstructing one image of H x W."""
        return forward_flops(type(self), self.config, (1, self.config["in_channels"], height, width))

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values: Kaiming-uniform weights as torch's own, zero biases, norms at one."""
        if name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name.split(".")[-2]:
            tensor.fill_(1)
        else:
            nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)

    def init_buffers(self) -> None:
        """There are none."""

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name` of `state_dict` as diffusers' class has it: unchanged."""
        return {name: tensor}

    def from_diffusers(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of `state_dict`, of what `read` gives for diffusers' name."""
        return read(name)


class AutoencoderKL(Autoencoder):
    """Images to latents and back. Keys, defaults and outputs are those of diffusers' AutoencoderKL.

    Args:
        in_channels: channels of the images to encode.
        out_channels: channels of the images decoded.
        block_out_channels: channels of the levels, from fine to coarse; f is 2 ** (levels - 1).
        down_block_types: of the encoder's levels, from fine to coarse: DownEncoderBlock2D, or AttnDownEncoderBlock2D,
            which attends after each residual block. None: none attends.
        up_block_types: of the decoder's, from coarse to fine: UpDecoderBlock2D or AttnUpDecoderBlock2D. None: those
            that mirror the encoder's.
        layers_per_block: residual blocks of an encoder level; the decoder's have one more.
        latent_channels: channels of the latents.
        norm_num_groups: groups of every group norm.
        scaling_factor: multiplies the latents, after the shift, for the denoiser (see models/first_stage.py); None
            where it is not known yet.
        shift_factor: subtracted from the latents for the denoiser.
        use_quant_conv: a 1 x 1 convolution after the encoder (SD 1, 2 and XL; not SD3).
        use_post_quant_conv: the same before the decoder.
        mid_block_add_attention: the attention at the coarsest level.
    """

    diffusers_class: str = "AutoencoderKL"
    component: ClassVar[str] = "vae"  # in a pipeline's folder
    float32_inputs: ClassVar[tuple[str, ...]] = ("noise",)

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: list[int] | None = None,
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float | None = 0.18215,
        shift_factor: float | None = None,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        down_block_types: list[str] | None = None,
        up_block_types: list[str] | None = None,
    ) -> None:
        super().__init__()
        widths, down, up = levels(block_out_channels, norm_num_groups, down_block_types, up_block_types)
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "down_block_types": down,
            "up_block_types": up,
            "act_fn": "silu",
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "norm_num_groups": norm_num_groups,
            "scaling_factor": scaling_factor,
            "shift_factor": shift_factor,
            "use_quant_conv": use_quant_conv,
            "use_post_quant_conv": use_post_quant_conv,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.latent_channels = latent_channels
        self.downsampling = 2 ** (len(widths) - 1)
        depth, groups, attention = layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = Encoder(in_channels, 2 * latent_channels, widths, down, depth, groups, attention)
        self.decoder = Decoder(latent_channels, out_channels, widths, up, depth + 1, groups, attention)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Reconstructions of images, through latents sampled with `noise` (n, C, H/f, W/f), or through their means."""
        encoded = self.encode(images)
        posterior = DiagonalGaussian(encoded.mean.float(), encoded.log_variance.float())
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return Reconstruction(self.decode(latents.to(encoded.mean.dtype)), latents, posterior.divergence(), None)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """Images (n, in_channels, H, W) in [-1, 1] to the posterior of their latents, unscaled.

        Raises:
            ValueError: the sides are not multiples of f.
        """
        check_sides(images, self.downsampling)
        moments = self.encoder(images)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, log_variance.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, C, H/f, W/f), unscaled, to images (n, out_channels, H, W), about in [-1, 1]."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


def levels(
    widths: list[int] | None, groups: int, down: list[str] | None, up: list[str] | None
) -> tuple[list[int], list[str], list[str]]:
    """Channels of the levels and the types of their blocks, with what is left out filled in.

    Raises:
        ValueError: channels that do not divide into groups, an unknown type, or not as many types as levels.
    """
    widths = list(widths or [64])
    for width in widths:
        if width % groups:
            raise ValueError(f"block_out_channels: {width} does not divide into norm_num_groups={groups}")
    down = list(down or ["DownEncoderBlock2D"] * len(widths))
    mirrored = {attends: name for name, attends in UP_BLOCKS.items()}
    up = list(up or [mirrored[DOWN_BLOCKS.get(name, False)] for name in reversed(down)])
    for key, names, known in (("down_block_types", down, DOWN_BLOCKS), ("up_block_types", up, UP_BLOCKS)):
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(f"{key}: {', '.join(unknown)} is not implemented; there are {', '.join(known)}")
        if len(names) != len(widths):
            raise ValueError(f"{key} has {len(names)} levels, block_out_channels {len(widths)}")
    return widths, down, up


def check_sides(images: Tensor, downsampling: int) -> None:
    """Refuse images whose sides are not multiples of f, in a ValueError."""
    if images.shape[-2] % downsampling or images.shape[-1] % downsampling:
        raise ValueError(f"images of {tuple(images.shape[-2:])} must be multiples of {downsampling} a side")


class Encoder(nn.Module):
    """Images to moments (n, channels, H/f, W/f): levels of residual blocks, halving in between, then the middle."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        widths: list[int],
        types: list[str],
        depth: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = conv3(in_channels, widths[0])
        before = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            DownBlock(c_in, c_out, depth, groups, DOWN_BLOCKS[kind], halve=i < len(widths) - 1)
            for i, (c_in, c_out, kind) in enumerate(zip(before, widths, types, strict=True))
        )
        self.mid_block = MiddleBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = conv3(widths[-1], channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, H, W) to (n, channels, H/f, W/f)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to images: the middle, then levels of residual blocks, doubling in between."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        widths: list[int],
        types: list[str],
        depth: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        widths = widths[::-1]
        self.conv_in = conv3(channels, widths[0])
        self.mid_block = MiddleBlock(widths[0], groups, attention)
        before = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            UpBlock(c_in, c_out, depth, groups, UP_BLOCKS[kind], double=i < len(widths) - 1)
            for i, (c_in, c_out, kind) in enumerate(zip(before, widths, types, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = conv3(widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H/f, W/f) to (n, out_channels, H, W)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """Residual blocks, attention after each where asked for, then half the sides unless it is the last level."""

    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, attention: bool, halve: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth))
        self.attentions = nn.ModuleList(SpatialAttention(c_out, groups) for _ in range(depth if attention else 0))
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) to (n, c_out, H/2, W/2), or H, W at the last level."""
        for resnet, attention in zip_longest(self.resnets, self.attentions, fillvalue=nn.Identity()):
            x = attention(resnet(x))
        for module in self.downsamplers:
            x = module(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, attention after each where asked for, then double the sides unless it is the last level."""

    def __init__(self, c_in: int, c_out: int, depth: int, groups: int, attention: bool, double: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(depth))
        self.attentions = nn.ModuleList(SpatialAttention(c_out, groups) for _ in range(depth if attention else 0))
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) to (n, c_out, 2H, 2W), or H, W at the last level."""
        for resnet, attention in zip_longest(self.resnets, self.attentions, fillvalue=nn.Identity()):
            x = attention(resnet(x))
        for module in self.upsamplers:
            x = module(x)
        return x


class MiddleBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W), unchanged in shape."""
        for module in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = module(x)
        return x


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, 3 x 3 convolution; a 1 x 1 convolution beside them where channels change."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, EPS)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, EPS)
        self.conv2 = conv3(c_out, c_out)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, H, W) to (n, c_out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Module):
    """Residual attention with a single head over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W), unchanged in shape."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        attended = F.scaled_dot_product_attention(query, key, value).squeeze(1)
        return x + self.to_out[0](attended).transpose(1, 2).view_as(x)


class Downsample(nn.Module):
    """Half the sides: a 3 x 3 convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) to (n, channels, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the sides: nearest neighbours, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) to (n, channels, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the sides."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)
