"""Low-rank adaptation (LoRA, Hu et al. 2021, arXiv 2106.09685): a network's weights stay, and beside chosen matrices W
two thin ones are learned, so that W x becomes W x + (alpha / rank) B A x.

In an adapted network the adapters are the only parameters, and the network's own weights are buffers: an engine shards,
saves and averages the former, and holds the latter in the type that it computes in. Files have the names of diffusers'
modules, in the layout of the peft library, which diffusers reads.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.pretrained import ComponentFolder, Pretrained
from models.tensor_files import open_file, read_json, some, write_json
from models.unet_blocks import Conv, PointwiseConv, convolve

# peft's file, and the one that diffusers' pipelines look for.
PEFT_FILE, DIFFUSERS_FILE, CONFIG_FILE = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_config.json",
)
# peft's initializations that take a part out of the base weights.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
_PEFT_PREFIX, _METADATA = "base_model.model.", "lora_adapter_metadata"
DENOISER = "denoiser"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class LoRA:
    """What is adapted, and how.

    Args:
        base: component's folder of the weights that stay; None: what `init_from` names.
        rank: of the adapters.
        alpha: their factor is alpha / rank.
        targets: which matrices and convolutions have one: ends of diffusers' names of their modules. MMDiT's text
            stream has add_q_proj, add_k_proj, add_v_proj and to_add_out; UNets have conv1, conv2 and others.
        text_targets: of CLIP's text encoders, by transformers' names: q_proj, k_proj, v_proj, out_proj, fc1, fc2. They
            are trained with the denoiser's then; see models/text_lora.py.
    """

    base: str | None = None
    rank: int = 16
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))
    text_targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: an adapter's rank is at least 1")
        if not self.targets:
            raise ValueError("targets is empty: name modules to adapt, such as to_q")

    @staticmethod
    @torch.no_grad()
    def init_parameter(name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """A as torch's own layers, B zero: a network begins as it was."""
        if name.endswith("lora_up"):
            tensor.zero_()
        else:
            nn.init.kaiming_uniform_(tensor, a=5**0.5, generator=generator)

    def adapt(self, network: nn.Module, base: str) -> nn.Module:
        """The network with adapters, on the device that it is on; `init_buffers` reads its own weights from `base`.

        Raises:
            ValueError: no module of the network has such a name.
        """
        assert isinstance(network, Pretrained), f"{type(network).__name__} has no counterpart in diffusers"
        adapted = False
        for name, module in list(network.named_modules()):
            if not isinstance(module, nn.Linear | Conv):
                continue
            parts = _modules_of(network, f"{name}.weight", module.weight)
            chosen = [i for i, part in enumerate(parts) if any(f".{part}".endswith(f".{t}") for t in self.targets)]
            if not chosen:
                continue
            if isinstance(module, Conv):
                network.set_submodule(name, AdaptedConv(module, self.rank, self.alpha))
            else:
                network.set_submodule(name, AdaptedLinear(module, len(parts), chosen, self.rank, self.alpha))
            adapted = True
        if not adapted:
            raise ValueError(f"adapter.targets={self.targets}: {type(network).__name__} has no such modules")
        frozen = []
        for prefix, module in network.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not isinstance(module, AdaptedLinear | AdaptedConv):
                    delattr(module, name)
                    module.register_buffer(name, parameter.detach())
                    frozen.append(f"{prefix}.{name}" if prefix else name)
            if isinstance(module, AdaptedLinear | AdaptedConv):
                frozen += [f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)]
        kind = type(network)
        network.__class__ = type(f"Adapted{kind.__name__}", (_Adapted, kind), {})
        network.lora, network.base, network.frozen_weights = self, base, tuple(frozen)  # type: ignore[assignment]
        return network


class AdaptedLinear(nn.Module):
    """A linear layer whose own weights stay, with an adapter on some of the matrices that are stacked in it.

    Args:
        linear: the layer.
        parts: matrices stacked in its weight (query, key, value).
        chosen: numbers of those with an adapter.
        rank, alpha: see `LoRA`.
    """

    def __init__(self, linear: nn.Linear, parts: int, chosen: list[int], rank: int, alpha: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.of_maps = isinstance(linear, PointwiseConv)
        self.parts, self.chosen, self.rank, self.scale = parts, chosen, rank, alpha / rank
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach() if linear.bias is not None else None)
        count, device = len(chosen), linear.weight.device
        self.lora_down = nn.Parameter(torch.empty(count * rank, linear.in_features, device=device))
        self.lora_up = nn.Parameter(torch.empty(count * linear.out_features // parts, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features); of a convolution, (n, in_features, H, W) likewise."""
        return self._apply_to(x.movedim(1, -1)).movedim(-1, 1) if self.of_maps else self._apply_to(x)

    def _apply_to(self, x: Tensor) -> Tensor:
        count = len(self.chosen)
        hidden = F.linear(x, self.lora_down).unflatten(-1, (count, self.rank))
        up = self.lora_up.unflatten(0, (count, -1))
        added = self.scale * torch.einsum("...cr,cor->...co", hidden, up)
        own = F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        if count == self.parts:
            return own + added.flatten(-2)
        pieces = list(own.unflatten(-1, (self.parts, -1)).unbind(-2))
        for i, piece in zip(self.chosen, added.unbind(-2), strict=True):
            pieces[i] = pieces[i] + piece
        return torch.cat(pieces, dim=-1)


class AdaptedConv(nn.Module):
    """A 3 x 3 convolution whose own weight stays: beside it one to `rank` channels, then a matrix over pixels.

    Args:
        conv: the convolution.
        rank, alpha: see `LoRA`.
    """

    def __init__(self, conv: Conv, rank: int, alpha: float) -> None:
        super().__init__()
        self.stride, self.scale = conv.stride, alpha / rank
        self.register_buffer("weight", conv.weight.detach())
        self.register_buffer("bias", conv.bias.detach())
        c_out, *inner = conv.weight.shape
        self.lora_down = nn.Parameter(torch.empty(rank, *inner, device=conv.weight.device))
        self.lora_up = nn.Parameter(torch.empty(c_out, rank, device=conv.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """See `Conv.forward`."""
        hidden = convolve(x, self.lora_down, None, self.stride)
        added = F.linear(hidden.movedim(1, -1), self.lora_up).movedim(-1, 1)
        return convolve(x, self.weight, self.bias, self.stride) + self.scale * added  # type: ignore[arg-type]


class _Adapted(nn.Module):
    """What an adapted network does otherwise."""

    lora: LoRA
    base: str
    frozen_weights: tuple[str, ...]

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """See `LoRA.init_parameter`."""
        self.lora.init_parameter(name, tensor, generator)

    @torch.no_grad()
    def init_buffers(self) -> None:
        """Read the network's own weights."""
        super().init_buffers()  # type: ignore[misc]
        folder = ComponentFolder(self.base)
        own = dict(self.named_buffers())
        for name in self.frozen_weights:
            try:
                value = self.from_diffusers(name, folder.read)  # type: ignore[operator]
            except KeyError as error:
                raise ValueError(f"{self.base} lacks {error.args[0]}, which the model to adapt has") from error
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{self.base}: {name} is {tuple(value.shape)} where the model has {tuple(own[name].shape)}"
                )
            own[name].copy_(value)

    def learning_rate_factor(self, name: str) -> float:
        """Of every adapter: 1."""
        return 1.0


@dataclass
class Adapter:
    """Adapters by the names of diffusers' modules.

    Args:
        down, up: A (rank, in) and B (out, rank) of each module; convolutions have two more dimensions.
        alphas: of each module, whose factor is alpha / rank.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    alphas: dict[str, float]

    @classmethod
    def of(cls, network: nn.Module, tensors: Mapping[str, Tensor]) -> "Adapter":
        """Of an adapted network, which may be on the meta device.

        Args:
            tensors: its parameters, by name.
        """
        adapter = cls({}, {}, {})
        for name, module in network.named_modules():
            if not isinstance(module, AdaptedLinear | AdaptedConv):
                continue
            weight = torch.empty_like(module.weight, device="meta")  # type: ignore[arg-type]
            parts = _modules_of(network, f"{name}.weight", weight)
            chosen = module.chosen if isinstance(module, AdaptedLinear) else [0]
            below, above = tensors[f"{name}.lora_down"], tensors[f"{name}.lora_up"]
            if isinstance(module, AdaptedConv):
                below = below.permute(0, 3, 1, 2)
            elif _is_convolution(network, f"{name}.weight", weight):
                below = below[:, :, None, None]
            above = above[:, :, None, None] if below.ndim == 4 else above
            for i, a, b in zip(chosen, below.chunk(len(chosen)), above.chunk(len(chosen)), strict=True):
                adapter.down[parts[i]], adapter.up[parts[i]] = a, b
                adapter.alphas[parts[i]] = network.lora.alpha  # type: ignore[union-attr, assignment]
        return adapter

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Of a denoiser, from a folder or file that holds no others; see `load_adapters`.

        Raises:
            ValueError: see `load_adapters`; there are adapters of text encoders.
        """
        found = load_adapters(folder)
        if found.keys() != {DENOISER}:
            raise ValueError(f"{folder} holds adapters of {', '.join(found)}, and not of a denoiser alone")
        return found[DENOISER]

    @torch.no_grad()
    def merge_into(self, network: nn.Module, scale: float = 1.0) -> None:
        """Add the adapters to a network's own weights.

        Raises:
            ValueError: the network lacks some of the modules, or they are of other sizes.
        """
        assert isinstance(network, Pretrained), f"{type(network).__name__} has no counterpart in diffusers"
        left = set(self.down)
        for name, tensor in network.state_dict().items():
            if not name.endswith(".weight"):
                continue
            shapes = {k: v.shape for k, v in network.to_diffusers(name, tensor.to("meta")).items()}
            if not any(key.removesuffix(".weight") in left for key in shapes):
                continue
            tensor += network.from_diffusers(name, self._reader(shapes, scale)).to(tensor)
            left -= {key.removesuffix(".weight") for key in shapes}
        if left:
            raise ValueError(f"the adapters are for modules that {type(network).__name__} lacks: {some(sorted(left))}")

    @torch.no_grad()
    def merge_into_text(self, model: nn.Module, scale: float = 1.0) -> None:
        """Add the adapters to the weights of a text encoder of transformers.

        Raises:
            ValueError: see `merge_into`.
        """
        left = {_bare(module): module for module in self.down}
        for name, tensor in model.named_parameters():
            if (module := left.pop(_bare(name.removesuffix(".weight")), None)) is not None:
                key = f"{module}.weight"
                tensor.add_(self._reader({key: tensor.shape}, scale)(key).to(tensor))
        if left:
            raise ValueError(f"the adapters are for modules that {type(model).__name__} lacks: {some(sorted(left))}")

    def _reader(self, shapes: Mapping[str, torch.Size], scale: float) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            module = name.removesuffix(".weight")
            if module not in self.down:
                return torch.zeros(shapes[name])
            down, up = self.down[module], self.up[module]
            change = (up.flatten(1).float() @ down.flatten(1).float()) * (scale * self.alphas[module] / len(down))
            if change.numel() != shapes[name].numel():
                raise ValueError(
                    f"the adapter of {module} is for a matrix of {tuple(change.shape)}, not {tuple(shapes[name])}"
                )
            return change.view(shapes[name])

        return read


def _modules_of(network: Any, name: str, weight: Tensor) -> list[str]:
    """diffusers' modules whose matrices lie stacked in our weight."""
    return [part.removesuffix(".weight") for part in network.to_diffusers(name, weight.detach().to("meta"))]


def _is_convolution(network: Any, name: str, weight: Tensor) -> bool:
    """Whether diffusers keeps our weight as a convolution's."""
    return next(iter(network.to_diffusers(name, weight).values())).ndim == 4


def save_adapters(adapters: Mapping[str, Adapter], folder: Path, component: str, base: str) -> None:
    """Write the files that peft and diffusers read: the denoiser's adapters for both, text encoders' for diffusers.

    Args:
        adapters: of `DENOISER`, and of text encoders by their component: "text_encoder", "text_encoder_2" ...
        component: the denoiser's: "unet" or "transformer".
        base: whose adapters they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    for name, adapter in adapters.items():
        part = component if name == DENOISER else name
        named = {
            f"{module}.lora_{side}.weight": tensor.contiguous()
            for side, tensors in (("A", adapter.down), ("B", adapter.up))
            for module, tensor in tensors.items()
        }
        modules = sorted(adapter.down)
        first = modules[0]
        config: dict[str, Any] = {
            **{"r": len(adapter.down[first]), "lora_alpha": adapter.alphas[first], "lora_dropout": 0.0, "bias": "none"},
            "target_modules": sorted(map(_bare, modules)),
        }
        whole |= {f"{part}.{key}": tensor for key, tensor in named.items()}
        told |= {f"{part}.{key}": value for key, value in config.items()}
        if name == DENOISER:
            config |= {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": None, "inference_mode": True}
            write_json(folder / CONFIG_FILE, config | {"rank_pattern": {}, "alpha_pattern": {}})
            save_file({_PEFT_PREFIX + key: t for key, t in named.items()}, folder / PEFT_FILE, {"format": "pt"})
    save_file(whole, folder / DIFFUSERS_FILE, {"format": "pt", _METADATA: json.dumps(told)})


def load_adapters(folder: str | Path) -> dict[str, Adapter]:
    """A folder of peft's or diffusers' layout, or a file of either: adapters of `DENOISER`, and of "text_encoder",
    "text_encoder_2" ... where it holds any.

    Raises:
        ValueError: there is none, or it holds adapters of another kind.
    """
    path = Path(folder)
    file = next((f for f in (path, path / DIFFUSERS_FILE, path / PEFT_FILE) if f.is_file()), None)
    if file is None:
        raise ValueError(f"{path} holds no adapters: neither {PEFT_FILE} nor {DIFFUSERS_FILE}")
    source = open_file(file)
    beside = file.with_name(CONFIG_FILE)
    config = read_json(beside) if beside.is_file() and file.name == PEFT_FILE else _told_in(file)
    found: dict[str, Adapter] = {}
    unknown = []
    for name in source.names():
        component, module = _split(name.removeprefix(_PEFT_PREFIX))
        adapter = found.setdefault(component, Adapter({}, {}, {}))
        for side, tensors in ((".lora_A.weight", adapter.down), (".lora_B.weight", adapter.up)):
            if module.endswith(side):
                tensors[module.removesuffix(side)] = source.read(name).float()
                break
        else:
            if module.endswith(".alpha"):
                adapter.alphas[module.removesuffix(".alpha")] = float(source.read(name))
            else:
                unknown.append(name)
    if unknown or not found or any(one.down.keys() != one.up.keys() or not one.down for one in found.values()):
        raise ValueError(f"{file} is no LoRA in peft's names: it has {some(unknown or source.names())}")
    for component, adapter in found.items():
        prefixes = ("unet.", "transformer.", "") if component == DENOISER else (f"{component}.",)
        keys = ("lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights")
        told = {key: config[p + key] for p in prefixes for key in keys if p + key in config}
        if str(told.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
            raise ValueError(
                f"{file}: init_lora_weights is {told['init_lora_weights']!r}, which changes the weights that"
                " adapters are added to; save it with peft's path_initial_model_for_weight_conversion, as a plain LoRA"
            )
        for module, down in adapter.down.items():
            if module not in adapter.alphas:
                own = _matching(told.get("alpha_pattern") or {}, module, file)
                adapter.alphas[module] = float(told.get("lora_alpha", len(down)) if own is None else own)
            if told.get("use_rslora"):
                # Rank-stabilized (Kalajdzievski 2023, arXiv 2312.03732): alpha / sqrt(rank), which is told as an alpha.
                adapter.alphas[module] *= len(down) ** 0.5
    return found


def _matching(patterns: Mapping[str, float], module: str, file: Path) -> float | None:
    """What peft's patterns say of a module: regular expressions of its name or of an end after a dot; the first counts.

    Raises:
        ValueError: one is none.
    """
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"{file}: alpha_pattern {pattern!r} is no regular expression: {error}") from error
    return None


def _split(name: str) -> tuple[str, str]:
    """Component and module of a tensor's name in a file."""
    first, _, rest = name.partition(".")
    if first.startswith("text_encoder"):
        return first, rest
    return DENOISER, rest if first in ("unet", "transformer") else name


def _told_in(file: Path) -> dict[str, Any]:
    """Settings in the header of a file that diffusers has written."""
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get(_METADATA, "{}"))


def _bare(module: str) -> str:
    """A text encoder's module without "text_model.", which newer releases of transformers leave out."""
    return module.removeprefix("text_model.")
