"""Weights in diffusers' layout: a folder with `config.json` and safetensors, whole or in shards with an index.

No pickle is read. A network meets this module through what `Pretrained` lists; everything else about its weights' names
stays beside its architecture.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.autoencoder import AutoencoderKL
from models.mmdit import MMDiT
from models.tensor_files import SHARD_BYTES, Meta, SafetensorsFiles, open_stem, read_json, some, write_json, write_stem
from models.unet import UNet
from models.vq import VQModel

CLASSES: dict[str, type[nn.Module]] = {cls.diffusers_class: cls for cls in (MMDiT, AutoencoderKL, VQModel)}
CLASSES |= dict.fromkeys(("UNet2DConditionModel", "UNet2DModel"), UNet)
STEM = "diffusion_pytorch_model"
# Written where a network did not come from a folder: the release whose layout this is.
DIFFUSERS_VERSION = "0.42.1"


@runtime_checkable
class Pretrained(Protocol):
    """A network with a counterpart in diffusers.

    `config` holds the counterpart's configuration: our constructor's arguments, what of it is fixed here, and any
    further keys that came with a folder. `own_config` are our arguments that it lacks, with the value that it acts by.
    Where an argument means another number there, `diffusers_config()` gives its configuration of ours and the class's
    `arguments(config)` ours of its.
    """

    diffusers_class: str
    own_config: ClassVar[dict[str, Any]]
    config: dict[str, Any]

    def to_diffusers(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name` of `state_dict` under the counterpart's names."""

    def from_diffusers(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor `name` of `state_dict`, made of what `read` gives for the counterpart's names."""


@runtime_checkable
class OfTransformers(Protocol):
    """A network with a counterpart in transformers, under its names there; with a tokenizer of captions."""

    def save(
        self, folder: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, shard_bytes: int
    ) -> None:
        """Write a folder that transformers opens; see the function `save`."""

    def learn_tokenizer(self, captions: Callable[[], Iterable[str]]) -> None:
        """Train the tokenizer from captions, where it is one to be trained and not there yet."""

    def check_tokenizer(self) -> None:
        """Whether there is one for this network.

        Raises:
            ValueError: there is not.
        """


class ComponentFolder:
    """A component's folder, opened lazily: a tensor is read when it is asked for.

    Raises:
        ValueError: no `config.json`, no safetensors, or damaged ones.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not (self.path / "config.json").exists():
            raise ValueError(f"{self.path} is no diffusers component: it has no config.json")
        self.config: dict[str, Any] = read_json(self.path / "config.json")

    @cached_property
    def files(self) -> SafetensorsFiles:
        """The folder's safetensors."""
        return open_stem(self.path, STEM)

    @cached_property
    def names(self) -> dict[str, str]:
        """The name in the files of each tensor, by today's name of it."""
        return {_modern_name(name): name for name in self.files.names()}

    def read(self, name: str) -> Tensor:
        """The tensor `name`, by diffusers' name, on the CPU."""
        return self.files.read(self.names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, unread."""
        return self.files.meta(self.names[name]).shape

    def build(self) -> nn.Module:
        """The network that the configuration describes, unfilled, on torch's default device.

        Raises:
            ValueError: a class or a setting that is not implemented here.
        """
        name = self.config.get("_class_name")
        if name not in CLASSES:
            raise ValueError(f"{self.path}: _class_name is {name!r}; implemented are {sorted(CLASSES)}")
        cls = CLASSES[name]
        parameters = inspect.signature(cls).parameters
        given = getattr(cls, "arguments", dict)(self.config)
        network = cls(**{key: value for key, value in given.items() if key in parameters})
        assert isinstance(network, Pretrained)
        for key, fixed in network.config.items():
            if key in self.config and key not in parameters and self.config[key] != fixed:
                raise ValueError(f"{self.path}: {key} is {self.config[key]!r}, but {name} here has only {fixed!r}")
        network.config = {**self.config, **network.config}
        return network

    def on_meta(self) -> nn.Module:
        """The same on the meta device."""
        with torch.device("meta"):
            return self.build()

    def check(self, network: nn.Module) -> None:
        """Compare the folder's tensors with the network's.

        Raises:
            ValueError: missing or unexpected tensors, or other shapes, by name.
        """
        assert isinstance(network, Pretrained), f"{type(network).__name__} has no counterpart in diffusers"
        expected = {
            key: tuple(meta.shape)
            for name, tensor in network.state_dict().items()
            for key, meta in network.to_diffusers(name, tensor.to("meta")).items()
        }
        missing = [key for key in expected if key not in self.names]
        unexpected = [key for key in self.names if key not in expected]
        shapes = [
            f"{key} {self.shape(key)} where the network has {shape}"
            for key, shape in expected.items()
            if key in self.names and self.shape(key) != shape
        ]
        faults = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
        if any(faults.values()):
            described = "; ".join(f"{fault}: {some(keys)}" for fault, keys in faults.items() if keys)
            raise ValueError(f"{self.path} does not fit {type(network).__name__}: {described}")

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
        """The network, filled."""
        network = self.on_meta()
        network.to(dtype).to_empty(device=device)
        self.fill(network)
        return network

    @torch.no_grad()
    def fill(self, network: nn.Module) -> None:
        """Copy the folder's tensors into the network, one at a time, after `check`."""
        self.check(network)
        assert isinstance(network, Pretrained)
        for name, tensor in network.state_dict().items():
            tensor.copy_(network.from_diffusers(name, self.read))


def load(folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The network of a component's folder, such as `stable-diffusion-3-medium-diffusers/transformer`.

    Raises:
        ValueError: see `ComponentFolder`.
    """
    return ComponentFolder(folder).load(dtype, device)


def save(
    network: nn.Module,
    folder: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a component's folder that diffusers' or transformers' `from_pretrained` reads, replacing the weights of a
    former one.

    Args:
        network: a network with a counterpart; it may be on the meta device if `tensors` are given.
        folder: is made where it does not exist.
        tensors: values by our names, in place of the network's own (an average, a checkpoint).
        dtype: of the file; None keeps each tensor's own.
        shard_bytes: more than this goes into several files.
    """
    if isinstance(network, OfTransformers):
        network.save(folder, network.state_dict() if tensors is None else tensors, dtype, shard_bytes)
        return
    assert isinstance(network, Pretrained)
    state = {name: (tensors or {}).get(name, own).detach() for name, own in network.state_dict().items()}
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ValueError(f"cannot save {type(network).__name__} without values of {some(absent)}")
    path = Path(folder)

    def named(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield from network.to_diffusers(name, tensor).items()

    meta = {name: torch.empty_like(tensor, dtype=dtype, device="meta") for name, tensor in state.items()}
    layout = {key: Meta(tensor.dtype, tuple(tensor.shape)) for key, tensor in named(meta)}
    write_stem(path, STEM, layout, named(state), shard_bytes)

    written: dict[str, Any] = getattr(network, "diffusers_config", lambda: network.config)()
    silent = {key for key, value in network.own_config.items() if written[key] == value}
    config = {
        "_class_name": network.diffusers_class,
        "_diffusers_version": DIFFUSERS_VERSION,
        **{key: value for key, value in written.items() if key not in silent},
    }
    write_json(path / "config.json", config)


def _modern_name(name: str) -> str:
    """Today's name of a tensor: folders of 2022 call attention among pixels otherwise."""
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)", lambda m: m[1] + today[m[2]], name)
