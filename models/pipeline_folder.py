"""Pipelines in diffusers' layout: a folder with `model_index.json` and one folder for each component."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from models.pretrained import STEM, ComponentFolder
from models.tensor_files import Meta, SafetensorsFiles, open_stem, read_json

INDEX = "model_index.json"
TRANSFORMERS_STEM = "model"


class PipelineFolder:
    """A pipeline's folder.

    Attributes:
        kind: diffusers' class.
        index: what model_index.json says.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not (self.path / INDEX).is_file():
            raise ValueError(f"{self.path} is no diffusers pipeline: it has no {INDEX}")
        self.index: dict[str, Any] = read_json(self.path / INDEX)
        self.kind: str = self.index.get("_class_name", "")

    @property
    def components(self) -> dict[str, str]:
        """The class of each component that is there, by the component's name."""
        entries = {name: value for name, value in self.index.items() if isinstance(value, list) and len(value) == 2}
        return {name: value[1] for name, value in entries.items() if value[1] is not None}

    @property
    def denoiser(self) -> str:
        """The denoiser's component: "transformer" or "unet"."""
        return "transformer" if "transformer" in self.components else "unet"

    @property
    def autoencoder(self) -> str:
        """The first stage's component: "vae", or "vqvae" of latent diffusion's pipelines, whatever it is of the two."""
        return "vqvae" if "vqvae" in self.components else "vae"

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration, whatever its file is called; {} where it has none."""
        for name in ("config.json", "scheduler_config.json", "tokenizer_config.json"):
            if (self.path / component / name).is_file():
                return read_json(self.path / component / name)
        return {}

    def tensors(self, component: str) -> "ComponentTensors | TextModel":
        """A network's tensors, by diffusers' or transformers' names."""
        if is_text(component):
            return TextModel(self.path / component)
        return ComponentTensors(self.path / component)


class ComponentTensors:
    """A diffusers component as a source of tensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = ComponentFolder(folder)

    def names(self) -> list[str]:
        """Today's names."""
        return list(self._folder.names)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._folder.read(name)

    def meta(self, name: str) -> Meta:
        """See `TensorSource`."""
        return self._folder.files.meta(self._folder.names[name])


class TextModel:
    """A text encoder of transformers as a source of tensors, by the names of published files: newer releases of
    transformers leave out "text_model." where it stands before all."""

    stem = TRANSFORMERS_STEM

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _files(self) -> SafetensorsFiles:
        return open_stem(self._folder, self.stem)

    @cached_property
    def _own(self) -> dict[str, str]:
        own = self._files.names()
        bare = any(name.startswith("embeddings.") for name in own)
        return {f"text_model.{name}" if bare else name: name for name in own if not name.endswith(".position_ids")}

    def names(self) -> list[str]:
        """Names of published files."""
        return list(self._own)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._files.read(self._own[name])

    def meta(self, name: str) -> Meta:
        """See `TensorSource`."""
        return self._files.meta(self._own[name])


def stem_of(component: str) -> str:
    """How a component's files of weights begin."""
    return TRANSFORMERS_STEM if is_text(component) else STEM


def is_network(component: str) -> bool:
    """Whether a component of the pipelines that are known holds weights that count."""
    return component in ("unet", "transformer", "vae", "vqvae", "class_embedder", "map_embedder") or is_text(component)


def tokenizer_of(component: str) -> str | None:
    """The component of a text encoder's tokenizer; None: it is none."""
    if not is_text(component):
        return None
    return "tokenizer" if component == "bert" else component.replace("text_encoder", "tokenizer")


def is_text(component: str) -> bool:
    """Whether a component is a text encoder, which transformers' classes write: latent diffusion's own is "bert"."""
    return component.startswith("text_encoder") or component == "bert"
