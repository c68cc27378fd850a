"""What a sample comes with beside its picture and caption, taken from its tar's members or its manifest's columns: a
class, a number, boxes, a second picture, a map of labels, a mask.

What lies in a picture goes where the picture goes: it is resized, cropped and mirrored with it. A field that is missing
or cannot be read is an error of content, as a damaged picture is.
"""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.buckets import Bucket
from data.decode import MAX_PIXELS, DecodeError, decode_image
from data.describe import standard_name
from data.manifest import Manifest
from data.masks import LargeMasks
from data.members import ContentError
from data.store import Store
from data.transforms import CENTER, Framing, Geometry, covering_size, place, resize
from models.layout import WHOLE, Corners, Layout


@dataclass(frozen=True)
class Origin:
    """Of what a field's value is made.

    Args:
        columns: values of the manifest and of scores, by column.
        member: the bytes of the sample's member with an extension; raises ContentError where there is none.
        geometry: where the sample's picture went.
        seed: of what is random about the field, by purpose.
    """

    columns: Mapping[str, Any]
    member: Callable[[str], bytes]
    geometry: Geometry
    seed: Callable[[str], int]

    def column(self, name: str) -> Any:
        """The value of a column.

        Raises:
            ContentError: it is empty.
        """
        value = self.columns.get(name)
        if value is None:
            raise ContentError(f"it has no {name!r}")
        return value


class Field(ABC):
    """One field of samples. The value of a sample is a tensor, a row of the batch's, or an item of the batch's list."""

    @property
    def columns(self) -> list[str]:
        """Of the manifest and of scores, that it reads."""
        return []

    @property
    def optional(self) -> bool:
        """Whether it can do without."""
        return False

    def made_of(self, manifests: Sequence[Manifest], store: Store) -> str | None:
        """What its values are of beside the samples' shards, for a plan to tell; None of nothing else."""
        return None

    def check(self, manifests: Sequence[Manifest], store: Store) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuse columns, beside these manifests, that are not what the field takes them for, in a ConfigError."""

    def shown(self) -> "Field | None":
        """A field whose values show on a contact sheet what this one's are of; None where they can be looked at
        themselves."""
        return None

    @property
    def example(self) -> str:
        """What someone could give on a command line."""
        return "a.png"

    @abstractmethod
    def read(self, origin: Origin) -> Any:
        """A sample's value.

        Raises:
            ContentError: there is none.
        """

    @abstractmethod
    def blank(self, target: tuple[int, int]) -> Any:
        """A value that stands for no sample's, for pictures of that height and width."""

    @abstractmethod
    def given(self, text: str, target: tuple[int, int]) -> Any:
        """The value that someone gives on a command line, for a picture of that height and width.

        Raises:
            ValueError: it is none.
            OSError: there is no such file.
        """


class _Aside(Field):
    """A field of few bytes: a column's value, or a text member's."""

    column: str | None
    member: str | None

    def _check(self) -> None:
        if (self.column is None) == (self.member is None):
            raise ValueError(
                "a field is of a `column` (a key of the JSON, a score) or of a `member` (cls), one of them"
            )

    @property
    def columns(self) -> list[str]:
        return [standard_name(self.column)] if self.column is not None else []

    def _raw(self, origin: Origin) -> Any:
        if self.column is not None:
            return origin.column(standard_name(self.column))
        assert self.member is not None
        return origin.member(self.member).decode(errors="replace").strip()

    @property
    def _name(self) -> str:
        return f".{self.member}" if self.member is not None else repr(self.column)


@dataclass(frozen=True)
class Label(_Aside):
    """A class: a number from 0, or a name.

    Args:
        column: of the manifest: a key of the JSON.
        member: or extension of a text member, such as webdataset's `cls`.
        names: of the classes, in order, where names are told and not numbers.
        classes: how many there are; numbers beyond are refused.
    """

    column: str | None = None
    member: str | None = None
    names: list[str] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        self._check()

    @property
    def example(self) -> str:
        return self.names[0] if self.names else "0"

    def read(self, origin: Origin) -> Tensor:
        try:
            return torch.tensor(label_of(self._raw(origin), self.names, self.classes))
        except ValueError as error:
            raise ContentError(f"its {self._name} {error}") from error

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.tensor(0)

    def given(self, text: str, target: tuple[int, int]) -> Tensor:
        return torch.tensor(label_of(text, self.names, self.classes))


def label_of(value: Any, names: Sequence[str] | None, classes: int | None = None) -> int:
    """The number of a class, told by its number or its name.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str) and names is not None and value in names:
        return names.index(value)
    try:
        number = int(value)
        known = number == float(value) and 0 <= number < (classes or 1 << 62)
    except (TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"is {value!r}, which is no class")
    return number


@dataclass(frozen=True)
class Number(_Aside):
    """A number, such as an aesthetic score.

    Args:
        column, member: as in `Label`; a score's column, too.
        default: of samples without one; None refuses them.
    """

    column: str | None = None
    member: str | None = None
    default: float | None = None

    def __post_init__(self) -> None:
        self._check()

    @property
    def optional(self) -> bool:
        return self.default is not None

    @property
    def example(self) -> str:
        return "0.5"

    def read(self, origin: Origin) -> Tensor:
        if self.default is not None and self.column is not None and origin.columns.get(self.columns[0]) is None:
            return torch.tensor(self.default)
        value = self._raw(origin)
        try:
            return torch.tensor(float(value))
        except (TypeError, ValueError) as error:
            raise ContentError(f"its {self._name} is {value!r}, which is no number") from error

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.tensor(0.0)

    def given(self, text: str, target: tuple[int, int]) -> Tensor:
        return torch.tensor(float(text))


@dataclass(frozen=True)
class Boxes(_Aside):
    """Objects with labels, as a `Layout`: a list of objects with a box and a label each, or of lists of five.

        [{"bbox": [x, y, width, height], "category_id": 3}, ...]      or      [[x, y, width, height, 3], ...]

    Boxes are clipped to the crop, and dropped where nothing of them is left.

    Args:
        column: of the manifest: a key of the JSON.
        member: or extension of a member with such a list as JSON, such as `boxes.json`.
        box, label: keys of an object.
        form: what a box tells: "xywh" left, top, width and height; "xyxy" left, top, right and bottom.
        relative: whether from 0 to 1; else in pixels of the upright original.
        names, classes: as in `Label`.
    """

    column: str | None = None
    member: str | None = None
    box: str = "bbox"
    label: str = "category_id"
    form: Literal["xywh", "xyxy"] = "xywh"
    relative: bool = False
    names: list[str] | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        self._check()

    @property
    def example(self) -> str:
        return "a.json"

    def read(self, origin: Origin) -> Layout:
        try:
            return self._framed(self._parsed(self._raw(origin)), origin.geometry)
        except ValueError as error:
            raise ContentError(f"its {self._name} {error}") from error

    def blank(self, target: tuple[int, int]) -> Layout:
        return Layout()

    def given(self, text: str, target: tuple[int, int]) -> Layout:
        """Of a file with such a list, or of the list itself; boxes are within the picture that is drawn."""
        if not text.lstrip().startswith("["):
            text = Path(text).read_text(encoding="utf-8")
        return self._framed(self._parsed(text), Geometry(target, target, (0, 0), target, flip=False))

    def _parsed(self, raw: Any) -> list[tuple[int, list[float]]]:
        told = json.loads(raw) if isinstance(raw, str) else raw
        if not isinstance(told, list):
            raise ValueError("is no list of boxes")
        found = []
        for one in told:
            if not isinstance(one, dict | list):
                raise ValueError(f"has {one!r} in the place of an object with a box and a label")
            box, label = (one.get(self.box), one.get(self.label)) if isinstance(one, dict) else (one[:4], one[4:])
            label = label[0] if isinstance(label, list) and label else label
            if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
                raise ValueError(f"has an object without four numbers as its {self.box!r}: {one!r}")
            found.append((label_of(label, self.names, self.classes), [float(x) for x in box]))
        return found

    def _framed(self, objects: list[tuple[int, list[float]]], geometry: Geometry) -> Layout:
        labels, boxes = [], []
        for label, box in objects:
            if (framed := self._frame(box, geometry)) is not None:
                labels.append(label)
                boxes.append(framed)
        (top, left), (rows, columns), (height, width) = geometry.crop, geometry.target, geometry.resized
        crop = (left / width, top / height, (left + columns) / width, (top + rows) / height)
        return Layout(tuple(labels), tuple(boxes), crop if geometry.resized != geometry.target else WHOLE)

    def _frame(self, box: Sequence[float], geometry: Geometry) -> Corners | None:
        """The box within the crop; None where it lies outside."""
        left, top, right, bottom = box
        if self.form == "xywh":
            right, bottom = left + right, top + bottom
        height, width = (1, 1) if self.relative else geometry.original_size
        left, right, top, bottom = left / width, right / width, top / height, bottom / height
        if geometry.flip:
            left, right = 1 - right, 1 - left
        (crop_top, crop_left), (rows, columns), (tall, wide) = geometry.crop, geometry.target, geometry.resized
        left, right = (min(max((x * wide - crop_left) / columns, 0.0), 1.0) for x in (left, right))
        top, bottom = (min(max((y * tall - crop_top) / rows, 0.0), 1.0) for y in (top, bottom))
        return (left, top, right, bottom) if left < right and top < bottom else None


class _Aligned(Field):
    """A picture that shows what the sample's own shows, pixel by pixel."""

    member: str

    def read(self, origin: Origin) -> Tensor:
        try:
            pixels = self._decoded(origin.member(self.member), origin.geometry.target)
        except DecodeError as error:
            raise ContentError(f"its .{self.member}: {error}") from error
        geometry = origin.geometry
        size = (pixels.shape[0], pixels.shape[1])
        own = covering_size(*size, geometry.target)
        if max(abs(a - b) for a, b in zip(own, geometry.resized, strict=True)) > 1:  # more than rounding
            height, width = geometry.original_size
            raise ContentError(
                f"its .{self.member} has another shape than its picture: {size[0]}x{size[1]}, {height}x{width}"
            )
        return geometry.cut(self._resized(pixels, geometry.resized)).contiguous()

    def given(self, text: str, target: tuple[int, int]) -> Tensor:
        """Of a picture's file, its middle as in training."""
        pixels = self._decoded(Path(text).read_bytes(), target)
        geometry = place((pixels.shape[0], pixels.shape[1]), target, Framing(CENTER, CENTER, flip=False))
        return geometry.cut(self._resized(pixels, geometry.resized)).contiguous()

    @abstractmethod
    def _decoded(self, data: bytes, cover: tuple[int, int]) -> np.ndarray:
        """Its pixels, (h, w) or (h, w, 3), perhaps fewer as long as they cover that size; raises DecodeError."""

    @abstractmethod
    def _resized(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        """In another size, (*size) or (3, *size)."""


@dataclass(frozen=True)
class Picture(_Aligned):
    """A second picture, (3, H, W) uint8, resized as the first is.

    Args:
        member: its extension, such as `depth.png`.
    """

    member: str

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(3, *target, dtype=torch.uint8)

    def _decoded(self, data: bytes, cover: tuple[int, int]) -> np.ndarray:
        return decode_image(data, cover).pixels

    def _resized(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        return resize(pixels, size)


@dataclass(frozen=True)
class LabelMap(_Aligned):
    """A label for every pixel, (H, W) int16: the grey values, or the palette's numbers, of a picture without loss.

    Args:
        member: its extension, such as `seg.png`.
    """

    member: str

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(*target, dtype=torch.int16)

    def _decoded(self, data: bytes, cover: tuple[int, int]) -> np.ndarray:
        return _numbers(data, ("L", "P", "1", "I;16", "I"))

    def _resized(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        return _nearest(torch.from_numpy(pixels.astype(np.int16)), size)


@dataclass(frozen=True)
class Mask(_Aligned):
    """Where a picture's hole is, (H, W) bool: where the mask is lighter than half.

    Args:
        member: its extension, such as `mask.png`.
    """

    member: str

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(*target, dtype=torch.bool)

    def _decoded(self, data: bytes, cover: tuple[int, int]) -> np.ndarray:
        return decode_image(data).pixels[:, :, 0]

    def _resized(self, pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
        return _nearest(torch.from_numpy(pixels >= 128), size)


@dataclass(frozen=True)
class DrawnMask(Field):
    """A hole drawn at random for each sample and step, (H, W) bool.

    Args:
        masks: how they are drawn.
    """

    masks: LargeMasks = field(default_factory=LargeMasks)

    def read(self, origin: Origin) -> Tensor:
        return torch.from_numpy(self.masks.draw(*origin.geometry.target, origin.seed("mask")))

    def blank(self, target: tuple[int, int]) -> Tensor:
        return torch.zeros(*target, dtype=torch.bool)

    def given(self, text: str, target: tuple[int, int]) -> Tensor:
        """Of a mask's file."""
        return Mask("mask").given(text, target)


def _numbers(data: bytes, modes: Sequence[str]) -> np.ndarray:
    """The numbers of a picture's pixels, (h, w), as they are stored."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "TIFF", "GIF", "WEBP", "PPM")) as image:
            if image.height * image.width > MAX_PIXELS:
                raise DecodeError(f"image of {image.width} x {image.height} pixels is too large")
            if image.mode not in modes:
                raise DecodeError(f"a map of labels is grey or has a palette, and this is {image.mode}")
            return np.array(image)
    except DecodeError:
        raise
    except Exception as error:  # see data.decode
        raise DecodeError(f"cannot decode map of {len(data)} bytes: {type(error).__name__}") from error


def _nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """A map (h, w) in another size, of each place the value at its middle."""
    rows, columns = (
        ((torch.arange(new) + 0.5) * old / new).long().clamp(max=old - 1)
        for new, old in zip(size, values.shape, strict=True)
    )
    return values[rows[:, None], columns]


def blank_fields(fields: Mapping[str, Field], size: int, bucket: Bucket) -> dict[str, Tensor | list]:
    """`Batch.fields` of samples that stand for none."""
    return {name: collate([one.blank((bucket.height, bucket.width))] * size) for name, one in fields.items()}


def collate(values: list) -> Tensor | list:
    """Values of several samples as a batch has them."""
    return torch.stack(values) if isinstance(values[0], Tensor) else values
