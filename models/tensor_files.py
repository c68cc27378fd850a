"""Files of named tensors, read and written one tensor at a time: safetensors, whole or in shards with an index, and
`torch.save` archives of nothing but tensors."""

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# As safetensors spells types; see its format's page.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
SHARD_BYTES = 10_000_000_000


class Meta(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta").nbytes


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""

    def meta(self, name: str) -> Meta:
        """Its type and shape, unread."""


class SafetensorsFiles:
    """The tensors of some safetensors files, opened lazily.

    Raises:
        ValueError: one of them is missing or damaged.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._paths = list(files)

    @cached_property
    def _files(self) -> dict[str, Any]:
        opened = [_open(path) for path in self._paths]
        return {key: file for file in opened for key in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        """Of all tensors, as the files have them."""
        return list(self._files)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._files[name].get_tensor(name)

    def meta(self, name: str) -> Meta:
        """See `TensorSource`."""
        part = self._files[name].get_slice(name)
        return Meta(_BY_NAME[part.get_dtype()], tuple(part.get_shape()))


class ArchivedTensors:
    """The tensors of a `torch.save` file (.ckpt, .pt, .pth), in "state_dict" if it has one; memory-mapped.

    Raises:
        ValueError: there is more in it than tensors and plain values: such a file could run code, and is not read.
    """

    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than tensors, and reading it could run code: have whoever trusts it save its"
                f" state_dict as safetensors. {str(error).splitlines()[0]}"
            ) from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        while "state_dict" in loaded:
            loaded = loaded["state_dict"]
        self._tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._tensors[name]

    def meta(self, name: str) -> Meta:
        """See `TensorSource`."""
        return Meta(self._tensors[name].dtype, tuple(self._tensors[name].shape))


def open_file(path: Path) -> TensorSource:
    """A single file of tensors.

    Raises:
        ValueError: it is of no kind that is read, or damaged.
    """
    if path.suffix == ".safetensors":
        return SafetensorsFiles([path])
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return ArchivedTensors(path)
    raise ValueError(f"{path} is neither .safetensors nor a torch archive (.ckpt, .pt, .pth, .bin)")


def open_stem(folder: Path, stem: str) -> SafetensorsFiles:
    """The tensors of `stem_files`."""
    return SafetensorsFiles(stem_files(folder, stem))


def stem_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors `<stem>.safetensors` of a folder, or the shards that `<stem>.safetensors.index.json` names; those
    of `variant_of` where there are none.

    Raises:
        ValueError: there are none, or some are missing; see `variant_of`.
    """
    variant = variant_of(folder, stem)
    whole, index = whole_file(folder, stem, variant), index_file(folder, stem, variant)
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    elif whole.exists():
        names = [whole.name]
    else:
        raise ValueError(f"{folder} holds neither {whole.name} nor {index.name} (weights in pickle are never read)")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder} lacks {some(missing)}, which its index names")
    return [folder / name for name in names]


def variant_of(folder: Path, stem: str) -> str | None:
    """The variant, in diffusers' and transformers' word, in which alone a folder has the files of a stem: "fp16" of
    `<stem>.fp16.safetensors`. None: it has them without, or has none at all.

    Raises:
        ValueError: there are several.
    """
    if whole_file(folder, stem).exists() or index_file(folder, stem).exists():
        return None
    # Shards may be called <stem>.fp16-00001-of-00002.safetensors.
    whole, index = r"(?![^.]*-\d+-of-\d+\.)([^.]+)\.safetensors", r"safetensors\.index\.([^.]+)\.json"
    form = re.compile(rf"{re.escape(stem)}\.(?:{whole}|{index})")
    matches = [form.fullmatch(file.name) for file in folder.glob(f"{stem}.*")]
    found = sorted({match[1] or match[2] for match in matches if match is not None})
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds no {stem}.safetensors, but several variants of it, {', '.join(found)}: leave the files of"
            " one of them there"
        )
    return found[0] if found else None


def write_stem(
    folder: Path,
    stem: str,
    layout: Mapping[str, Meta],
    tensors: Iterable[tuple[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors as `<stem>.safetensors`, or as shards with an index, replacing former ones. Beside the files no
    more than a tensor is held.

    Args:
        layout: what will come: types and shapes by name; tensors are stored in this order and in these types.
        tensors: all of them, in any order.
        shard_bytes: more than this goes into several files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = "[0-9]" * 5
    for pattern in (
        f"{stem}.safetensors",
        f"{stem}-{number}-of-{number}.safetensors",
        f"{stem}.safetensors.index.json",
    ):
        for old in folder.glob(pattern):
            old.unlink()
    shards = _shards({name: meta.nbytes for name, meta in layout.items()}, shard_bytes)
    count = len(shards)
    files = (
        [f"{stem}.safetensors"] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in _from1(count)]
    )
    writers = [_Writer(folder / file, {n: layout[n] for n in names}) for file, names in zip(files, shards, strict=True)]
    by_name = {name: writer for writer, names in zip(writers, shards, strict=True) for name in names}
    try:
        for name, tensor in tensors:
            by_name[name].write(name, tensor)
    finally:
        for writer in writers:
            writer.close()
    for writer in writers:
        writer.commit()
    if count > 1:
        total = sum(meta.nbytes for meta in layout.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index_file(folder, stem).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, layout: Mapping[str, Meta], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The same as one file of any name."""
    write_stem(path.parent, path.name.removesuffix(".safetensors"), layout, tensors, shard_bytes=2**63)


class _Writer:
    """A safetensors file whose tensors are written in any order: 8 bytes with the header's length, the header, which is
    JSON, and the values. It has its name only when it is whole."""

    def __init__(self, path: Path, layout: Mapping[str, Meta]) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._layout, self._missing = layout, set(layout)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, meta in layout.items():
            start, end = end, end + meta.nbytes
            header[name] = {"dtype": _DTYPES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = self._partial.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = self._file.tell()

    def write(self, name: str, tensor: Tensor) -> None:
        meta = self._layout[name]
        assert tuple(tensor.shape) == meta.shape, f"{name} is {tuple(tensor.shape)} where {meta.shape} was announced"
        values = tensor.detach().to("cpu", meta.dtype).contiguous().reshape(-1)
        self._file.seek(self._start + self._offsets[name])
        self._file.write(values.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        self._file.close()

    def commit(self) -> None:
        assert not self._missing, f"{self._path} lacks {some(sorted(self._missing))}"
        self._partial.replace(self._path)


def whole_file(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Where the tensors of a stem lie, if in one file."""
    return folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")


def index_file(folder: Path, stem: str, variant: str | None = None) -> Path:
    """Where the shards of a stem are listed."""
    return folder / f"{stem}.safetensors.index.{'json' if variant is None else f'{variant}.json'}"


def read_json(file: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, as diffusers lays it out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n")


def some(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Consecutive names in groups of at most `shard_bytes` (or of a single larger one)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _from1(count: int) -> range:
    return range(1, count + 1)


def _is_zip(path: Path) -> bool:
    """Whether a torch archive is of today's format, which can be mapped into memory."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
