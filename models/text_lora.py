"""Low-rank adaptation of a conditioner's text encoders; see models/lora.py for the denoiser's.

Adapters go into CLIP's text models, as in diffusers, by the names that transformers gives their matrices. All of the
conditioner's own weights are buffers then, and the adapters its only parameters.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.conditioner import Conditioner
from models.initialization import parameter_generator
from models.lora import AdaptedLinear, Adapter, LoRA
from models.text import published_name

_PLACE = "encoder_modules."


def adapt_text(conditioner: Conditioner, lora: LoRA, seed: int) -> None:
    """Put adapters into a conditioner that is loaded, on the CPU. They begin as nothing beside the weights.

    Args:
        lora: its `text_targets` are ends of the names of what is adapted.
        seed: of the run; all ranks draw the same.

    Raises:
        ValueError: no text encoder has such modules.
    """
    for encoder in conditioner.numbered():
        model: Any = getattr(encoder, "model", None)
        if not type(model).__name__.startswith("CLIPText"):
            continue
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{end}") for end in lora.text_targets):
                model.set_submodule(name, AdaptedLinear(module, 1, [0], lora.rank, lora.alpha))
    if not any(isinstance(module, AdaptedLinear) for module in conditioner.modules()):
        raise ValueError(f"adapter.text_targets={lora.text_targets}: no CLIP text encoder has such modules")
    conditioner.learned, frozen = True, []
    for prefix, module in conditioner.named_modules():
        adapted = isinstance(module, AdaptedLinear)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if adapted:
                drawn = parameter_generator(seed, "conditioner", f"{prefix}.{name}", parameter.device)
                lora.init_parameter(name, parameter, drawn)
            else:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
                frozen.append(f"{prefix}.{name}")
        if adapted:
            frozen += [f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)]
    conditioner.frozen_weights = tuple(frozen)


def text_adapters(tensors: Mapping[str, Tensor], alpha: float) -> dict[int, Adapter]:
    """The adapters of an adapted conditioner's parameters, by the number of the encoder, under published names."""
    found: dict[int, Adapter] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(_PLACE).partition(".model.")
        module, _, side = rest.rpartition(".")
        adapter, module = found.setdefault(int(number), Adapter({}, {}, {})), published_name(module)
        (adapter.down if side == "lora_down" else adapter.up)[module] = tensor
        adapter.alphas[module] = alpha
    return found
