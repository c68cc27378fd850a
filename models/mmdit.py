"""MMDiT, the denoiser of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206, section 4 and figure 2).

Image patches and text tokens each have weights of their own and meet only in attention. A vector made of the timestep
and the pooled text modulates both (adaLN-zero, Peebles & Xie 2023, arXiv 2212.09748). SD3.5 adds RMS-normed queries and
keys, and SD3.5-medium, "MMDiT-X", a second attention among the image tokens of its early blocks.

`base_width` turns on the maximal update parametrization, muP (Yang et al. 2022, arXiv 2203.03466, table 3): first
values, attention's scale and the optimiser's steps (`learning_rate_factor`) are such that activations and their changes
keep their size as the network widens. Learning rates tuned at the base width then serve all others.

Shapes: n samples, T image tokens, L text tokens, D width.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import VectorEmbedding, sinusoid
from models.positions import LearnedPositionTable, PositionTable, position_table

TIME_CHANNELS = 256
MLP_RATIO = 4
EPS = 1e-6


class MMDiT(nn.Module):
    """Noisy latents, timestep and text to a prediction. Keys and outputs are those of diffusers' SD3Transformer2DModel.

    Args:
        sample_size: side of the square latents that positions are scaled for.
        patch_size: side of a patch, in latent pixels.
        in_channels: channels of the latents.
        num_layers: blocks.
        attention_head_dim: channels of an attention head.
        num_attention_heads: heads; the width D is heads times their channels. SD3 scales by one dial: heads = layers.
        joint_attention_dim: channels of the text sequence.
        caption_projection_dim: D, the only value that works; None takes it.
        pooled_projection_dim: channels of the pooled text; 0: there is none (neighbours), and time alone modulates.
        out_channels: channels of the prediction; None takes `in_channels`.
        pos_embed_max_size: most patches along a side. Smaller grids, of any aspect, take the centre of the table.
        dual_attention_layers: blocks with a second attention among image tokens.
        qk_norm: "rms_norm" normalises queries and keys per head.
        learned_positions: a trained table of positions instead of fixed sines and cosines.
        position_offset: see `position_scale`.
        position_scale: patch p of a side sits at (p - offset) * scale. None is diffusers' (sample_size / patch_size) /
            pos_embed_max_size; the paper, going from 256 px to S px, takes 256 / S with offset (max - S / 16) / 2.
        base_width: of the network that this one is a widening of under muP, and equals at that width; None: no muP.
        base_head_dim: of that network's heads; None: the same as here. Under muP attention's logits are divided by the
            heads' channels rather than their root.
    """

    diffusers_class: str = "SD3Transformer2DModel"
    # Attributes that are lists of blocks, which engines shard, compile and checkpoint one by one.
    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)
    # Configuration that diffusers' class does not have: left out of its config.json where it says nothing.
    own_config: ClassVar[dict[str, Any]] = {
        "learned_positions": False,
        "position_offset": 0.0,
        "position_scale": None,
        "base_width": None,
        "base_head_dim": None,
    }

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int | None = None,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: list[int] | None = None,
        qk_norm: Literal["rms_norm"] | None = None,
        learned_positions: bool = False,
        position_offset: float = 0.0,
        position_scale: float | None = None,
        base_width: int | None = None,
        base_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        if caption_projection_dim not in (None, width):
            raise ValueError(f"caption_projection_dim is {caption_projection_dim}, but the width is {width}")
        if width % 4:
            raise ValueError(f"the width {width} must be a multiple of 4: sines and cosines of two axes")
        dual = sorted(dual_attention_layers or [])
        if dual and dual[-1] >= num_layers:
            raise ValueError(f"dual_attention_layers names block {dual[-1]}, but there are {num_layers}")
        self.config: dict[str, Any] = {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_layers": num_layers,
            "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads,
            "joint_attention_dim": joint_attention_dim,
            "caption_projection_dim": width,
            "pooled_projection_dim": pooled_projection_dim,
            "out_channels": out_channels or in_channels,
            "pos_embed_max_size": pos_embed_max_size,
            "dual_attention_layers": dual,
            "qk_norm": qk_norm,
            "learned_positions": learned_positions,
            "position_offset": position_offset,
            "position_scale": position_scale,
            "base_width": base_width,
            "base_head_dim": base_head_dim,
        }
        for name, value in self.config.items():
            least = 0 if name == "pooled_projection_dim" else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.width = width
        self.patch_size, self.in_channels, self.out_channels = patch_size, in_channels, out_channels or in_channels

        self.patch_embedding = PatchEmbedding(in_channels, width, patch_size)
        self.positions: PositionTable | LearnedPositionTable
        if learned_positions:
            self.positions = LearnedPositionTable(pos_embed_max_size, width)
        else:
            scale = position_scale if position_scale is not None else sample_size // patch_size / pos_embed_max_size
            self.positions = PositionTable(pos_embed_max_size, width, position_offset, scale)
        self.text_embedding = nn.Linear(joint_attention_dim, width)
        self.time_embedding = VectorEmbedding(TIME_CHANNELS, width)
        self.pooled_embedding = VectorEmbedding(pooled_projection_dim, width) if pooled_projection_dim else None
        logit_scale = (base_head_dim or attention_head_dim) ** 0.5 / attention_head_dim if base_width else None
        last, norm = num_layers - 1, qk_norm is not None
        self.blocks = nn.ModuleList(
            Block(width, num_attention_heads, norm, dual=i in dual, last=i == last, scale=logit_scale)
            for i in range(num_layers)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Predict from noisy latents.

        Args:
            x: (n, in_channels, H, W), H and W multiples of the patch size.
            timestep: (n,), 1000 t, in at least float32 or as integers.
            context: (n, L, joint_attention_dim), the text sequence.
            pooled: (n, pooled_projection_dim), the pooled text.

        Returns:
            (n, out_channels, H, W), in the parameters' type.

        Raises:
            ValueError: the latents do not divide into patches or exceed the table; half-precision timesteps.
        """
        dtype = self.text_embedding.weight.dtype
        rows, columns = self.grid(*x.shape[-2:])

        image = self.patch_embedding(x.to(dtype)) + self.positions(rows, columns).to(dtype)
        text = self.text_embedding(context.to(dtype))
        vector = self.time_embedding(sinusoid(timestep, TIME_CHANNELS))
        if self.pooled_embedding is not None:
            vector = vector + self.pooled_embedding(pooled)
        vector = F.silu(vector).to(dtype)  # every modulation begins with this SiLU

        for block in self.blocks:
            image, text = block(image, text, vector)

        scale, shift = self.final_modulation(vector)[:, None].chunk(2, dim=-1)
        patches = self.final(modulate(normalize(image), shift, scale))
        return self._unpatch(patches, rows, columns)

    def flops(self, height: int, width: int, context_length: int) -> int:
        """FLOPs of one sample's forward pass: 2 per multiplication in linear layers, convolution and attention.

        Args:
            height, width: of the latents.
            context_length: L, text tokens.
        """
        rows, columns = self.grid(height, width)
        t, length, d = rows * columns, context_length, self.final.in_features
        patch = self.patch_size**2
        products = t * patch * self.in_channels * d + length * self.text_embedding.in_features * d
        pooled = self.config["pooled_projection_dim"]
        products += (TIME_CHANNELS + d + (pooled + d if pooled else 0)) * d
        products += sum(block.products(t, length) for block in self.blocks)  # type: ignore[operator]
        products += 2 * d * d + t * d * patch * self.out_channels
        return 2 * products

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values as in DiT (arXiv 2212.09748): blocks start as the identity, the prediction as zero."""
        parts = name.split(".")
        base, width = self.config["base_width"] or self.width, self.width
        if parts[-1] == "bias" or "modulation" in parts or parts[0] in ("final_modulation", "final"):
            tensor.zero_()
        elif parts[-2] in ("query_norm", "key_norm"):
            tensor.fill_(1)
        elif parts[0] in ("time_embedding", "pooled_embedding", "positions"):
            tensor.normal_(std=0.02 * (base / width) ** 0.5 if parts[-2] == "down" else 0.02, generator=generator)
        elif parts[0] in ("patch_embedding", "text_embedding"):
            # Of a fixed number of inputs: under muP as at the base width.
            bound = math.sqrt(3) * math.sqrt(2 / (tensor[0].numel() + base))  # Xavier's
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            # Query, key and value are matrices of their own: the fan-out of one is a third of the fused weight's.
            for matrix in tensor.flatten(1).chunk(3 if parts[-2] == "linear" else 1):
                nn.init.xavier_uniform_(matrix, generator=generator)

    def learning_rate_factor(self, name: str) -> float:
        """Of the parameter's step: base_width / width for matrices whose inputs grow with the width, else 1."""
        parts = name.split(".")
        fixed = parts[0] in ("patch_embedding", "text_embedding", "positions") or parts[1] == "up"
        if self.config["base_width"] is None or fixed or parts[-1] == "bias" or parts[-2] in ("query_norm", "key_norm"):
            return 1.0
        return self.config["base_width"] / self.width

    def init_buffers(self) -> None:
        """Compute the table of positions anew."""
        if isinstance(self.positions, PositionTable):
            self.positions.init_buffers()

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name` of `state_dict` as diffusers' class has it: under its name, or parts under several."""
        if name == "positions.axis":
            side, half = tensor.shape
            return {"pos_embed.pos_embed": position_table(tensor, side, side).reshape(1, side * side, 2 * half)}
        names = _diffusers_names(name)
        return dict(zip(names, tensor.chunk(len(names)), strict=True))

    def from_diffusers(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of `state_dict`, made of what `read` gives for diffusers' names.

        Raises:
            ValueError: the file's positions are not sines and cosines of the two axes.
        """
        if name == "positions.axis":
            side = self.config["pos_embed_max_size"]
            table = read("pos_embed.pos_embed").view(side, side, -1)
            axis = table[0, :, : table.shape[-1] // 2].contiguous()
            if not torch.equal(position_table(axis, side, side), table):
                raise ValueError("pos_embed.pos_embed is not sines and cosines of two axes: set learned_positions=true")
            return axis
        parts = [read(part) for part in _diffusers_names(name)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def condition_keys(self, context_dim: int, pooled_dim: int) -> dict[str, int]:
        """Keys of the configuration that follow from what the conditioner gives, with the values that they need."""
        return {"joint_attention_dim": context_dim, "pooled_projection_dim": pooled_dim}

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of latents of H x W.

        Raises:
            ValueError: sides that are no whole number of patches, or more than there are positions for.
        """
        p, most = self.patch_size, self.config["pos_embed_max_size"]
        if height % p or width % p or max(height, width) > p * most:
            raise ValueError(f"latents of {height} x {width} must be multiples of {p} and at most {p * most} a side")
        return height // p, width // p

    def _unpatch(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        p = self.patch_size
        patches = patches.view(-1, rows, columns, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, rows * p, columns * p)


class Block(nn.Module):
    """Figure 2b: both streams are modulated, attend jointly, and pass through MLPs of their own.

    Args:
        dual: adds an attention among the image tokens alone, of the same normed input.
        last: its text is read no more, so only queries, keys and values are made of it.
        scale: factor on attention's logits; None: one over the root of the heads' channels.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qk_norm: bool,
        dual: bool = False,
        last: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.last, self.scale = last, scale
        self.image = Stream(width, heads, qk_norm, modulations=9 if dual else 6)
        self.text = Stream(width, heads, qk_norm, modulations=2 if last else 6)
        self.dual = Attention(width, heads, qk_norm) if dual else None

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """image (n, T, D), text (n, L, D) and vector (n, D) to the next block's image and text."""
        shift, scale, *image_modulation = self.image.modulations(vector)
        text_first, text_second, *text_modulation = self.text.modulations(vector)
        # diffusers, whose weights these are, stores the last text block's two the other way round.
        text_shift, text_scale = (text_second, text_first) if self.last else (text_first, text_second)

        normed = normalize(image)
        image_qkv = self.image.attention.project(modulate(normed, shift, scale))
        text_qkv = self.text.attention.project(modulate(normalize(text), text_shift, text_scale))
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(image_qkv, text_qkv, strict=True))
        attended = attend(query, key, value, self.scale)
        image_attended, text_attended = attended.split([image.shape[1], text.shape[1]], dim=1)

        if self.dual is not None:
            dual_shift, dual_scale, dual_gate = image_modulation[4:]
            dual = self.dual.output(attend(*self.dual.project(modulate(normed, dual_shift, dual_scale)), self.scale))
            image = gated(image, dual_gate, dual)
        image = self.image.finish(image, image_attended, *image_modulation[:4])
        if not self.last:
            text = self.text.finish(text, text_attended, *text_modulation)
        return image, text

    def products(self, t: int, length: int) -> int:
        """Multiplications of one sample's forward pass with t image and `length` text tokens."""
        d = self.image.width
        stream = (4 + 2 * MLP_RATIO) * d * d
        vector = (self.image.count + self.text.count) * d * d
        joint = 2 * (t + length) ** 2 * d
        dual = 4 * t * d * d + 2 * t * t * d if self.dual is not None else 0
        return t * stream + length * (3 * d * d if self.last else stream) + vector + joint + dual


class Stream(nn.Module):
    """One modality's weights in a block: modulation, its side of the joint attention, MLP.

    Args:
        modulations: how many vectors modulate it: 6; 9 with dual attention; 2 where it ends at the attention.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, modulations: int) -> None:
        super().__init__()
        self.width, self.count = width, modulations
        self.modulation = nn.Linear(width, modulations * width)
        self.attention = Attention(width, heads, qk_norm, output=modulations > 2)
        self.mlp = MLP(width) if modulations > 2 else None

    def modulations(self, vector: Tensor) -> tuple[Tensor, ...]:
        """`count` tensors (n, 1, D) of the vector (n, D): shift, scale and gate of the attention, of the MLP, ..."""
        return self.modulation(vector)[:, None].chunk(self.count, dim=-1)

    def finish(
        self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor
    ) -> Tensor:
        """The two residual branches: x and attended are (n, tokens, D), the rest (n, 1, D)."""
        assert self.mlp is not None, "this stream ends at the attention"
        x = gated(x, gate, self.attention.output(attended))
        return gated(x, mlp_gate, self.mlp(modulate(normalize(x), shift, scale)))


class Attention(nn.Module):
    """The projections around an attention. Query, key and value are one matrix: one large product instead of three."""

    def __init__(self, width: int, heads: int, qk_norm: bool, output: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(width, 3 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=EPS) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // heads, eps=EPS) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if output else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, tokens, D) to query, key and value, each (n, tokens, heads, D / heads)."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in self.linear(x).chunk(3, dim=-1))
        return self.query_norm(query), self.key_norm(key), value

    def output(self, attended: Tensor) -> Tensor:
        """(n, tokens, D) to (n, tokens, D)."""
        assert self.out is not None, "this attention has no output"
        # One stream's part of the joint sequence is strided; packed, the bias is added inside the product.
        return self.out(attended.contiguous())


class MLP(nn.Module):
    """Two layers, tanh-approximated GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, MLP_RATIO * width)
        self.down = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, D) to (n, tokens, D)."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, computed as what it is: one matrix product over patches."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) to (n, T, D), row by row."""
        n, channels, height, width = x.shape
        p = self.kernel_size[0]
        patches = x.view(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, -1, channels * p * p), self.weight.flatten(1), self.bias)


def normalize(x: Tensor) -> Tensor:
    """Layer norm without weights, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """normed * (1 + scale) + shift, with shift and scale of (n, 1, D)."""
    return (normed * (1 + scale)).add_(shift)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, with a gate of (n, 1, D)."""
    return (gate * branch).add_(x)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of (n, tokens, heads, channels), to (n, tokens, D); see `Block` for the scale."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)


_TOP = {
    "patch_embedding": "pos_embed.proj",
    "positions.table": "pos_embed.pos_embed",
    "text_embedding": "context_embedder",
    "time_embedding.up": "time_text_embed.timestep_embedder.linear_1",
    "time_embedding.down": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embedding.up": "time_text_embed.text_embedder.linear_1",
    "pooled_embedding.down": "time_text_embed.text_embedder.linear_2",
    "final_modulation": "norm_out.linear",
    "final": "proj_out",
}
_IN_BLOCK = {
    "image.modulation": ["norm1.linear"],
    "image.attention.linear": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "image.attention.query_norm": ["attn.norm_q"],
    "image.attention.key_norm": ["attn.norm_k"],
    "image.attention.out": ["attn.to_out.0"],
    "image.mlp.up": ["ff.net.0.proj"],
    "image.mlp.down": ["ff.net.2"],
    "text.modulation": ["norm1_context.linear"],
    "text.attention.linear": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "text.attention.query_norm": ["attn.norm_added_q"],
    "text.attention.key_norm": ["attn.norm_added_k"],
    "text.attention.out": ["attn.to_add_out"],
    "text.mlp.up": ["ff_context.net.0.proj"],
    "text.mlp.down": ["ff_context.net.2"],
    "dual.linear": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "dual.query_norm": ["attn2.norm_q"],
    "dual.key_norm": ["attn2.norm_k"],
    "dual.out": ["attn2.to_out.0"],
}


def _diffusers_names(name: str) -> list[str]:
    """The diffusers tensors that, one above the other, make up our tensor `name`."""
    if name in _TOP:
        return [_TOP[name]]
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return [f"{_TOP[module]}.{kind}"]
    _, index, rest = module.split(".", 2)
    return [f"transformer_blocks.{index}.{part}.{kind}" for part in _IN_BLOCK[rest]]
