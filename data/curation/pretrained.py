"""Models of transformers for filters: from a folder or the Hugging Face hub, safetensors only."""

from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from models.hub import load_weights

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_CHUNK = 1 << 24


def model_folder(model: str) -> Path:
    """The folder of a model: as given, or where its files are once downloaded from the hub.

    Raises:
        ValueError: there is no such folder or model.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no model {model!r}: give a local folder, or a name on the Hugging Face hub that is reachable or "
            f"already downloaded ({error})"
        ) from error


def fingerprint(folder: Path) -> str:
    """A hash of a model's weights, configuration and vocabulary, of their contents alone: not of where they lie."""
    digest = xxhash.xxh3_128()
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def load_model(kind: Any, folder: Path, dtype: Dtype, device: Device) -> Any:
    """A frozen model with its weights, of one of transformers' auto classes. Pickled weights, which could run code, are
    not read.

    Raises:
        ValueError: no safetensors, or they lack some of the model's weights.
    """
    model = load_weights(kind, folder, "", dtype)
    return model.to(find_device(device)).eval().requires_grad_(False)


def find_device(device: Device) -> torch.device:
    """The device: for "auto" the GPU if there is one.

    Raises:
        ValueError: "cuda" where there is none.
    """
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ValueError("device=cuda, but torch finds no GPU on this machine: use device=auto or device=cpu")
    return torch.device("cuda" if found and device != "cpu" else "cpu")
