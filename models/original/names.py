"""Names of tensors in checkpoints of their authors' layout, beside diffusers' names of the same.

A table maps a module of the original to one of diffusers, or to several, which lie stacked in the original's one tensor
(fused queries, keys and values). `#` in a table stands for the number of a block. Some kinds of modules store other
numbers, shapes or orders; they are marked.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# same; halves: the two halves the other way round (scale and shift); matrix: a 1 x 1 convolution that diffusers has as
# a matrix; line: the same of a convolution along one dimension; transposed: a matrix, the other way round; columns:
# a 1 x 1 convolution that is a matrix the other way round.
Form = Literal["same", "halves", "matrix", "line", "transposed", "columns"]


@dataclass(frozen=True)
class Row:
    """A module, or a tensor outside of modules, of an original checkpoint.

    Args:
        original: its name.
        parts: diffusers' names; several are stacked in the original.
        form: how its tensors are stored there.
        heads: parts are stacked within each of so many heads.
    """

    original: str
    parts: tuple[str, ...]
    form: Form = "same"
    heads: int = 1


# MMDiT (Stable Diffusion 3). The last block's text stream, of which only the attention is read, and the final layer
# have scale and shift the other way round.

_MMDIT = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
_MMDIT_BLOCK = {
    "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    "joint_blocks.#.x_block.attn.qkv": "transformer_blocks.#.attn.to_q to_k to_v",
    "joint_blocks.#.x_block.attn.ln_q": "transformer_blocks.#.attn.norm_q",
    "joint_blocks.#.x_block.attn.ln_k": "transformer_blocks.#.attn.norm_k",
    "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
    "joint_blocks.#.x_block.attn2.qkv": "transformer_blocks.#.attn2.to_q to_k to_v",
    "joint_blocks.#.x_block.attn2.ln_q": "transformer_blocks.#.attn2.norm_q",
    "joint_blocks.#.x_block.attn2.ln_k": "transformer_blocks.#.attn2.norm_k",
    "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
    "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "joint_blocks.#.context_block.adaLN_modulation.1": "transformer_blocks.#.norm1_context.linear",
    "joint_blocks.#.context_block.attn.qkv": "transformer_blocks.#.attn.add_q_proj add_k_proj add_v_proj",
    "joint_blocks.#.context_block.attn.ln_q": "transformer_blocks.#.attn.norm_added_q",
    "joint_blocks.#.context_block.attn.ln_k": "transformer_blocks.#.attn.norm_added_k",
    "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
    "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
}


def mmdit(config: Mapping[str, Any]) -> list[Row]:
    """Of a SD3Transformer2DModel with this configuration."""
    last = config["num_layers"] - 1
    swapped = {"final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"}
    return _rows(_MMDIT | _numbered(_MMDIT_BLOCK, range(last + 1)), dict.fromkeys(swapped, "halves"))


# The UNet of latent diffusion: the blocks of all levels in one list, each of a residual block, an attention where the
# level has one, and a resampling, by a convolution or another residual block, at the level's end. Attention without a
# context is ADM's, whose queries, keys and values are stacked head by head.

_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "proj_out": "proj_out",
}
_TRANSFORMER_BLOCK = {
    **{f"transformer_blocks.#.norm{i}": f"transformer_blocks.#.norm{i}" for i in (1, 2, 3)},
    **{
        f"transformer_blocks.#.attn{i}.{layer}": f"transformer_blocks.#.attn{i}.{layer}"
        for i in (1, 2)
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    },
    "transformer_blocks.#.ff.net.0.proj": "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2": "transformer_blocks.#.ff.net.2",
}
_SELF_ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q to_k to_v",
    "proj_out": "to_out.0",
}


def unet(config: Mapping[str, Any]) -> list[Row]:
    """Of a UNet2DConditionModel, or of a UNet2DModel, with this configuration."""
    downs, ups = config["down_block_types"], config["up_block_types"]
    levels, depth = len(downs), config["layers_per_block"]
    table = dict(_UNET)
    attentions = dict[str, int]()  # levels by the place of an attention without a context

    def attention(place: str, theirs: str, level: int) -> dict[str, str]:
        if config.get("cross_attention_dim") is not None:
            return _within(_transformer(_of_level(config, "transformer_layers_per_block", level, 1)), place, theirs)
        attentions[place] = level
        return _within(_SELF_ATTENTION, place, theirs)

    if config.get("addition_embed_type") == "text_time":
        table |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    elif config.get("num_class_embeds") is not None:
        table |= {"label_emb": "class_embedding"}
    number = 1
    for level, kind in enumerate(downs):
        for i in range(depth):
            table |= _within(_RESIDUAL, f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}")
            if "Attn" in kind:
                table |= attention(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}", level)
            number += 1
        if level < levels - 1:
            place, theirs = f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            by_residual = _by_residual(kind, config.get("downsample_type"))
            table |= _within(_RESIDUAL, place, theirs) if by_residual else {f"{place}.op": f"{theirs}.conv"}
            number += 1
    table |= _within(_RESIDUAL, "middle_block.0", "mid_block.resnets.0")
    table |= attention("middle_block.1", "mid_block.attentions.0", levels - 1)
    table |= _within(_RESIDUAL, "middle_block.2", "mid_block.resnets.1")
    number = 0
    for level, kind in enumerate(ups):
        attends = "Attn" in kind
        for i in range(depth + 1):
            table |= _within(_RESIDUAL, f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}")
            if attends:
                place = f"output_blocks.{number}.1"
                table |= attention(place, f"up_blocks.{level}.attentions.{i}", levels - 1 - level)
            if i == depth and level < levels - 1:
                place, theirs = f"output_blocks.{number}.{2 if attends else 1}", f"up_blocks.{level}.upsamplers.0"
                by_residual = _by_residual(kind, config.get("upsample_type"))
                table |= _within(_RESIDUAL if by_residual else {"conv": "conv"}, place, theirs)
            number += 1
    forms: dict[str, Form] = {f"{place}.{layer}": "line" for place in attentions for layer in ("qkv", "proj_out")}
    return _rows(table, forms, {f"{place}.qkv": _heads(config, level) for place, level in attentions.items()})


def _by_residual(kind: str, resampling: str | None) -> bool:
    """Whether a level changes the sides by a residual block; those with attention do where the configuration says so
    of all."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and resampling == "resnet")


def _heads(config: Mapping[str, Any], level: int) -> int:
    """Of a UNet2DModel's attention at a level."""
    own: int | None = config.get("attention_heads")
    return own or config["block_out_channels"][level] // _of_level(config, "attention_head_dim", level, 8)


def _of_level(config: Mapping[str, Any], key: str, level: int, default: int) -> int:
    value = config.get(key, default)
    return value if isinstance(value, int) else value[level]


def _transformer(layers: int) -> dict[str, str]:
    return _TRANSFORMER | _numbered(_TRANSFORMER_BLOCK, range(layers))


# The autoencoder: levels of the decoder are counted from the coarse end in diffusers, from the fine end in originals.

_AUTOENCODER = {
    **{f"{half}.conv_in": f"{half}.conv_in" for half in ("encoder", "decoder")},
    **{f"{half}.norm_out": f"{half}.conv_norm_out" for half in ("encoder", "decoder")},
    **{f"{half}.conv_out": f"{half}.conv_out" for half in ("encoder", "decoder")},
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "quantize.embedding": "quantize.embedding",
}
_AUTOENCODER_RESIDUAL = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "nin_shortcut": "conv_shortcut",
}
_AUTOENCODER_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def autoencoder(config: Mapping[str, Any]) -> list[Row]:
    """Of an AutoencoderKL or a VQModel with this configuration."""
    levels, depth = len(config["block_out_channels"]), config["layers_per_block"]
    table, attentions = dict(_AUTOENCODER), dict[str, str]()
    for half in ("encoder", "decoder"):
        for i in (0, 1):
            table |= _within(_AUTOENCODER_RESIDUAL, f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}")
        attentions |= _within(_AUTOENCODER_ATTENTION, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for i in range(depth + 1):
            places = [(f"decoder.up.{level}", up)] + ([(f"encoder.down.{level}", down)] if i < depth else [])
            for original, theirs in places:
                table |= _within(_AUTOENCODER_RESIDUAL, f"{original}.block.{i}", f"{theirs}.resnets.{i}")
                attentions |= _within(_AUTOENCODER_ATTENTION, f"{original}.attn.{i}", f"{theirs}.attentions.{i}")
        table[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        table[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    matrices: dict[str, Form] = {name: "matrix" for name in attentions if not name.endswith("norm")}
    return _rows(table | attentions, matrices)


# Latent diffusion's own transformer over tokens, of which each layer is two of the original: attention, and perceptron.

_BERT = {
    "token_emb": "model.embed_tokens",
    "pos_emb.emb": "model.embed_positions",
    "norm": "model.layer_norm",
    "to_logits": "to_logits",
}
_BERT_ATTENTION = {
    "0": "self_attn_layer_norm",
    "1.to_q": "self_attn.q_proj",
    "1.to_k": "self_attn.k_proj",
    "1.to_v": "self_attn.v_proj",
    "1.to_out": "self_attn.out_proj",
}
_BERT_MLP = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


def bert(config: Mapping[str, Any]) -> list[Row]:
    """Of an LDMBertModel with this configuration."""
    table = dict(_BERT)
    for layer in range(config["encoder_layers"]):
        for number, part in ((2 * layer, _BERT_ATTENTION), (2 * layer + 1, _BERT_MLP)):
            table |= _within(part, f"attn_layers.layers.{number}", f"model.layers.{layer}")
    return _rows(table)


def classes(config: Mapping[str, Any]) -> list[Row]:
    """Of latent diffusion's classes, a vector each."""
    return _rows({"embedding": "embedding"})


def maps(config: Mapping[str, Any]) -> list[Row]:
    """Of latent diffusion's labels of maps, a colour each."""
    return _rows({"channel_mapper": "colours"}, {"channel_mapper": "columns"})


# OpenCLIP's text encoder (Stable Diffusion 2 and XL).

_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_BLOCK = {
    "transformer.resblocks.#.ln_1": "text_model.encoder.layers.#.layer_norm1",
    "transformer.resblocks.#.ln_2": "text_model.encoder.layers.#.layer_norm2",
    "transformer.resblocks.#.mlp.c_fc": "text_model.encoder.layers.#.mlp.fc1",
    "transformer.resblocks.#.mlp.c_proj": "text_model.encoder.layers.#.mlp.fc2",
    "transformer.resblocks.#.attn.out_proj": "text_model.encoder.layers.#.self_attn.out_proj",
    **{
        f"transformer.resblocks.#.attn.in_proj_{leaf}": " ".join(
            f"text_model.encoder.layers.#.self_attn.{part}_proj.{leaf}" for part in "qkv"
        )
        for leaf in ("weight", "bias")
    },
}


def open_clip(config: Mapping[str, Any]) -> list[Row]:
    """Of a CLIPTextModel, or one with projection, with this configuration. Stable Diffusion 2's has a layer less than
    the original, whose last is not used, and no projection."""
    table = _OPEN_CLIP | _numbered(_OPEN_CLIP_BLOCK, range(config["num_hidden_layers"]))
    if "CLIPTextModelWithProjection" not in config.get("architectures", []):
        del table["text_projection"]
    return _rows(table, {"text_projection": "transposed"})


# From tables to tensors


class Names:
    """Both names of every tensor of a component, and the way from one's values to the other's.

    Args:
        rows: of the component's table.
        prefix: of the component in the original checkpoint.
    """

    def __init__(self, rows: Iterable[Row], prefix: str = "") -> None:
        self._rows = {row.original: row for row in rows}
        self._of_part = {part: row for row in self._rows.values() for part in row.parts}
        self.prefix = prefix

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """An original tensor under diffusers' names; nothing where there is no such module."""
        found = self._find(name.removeprefix(self.prefix), self._rows)
        if found is None:
            return {}
        row, leaf = found
        parts = [part + leaf for part in row.parts]
        return dict(zip(parts, _from_original(tensor, row, leaf).chunk(len(parts)), strict=True))

    def originals(self, names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """The original tensors that tensors of diffusers' names make up: the names of the parts of each, and what has
        no place in the original."""
        given, rest = list(names), []
        known, wanted = set(given), {}
        for name in given:
            found = self._find(name, self._of_part)
            if found is None or not known.issuperset(parts := [part + found[1] for part in found[0].parts]):
                rest.append(name)
            else:
                wanted[self.prefix + found[0].original + found[1]] = tuple(parts)
        return wanted, rest

    def to_original(self, name: str, parts: Iterable[Tensor]) -> Tensor:
        """The original tensor `name` of the parts that `originals` lists."""
        found = self._find(name.removeprefix(self.prefix), self._rows)
        assert found is not None, f"{name} is in no table"
        row, leaf = found
        given = list(parts)
        return _to_original(torch.cat(given) if len(given) > 1 else given[0], row, leaf)

    @staticmethod
    def _find(name: str, rows: Mapping[str, Row]) -> tuple[Row, str] | None:
        """The row of a tensor's name, and what of the name is behind the module."""
        if name in rows:
            return rows[name], ""
        module, dot, leaf = name.rpartition(".")
        return (rows[module], dot + leaf) if module in rows else None


class SameNames(Names):
    """A component that has diffusers' (transformers') names in the original, behind a prefix.

    Args:
        prefix: of the component.
        twice: tensors that the original holds a second time, by their second name.
    """

    def __init__(self, prefix: str, twice: Mapping[str, str]) -> None:
        super().__init__([], prefix)
        self._twice = twice

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `Names.to_diffusers`. Positions' numbers, which old files have, are no weights."""
        own = name.removeprefix(self.prefix)
        return {} if own in self._twice or own.endswith(".position_ids") else {own: tensor}

    def originals(self, names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
        """See `Names.originals`."""
        given = list(names)
        wanted: dict[str, tuple[str, ...]] = {self.prefix + name: (name,) for name in given}
        wanted |= {self.prefix + second: (first,) for second, first in self._twice.items() if first in given}
        return wanted, []

    def to_original(self, name: str, parts: Iterable[Tensor]) -> Tensor:
        """See `Names.to_original`."""
        (tensor,) = parts
        return tensor


def _from_original(tensor: Tensor, row: Row, leaf: str) -> Tensor:
    if row.form in ("matrix", "line", "columns") and leaf == ".weight":
        tensor = tensor.flatten(1)
    return _turned(_restacked(tensor, row.heads, len(row.parts)), row.form)


def _to_original(tensor: Tensor, row: Row, leaf: str) -> Tensor:
    tensor = _turned(_restacked(tensor, len(row.parts), row.heads), row.form)
    if row.form in ("matrix", "line", "columns") and leaf == ".weight":
        return tensor[:, :, None] if row.form == "line" else tensor[:, :, None, None]
    return tensor


def _restacked(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rows that lie in `inner` stacks within each of `outer`, the other way round."""
    if 1 in (outer, inner):
        return tensor
    return tensor.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _turned(tensor: Tensor, form: Form) -> Tensor:
    """What undoes itself."""
    if form == "halves":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.T if form in ("transposed", "columns") else tensor


def _rows(
    table: Mapping[str, str], forms: Mapping[str, Form] | None = None, heads: Mapping[str, int] | None = None
) -> list[Row]:
    return [
        Row(original, tuple(_parts(theirs)), (forms or {}).get(original, "same"), (heads or {}).get(original, 1))
        for original, theirs in table.items()
    ]


def _parts(theirs: str) -> Iterator[str]:
    """ "a.b.q k" is a.b.q and a.b.k; names in full are as they are."""
    first, *others = theirs.split()
    yield first
    for other in others:
        yield other if "." in other else f"{first.rpartition('.')[0]}.{other}"


def _numbered(table: Mapping[str, str], numbers: Iterable[int]) -> dict[str, str]:
    return {a.replace("#", str(i)): b.replace("#", str(i)) for i in numbers for a, b in table.items()}


def _within(table: Mapping[str, str], original: str, theirs: str) -> dict[str, str]:
    return {f"{original}.{a}": f"{theirs}.{b}" for a, b in table.items()}
