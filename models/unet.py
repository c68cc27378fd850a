"""The UNet of latent diffusion: of LDM (Rombach et al. 2022, arXiv 2112.10752), Stable Diffusion 1 and 2, and SDXL
(Podell et al. 2023, arXiv 2307.01952).

ADM's network (Dhariwal & Nichol 2021, arXiv 2105.05233): levels of residual blocks, each level at half the sides of the
one before; then the same upwards, each block reading what its counterpart on the way down gave. Attention sits at the
coarser levels: among the pixels alone, or as a transformer that also reads a context.

Shapes: n samples, L tokens of the context, E channels of the time's embedding.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.embeddings import VectorEmbedding, sinusoid
from models.unet_blocks import Conv, Downsample, ResidualBlock, SelfAttention, SpatialTransformer, Upsample
from models.unet_config import (
    FIXED,
    FIXED_WITH_CONTEXT,
    FIXED_WITHOUT_CONTEXT,
    diffusers_names,
    level_kinds,
    per_level,
)


class UNet(nn.Module):
    """Noisy latents, timestep and conditions to a prediction.

    With a context, keys and outputs are those of diffusers' UNet2DConditionModel; without, of its UNet2DModel.

    Args:
        block_out_channels: channels of the levels, from fine to coarse; the network divides sides by 2 ** (levels - 1).
        down_block_types: diffusers' names for the levels on the way down, which say where attention sits:
            "DownBlock2D", "CrossAttnDownBlock2D" (reads the context), "AttnDownBlock2D" (does not),
            "ResnetDownsampleBlock2D" (no attention; the sides are halved by a residual block).
        up_block_types: the same on the way up, from coarse to fine: "UpBlock2D", ...
        sample_size: side of the latents that it is trained on; nothing here depends on it.
        in_channels: channels of the noisy latents. diffusers counts those of `concat_channels` too.
        out_channels: channels of the prediction.
        concat_channels: of what is laid beside the latents: low-resolution images, masks, maps.
        layers_per_block: residual blocks of a level; on the way up there is one more.
        cross_attention_dim: channels of the context; None: there is none.
        transformer_layers_per_block: depth of the transformers, of all levels or of each.
        attention_head_dim: with a context, the number of heads of all levels or of each (the name misleads);
            without, channels of a head.
        attention_heads: without a context, the number of heads of every level instead (LDM's inpainting and churches).
            diffusers has no such key.
        use_linear_projection: how diffusers keeps the transformers' outer projections: as matrices (SD 2, SDXL) or as
            1 x 1 convolutions.
        norm_num_groups: groups of every group norm.
        norm_eps: of the group norms, but for the transformers', which have 1e-6.
        resnet_time_scale_shift: "scale_shift": the time scales and shifts norms' outputs (ADM's adaptive group norm).
        downsample_type, upsample_type: without a context, "resnet": levels with attention, too, resample by residual
            blocks.
        attn_norm_num_groups: without a context, groups of the middle attention's norm; None takes `norm_num_groups`.
        addition_embed_type: "text_time" adds an embedding of the pooled text and of numbers to the time's: sizes and
            crops in SDXL and, in its refiner, an aesthetic score.
        addition_time_embed_dim: channels of each such number's sinusoid.
        projection_class_embeddings_input_dim: channels of the pooled text and all sinusoids together.
        pooled_dim, size_ids: the same in parts: channels of the pooled text, and how many numbers there are.
    """

    block_lists: tuple[str, ...]
    # Maps are in the layout that kernels want. A compiler that saw to it would copy convolutions' weights three times a
    # step, as their shape (c_out, 3, 3, c_in) looks to it like a map's.
    compiler_options: ClassVar[dict[str, Any]] = {"layout_optimization": False}
    float32_inputs: ClassVar[tuple[str, ...]] = ("timestep", "size_ids")
    own_config: ClassVar[dict[str, Any]] = {
        **{"concat_channels": 0, "attention_heads": None, "pooled_dim": None, "size_ids": None}
    }

    def __init__(
        self,
        block_out_channels: list[int],
        down_block_types: list[str],
        up_block_types: list[str],
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        concat_channels: int = 0,
        layers_per_block: int = 2,
        cross_attention_dim: int | None = None,
        transformer_layers_per_block: int | list[int] = 1,
        attention_head_dim: int | list[int] = 8,
        attention_heads: int | None = None,
        use_linear_projection: bool = False,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        downsample_type: Literal["conv", "resnet"] = "conv",
        upsample_type: Literal["conv", "resnet"] = "conv",
        attn_norm_num_groups: int | None = None,
        addition_embed_type: Literal["text_time"] | None = None,
        addition_time_embed_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        pooled_dim: int | None = None,
        size_ids: int | None = None,
    ) -> None:
        super().__init__()
        widths, levels = list(block_out_channels), len(block_out_channels)
        reads_context, sized = cross_attention_dim is not None, addition_embed_type is not None
        kinds = level_kinds("down_block_types", down_block_types, levels, reads_context)
        up_kinds = level_kinds("up_block_types", up_block_types, levels, reads_context)
        heads = per_level("attention_head_dim", attention_head_dim, levels)
        depths = per_level("transformer_layers_per_block", transformer_layers_per_block, levels)
        for width in widths:
            if width % norm_num_groups:
                raise ValueError(f"block_out_channels: {width} does not divide into norm_num_groups={norm_num_groups}")
        if sized and (not reads_context or addition_time_embed_dim is None):
            raise ValueError("addition_embed_type text_time needs cross_attention_dim and addition_time_embed_dim")
        if pooled_dim is not None and size_ids is not None and addition_time_embed_dim is not None:
            projection_class_embeddings_input_dim = pooled_dim + size_ids * addition_time_embed_dim
        if sized and projection_class_embeddings_input_dim is None:
            raise ValueError("text_time needs pooled_dim and size_ids, or projection_class_embeddings_input_dim")
        scale_shift = resnet_time_scale_shift == "scale_shift"
        if scale_shift and not reads_context and attn_norm_num_groups is None:
            raise ValueError("attn_norm_num_groups: with scale_shift, diffusers takes null as no norm: give a number")

        self.diffusers_class = "UNet2DConditionModel" if reads_context else "UNet2DModel"
        self.config: dict[str, Any] = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "concat_channels": concat_channels,
            "block_out_channels": widths,
            "down_block_types": list(down_block_types),
            "up_block_types": list(up_block_types),
            "layers_per_block": layers_per_block,
            "attention_head_dim": attention_head_dim,
            "attention_heads": attention_heads,
            "norm_num_groups": norm_num_groups,
            "norm_eps": norm_eps,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "pooled_dim": pooled_dim if sized else None,
            "size_ids": size_ids if sized else None,
            **FIXED,
        }
        if reads_context:
            self.config |= {
                "cross_attention_dim": cross_attention_dim,
                "transformer_layers_per_block": transformer_layers_per_block,
                "use_linear_projection": use_linear_projection,
                "addition_embed_type": addition_embed_type,
                "addition_time_embed_dim": addition_time_embed_dim,
                "projection_class_embeddings_input_dim": projection_class_embeddings_input_dim,
                **FIXED_WITH_CONTEXT,
            }
        else:
            self.config |= {
                "downsample_type": downsample_type,
                "upsample_type": upsample_type,
                "attn_norm_num_groups": attn_norm_num_groups,
                **FIXED_WITHOUT_CONTEXT,
            }
        self.in_channels, self.out_channels = in_channels, out_channels
        self.downsampling = 2 ** (levels - 1)
        embedding = 4 * widths[0]

        def residual(c_in: int, c_out: int, resample: Literal["down", "up"] | None = None) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, embedding, norm_num_groups, norm_eps, scale_shift, resample)

        def attention(level: int, kind: str, groups: int = norm_num_groups) -> nn.Module:
            width = widths[level]
            count = heads[level] if reads_context else attention_heads or width // heads[level]
            if count < 1 or width % count:
                raise ValueError(f"attention_head_dim: {width} channels do not divide into {count} heads")
            if kind == "pixels":
                return SelfAttention(width, count, groups, norm_eps)
            assert cross_attention_dim is not None
            return SpatialTransformer(width, count, depths[level], cross_attention_dim, groups)

        self.conv_in = Conv(in_channels + concat_channels, widths[0])
        self.time_embedding = VectorEmbedding(widths[0], embedding)
        self.add_embedding = VectorEmbedding(projection_class_embeddings_input_dim, embedding) if sized else None  # type: ignore[arg-type]

        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, (kind, by_residual) in enumerate(kinds):
            level = Level()
            for _ in range(layers_per_block):
                level.add(residual(skips[-1], widths[i]), attention(i, kind) if kind else None)
                skips.append(widths[i])
            if i < levels - 1:
                by_residual = by_residual or (kind == "pixels" and downsample_type == "resnet")
                level.downsamplers.append(
                    residual(widths[i], widths[i], "down") if by_residual else Downsample(widths[i])
                )
                skips.append(widths[i])
            self.down_blocks.append(level)

        self.mid_block = Level()
        groups = norm_num_groups if reads_context else attn_norm_num_groups or norm_num_groups
        middle = attention(levels - 1, "context" if reads_context else "pixels", groups)
        self.mid_block.add(residual(widths[-1], widths[-1]), middle)
        self.mid_block.add(residual(widths[-1], widths[-1]), None)

        width = widths[-1]
        self.up_blocks = nn.ModuleList()
        for i, (kind, by_residual) in zip(reversed(range(levels)), up_kinds, strict=True):
            level = Level()
            for _ in range(layers_per_block + 1):
                level.add(residual(width + skips.pop(), widths[i]), attention(i, kind) if kind else None)
                width = widths[i]
            if i > 0:
                by_residual = by_residual or (kind == "pixels" and upsample_type == "resnet")
                level.upsamplers.append(residual(width, width, "up") if by_residual else Upsample(width))
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = Conv(widths[0], out_channels)
        # Blocks of one level get maps of one size. Compilers, for whom this tells kinds of blocks apart, thus do not
        # change from a graph of fixed sides to one of any within a pass, which breaks activation checkpointing.
        for level, i in self._levels():
            for module in level.modules():
                module.level = i  # type: ignore[assignment]
        # What engines shard, compile and checkpoint one by one: residual blocks, transformers' blocks, resamplers.
        self.block_lists = tuple(
            name
            for name, module in self.named_modules()
            if re.search(r"(resnets|samplers|transformer_blocks)$", name) or self._is_self_attention(module)
        )

    @staticmethod
    def _is_self_attention(module: nn.Module) -> bool:
        return isinstance(module, nn.ModuleList) and any(isinstance(m, SelfAttention) for m in module)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        """Predict from noisy latents.

        A conditioner gives a context and a pooled vector to every denoiser: what this network's configuration has no
        place for (any of the two, and sizes) is not read. What it asks for must be there.

        Args:
            x: (n, in_channels, H, W), H and W multiples of what the network divides sides by.
            timestep: (n,), 0 (image) to 1000 (noise), in at least float32 or as integers.
            context: (n, L, cross_attention_dim).
            pooled: (n, channels), the pooled text.
            size_ids: (n, numbers), in at least float32 or as integers; SDXL: height and width of the original, top and
                left of the crop, height and width of the target; the refiner has its aesthetic score for the last two.
            concat: (n, concat_channels, H, W), beside the latents.

        Returns:
            (n, out_channels, H, W), in the parameters' type.

        Raises:
            ValueError: a condition is missing or of the wrong size; sides that do not divide; half-precision timesteps.
        """
        self.grid(*x.shape[-2:])
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(sinusoid(timestep, self.config["block_out_channels"][0]))
        if self.add_embedding is not None:
            time = time + self.add_embedding(self._text_time(pooled, size_ids))
        time = F.silu(time).to(dtype)  # all that is made of it begins with this SiLU
        if "cross_attention_dim" in self.config:
            context = self._checked("context", context, self.config["cross_attention_dim"], -1).to(dtype)
        if self.config["concat_channels"] or concat is not None:
            x = torch.cat([x, self._checked("concat", concat, self.config["concat_channels"], 1)], dim=1)

        x = self.conv_in(x.to(dtype, memory_format=torch.channels_last))
        skips = [x]
        for level in _as_levels(self.down_blocks):
            for block, attention in level.pairs():
                x = attention(block(x, time), context)
                skips.append(x)
            for resample in level.downsamplers:
                x = resample(x, time)
                skips.append(x)

        for block, attention in self.mid_block.pairs():
            x = attention(block(x, time), context)

        for level in _as_levels(self.up_blocks):
            for block, attention in level.pairs():
                x = attention(block(torch.cat([x, skips.pop()], dim=1), time), context)
            for resample in level.upsamplers:
                x = resample(x, time)
        return self.conv_out(F.silu(self.conv_norm_out(x))).contiguous()

    def _text_time(self, pooled: Tensor | None, size_ids: Tensor | None) -> Tensor:
        """What `add_embedding` reads: the pooled text, then the sinusoid of each number."""
        if pooled is None or size_ids is None:
            raise ValueError(f"text_time needs {'pooled' if pooled is None else 'size_ids'}, which is not given")
        numbers = sinusoid(size_ids.flatten(), self.config["addition_time_embed_dim"]).view(len(size_ids), -1)
        vector = torch.cat([pooled.float(), numbers], dim=1)
        return self._checked("pooled and size_ids", vector, self.config["projection_class_embeddings_input_dim"], 1)

    @staticmethod
    def _checked(name: str, condition: Tensor | None, channels: int, dim: int) -> Tensor:
        if condition is None:
            raise ValueError(f"the network reads {name} of {channels} channels, which is not given")
        if condition.shape[dim] != channels:
            raise ValueError(f"{name}: {condition.shape[dim]} channels where the network reads {channels}")
        return condition

    def condition_keys(self, context_dim: int, pooled_dim: int) -> dict[str, int]:
        """Keys of the configuration that follow from what the conditioner gives, with the values that they need."""
        keys = {"cross_attention_dim": context_dim} if "cross_attention_dim" in self.config else {}
        return keys | ({"pooled_dim": pooled_dim} if self.config["pooled_dim"] is not None else {})

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the coarsest level, of latents of H x W.

        Raises:
            ValueError: sides that are not multiples of what the network divides them by.
        """
        f = self.downsampling
        if height % f or width % f:
            raise ValueError(f"latents of {height} x {width} must be multiples of {f} a side")
        return height // f, width // f

    def flops(self, height: int, width: int, context_length: int) -> int:
        """FLOPs of one sample's forward pass: 2 per multiplication in linear layers, convolutions and attention.

        Args:
            height, width: of the latents.
            context_length: L, tokens of the context.
        """
        self.grid(height, width)
        finest, length = height * width, context_length
        embeddings = [self.time_embedding] + ([self.add_embedding] if self.add_embedding is not None else [])
        products = sum(e.up.weight.numel() + e.down.weight.numel() for e in embeddings)
        products += finest * (self.conv_in.weight.numel() + self.conv_out.weight.numel())
        for level, i in self._levels():
            after = i + 1 if level.downsamplers else i - 1 if level.upsamplers else i
            products += level.products(finest >> 2 * i, finest >> 2 * after, length)
        return 2 * products

    def _levels(self) -> list[tuple["Level", int]]:
        """All levels in the order in which they are passed, each with how often the sides were halved before it."""
        down, up = _as_levels(self.down_blocks), _as_levels(self.up_blocks)
        coarsest = len(down) - 1
        places = [*range(coarsest + 1), coarsest, *reversed(range(coarsest + 1))]
        return list(zip([*down, self.mid_block, *up], places, strict=True))

    @torch.no_grad()
    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """First values as in ADM: residual branches start at zero, the prediction as zero; else torch's own weights and
        zero biases."""
        *path, module, kind = name.split(".")
        ends_branch = module in ("conv2", "proj_out") or (module == "to_out" and "transformer_blocks" not in path)
        if kind == "bias" or module == "conv_out" or ends_branch:
            tensor.zero_()
        elif "norm" in module:
            tensor.fill_(1)
        else:
            nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)

    def init_buffers(self) -> None:
        """There are none."""

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name` of `state_dict` as diffusers' class has it: under its name, or parts under several."""
        names = diffusers_names(name)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 3, 1, 2)
        elif self._is_pointwise(name):
            tensor = tensor[:, :, None, None]
        return dict(zip(names, tensor.chunk(len(names)), strict=True))

    def from_diffusers(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of `state_dict`, made of what `read` gives for diffusers' names."""
        parts = [read(part) for part in diffusers_names(name)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self._is_pointwise(name):
            return tensor[:, :, 0, 0]
        return tensor.permute(0, 2, 3, 1).contiguous() if tensor.ndim == 4 else tensor

    def _is_pointwise(self, name: str) -> bool:
        """Whether the matrix `name` is a 1 x 1 convolution's in diffusers."""
        *_, module, kind = name.split(".")
        projection = module in ("proj_in", "proj_out") and not self.config["use_linear_projection"]
        return kind == "weight" and (module == "conv_shortcut" or projection)

    def diffusers_config(self) -> dict[str, Any]:
        """`config`, as diffusers' class counts channels."""
        in_channels = self.config["in_channels"] + self.config["concat_channels"]
        return self.config | {"in_channels": in_channels, "pooled_dim": None, "size_ids": None}

    @classmethod
    def arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our own configuration of what `diffusers_config` gives."""
        return {**config, "in_channels": config["in_channels"] - config.get("concat_channels", 0)}


class Level(nn.Module):
    """What a level consists of: residual blocks, as many attentions or none after the last, and what changes the sides
    towards the next level. The network calls them, as it keeps what they give for the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def add(self, block: ResidualBlock, attention: nn.Module | None) -> None:
        """Put a residual block, and what attends after it, to the end."""
        self.resnets.append(block)
        if attention is not None:
            self.attentions.append(attention)

    def pairs(self) -> list[tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
        """Residual blocks, each with the attention after it."""
        none = [_unattended] * (len(self.resnets) - len(self.attentions))
        return list(zip(self.resnets, [*self.attentions, *none], strict=True))

    def products(self, pixels: int, pixels_after: int, length: int) -> int:
        """Multiplications of one sample, of that many pixels here and after what changes the sides, and `length` tokens
        of context."""
        parts = [block.products(pixels) for block in self.resnets]  # type: ignore[operator]
        parts += [attention.products(pixels, length) for attention in self.attentions]  # type: ignore[operator]
        resamplers = (*self.downsamplers, *self.upsamplers)
        return sum(parts) + sum(resampler.products(pixels_after) for resampler in resamplers)


def _as_levels(blocks: nn.ModuleList) -> list[Level]:
    return list(blocks)  # type: ignore[arg-type]


def _unattended(x: Tensor, context: Tensor | None) -> Tensor:
    return x
