"""Sets of pictures: read from tars or a folder, drawn from prompts, or reconstructed by a first stage.

A set has parts, which ranks share: part p is of rank p mod ranks. What a part's batches hold does not depend on how
many ranks there are, and so neither do the pictures.
"""

import io
import json
import logging
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data.buckets import Bucket, Buckets
from data.cropped import Cropping, read_cropped
from data.decode import DecodeError, decode_image
from data.hashing import mix64, text64
from data.manifest_reader import ManifestReader
from data.selection import Selection, Split
from data.tars import TarData
from data.transforms import CENTER, Framing, frame
from models.guidance import Guidance
from models.samplers import Sampler
from trainer.evaluation.metric import Seen
from trainer.loading import Loaded
from trainer.sampling import Picture, draw_pass

log = logging.getLogger(__name__)

# A part is a batch, or more where there are so many that ranks would still share them evenly.
_PARTS = 64
_LARGEST_PART = 512
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Asked:
    """A picture to draw: its prompt, and its size in pixels."""

    prompt: str
    height: int
    width: int


class PictureSet(ABC):
    """Pictures that can be seen part by part, each as often as wanted.

    Attributes:
        count: how many there are.
        parts: that they are in.
    """

    count: int
    parts: int

    @abstractmethod
    def read(self, part: int) -> Iterator[Seen]:
        """The pictures of a part, in batches of one size."""


class TarPictures(PictureSet):
    """Selected samples of tars, cropped in the middle to their buckets.

    Args:
        data: sources of tars.
        split: of the samples; None takes all that are selected.
        buckets: sizes that pictures are cropped to, each to the one that is nearest in shape.
        batch: pictures that are seen at a time.
        device: that they are seen on.
        limit: so many of them, chosen by a hash; None takes all.
    """

    def __init__(
        self,
        data: TarData,
        split: Split | None,
        buckets: Buckets,
        batch: int,
        device: torch.device,
        limit: int | None = None,
    ) -> None:
        self._data, self._buckets, self._batch, self._device = data, buckets, batch, device
        self._selections = {name: data.select(name, split) for name in data.sources}
        self._parts: list[tuple[str, int, np.ndarray, int]] = []
        self.count = 0
        for name, positions in self._chosen(limit).items():
            for shard, rows in _by_shard(self._selections[name], positions):
                step = batch * _batches_per_part(len(rows), batch)
                for start in range(0, len(rows), step):
                    part = rows[start : start + step]
                    self._parts.append((name, shard, part, self.count))
                    self.count += len(part)
        self.parts = len(self._parts)

    def read(self, part: int) -> Iterator[Seen]:
        name, shard, rows, number = self._parts[part]
        source = self._data.sources[name]
        red, green, blue = source.background
        column = next(iter(source.captions))
        cropping = Cropping(self._buckets, False, (red, green, blue), self._data.max_pixels)
        manifest = self._data.manifests(name)[shard]
        threads = max(1, self._data.workers)
        for samples in read_cropped(manifest, rows, self._data.store, [column], cropping, self._batch, threads):
            sizes: dict[tuple[int, ...], list[tuple[int, Tensor, str]]] = {}
            for sample in samples:
                if sample.images is None:
                    log.warning("%s, sample %s: %s; it is left out", manifest.shard, sample.key, sample.error)
                else:
                    shape = tuple(sample.images.shape)
                    sizes.setdefault(shape, []).append((number, sample.images[0], sample.captions[column]))
                number += 1
            for alike in sizes.values():
                numbers, images, captions = zip(*alike, strict=True)
                yield Seen(numbers, torch.stack(images).to(self._device), captions)

    def asked(self, count: int) -> list[Asked]:
        """Captions of so many of them, chosen by a hash, each with its bucket's size; again from the first where there
        are fewer."""
        found: list[Asked] = []
        for name, positions in self._chosen(count).items():
            selection, source = self._selections[name], self._data.sources[name]
            column = next(iter(source.captions))
            reader = ManifestReader(self._data.store, selection.manifests, selection.digests)
            indices = self._buckets.assign(selection.width[positions], selection.height[positions])
            captions: list[str] = []
            for shard, rows in _by_shard(selection, positions):
                captions += [text or "" for text in reader.rows(shard, rows, [column])[column]]
            for caption, index in zip(captions, indices.tolist(), strict=True):
                found.append(Asked(caption, self._buckets[index].height, self._buckets[index].width))
        return [found[i % len(found)] for i in range(count)]

    def sizes(self) -> Iterator[tuple[str, int, int]]:
        """Shard, width and height of every sample, in order."""
        for selection in self._selections.values():
            for shard, url in enumerate(selection.shards):
                part = slice(selection.shard_offsets[shard], selection.shard_offsets[shard + 1])
                for width, height in zip(selection.width[part], selection.height[part], strict=True):
                    yield url, int(width), int(height)

    @property
    def fingerprint(self) -> str:
        """Of the samples and their order."""
        return " ".join(selection.fingerprint for selection in self._selections.values())

    def _chosen(self, limit: int | None) -> dict[str, np.ndarray]:
        """By source, positions in its selection, ascending."""
        lengths = {name: len(selection) for name, selection in self._selections.items()}
        if limit is None or limit >= sum(lengths.values()):
            return {name: np.arange(length) for name, length in lengths.items()}
        source_of = np.repeat(np.arange(len(lengths)), list(lengths.values()))
        position_of = np.concatenate([np.arange(length) for length in lengths.values()])
        names = np.array([text64(name) for name in lengths], dtype=np.uint64)
        first = np.argsort(mix64(0, names[source_of], position_of), kind="stable")[:limit]
        return {name: np.sort(position_of[first[source_of[first] == i]]) for i, name in enumerate(lengths)}


class FolderPictures(PictureSet):
    """The pictures in a folder and those below it, by name; the `.txt` beside a picture is its caption.

    Args:
        folder: of them.
        size: height and width that they are cropped to, in the middle; None refuses those of another size than the
            first.
        batch, device: see `TarPictures`.
        limit: so many of them, evenly spread; None takes all.

    Raises:
        ValueError: there is none.
    """

    def __init__(
        self, folder: Path, size: tuple[int, int] | None, batch: int, device: torch.device, limit: int | None = None
    ) -> None:
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file())
        # Sheets that `millrace sample` writes beside its pictures.
        self._paths = [path for path in found if path.name != "grid.png"]
        if not self._paths:
            raise ValueError(f"{folder} has neither tars nor pictures ({', '.join(_PICTURES)})")
        if limit is not None and limit < len(self._paths):
            self._paths = [self._paths[i * len(self._paths) // limit] for i in range(limit)]
        self._strict = size is None
        self.size = size or _size_of(self._paths[0])
        self._batch, self._device, self.count = batch, device, len(self._paths)
        step = batch * _batches_per_part(self.count, batch)
        self._starts = [(start, min(start + step, self.count)) for start in range(0, self.count, step)]
        self.parts = len(self._starts)

    def read(self, part: int) -> Iterator[Seen]:
        first, end = self._starts[part]
        with ThreadPoolExecutor(4) as pool:
            for start in range(first, end, self._batch):
                numbers = range(start, min(start + self._batch, end))
                images = list(pool.map(self._read, (self._paths[i] for i in numbers)))
                captions = [self.caption(i) for i in numbers]
                yield Seen(list(numbers), torch.stack(images).to(self._device), captions)

    def caption(self, number: int) -> str:
        """Of a picture; "" without one."""
        beside = self._paths[number].with_suffix(".txt")
        return beside.read_text().strip() if beside.is_file() else ""

    def asked(self, count: int) -> list[Asked]:
        """See `TarPictures.asked`."""
        return [Asked(self.caption(i % self.count), *self.size) for i in range(count)]

    @property
    def fingerprint(self) -> str:
        """Of names, sizes and times of the files."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return f"{text64(json.dumps(stats)):016x}"

    def _read(self, path: Path) -> Tensor:
        try:
            decoded = decode_image(path.read_bytes(), cover=self.size)
        except DecodeError as error:
            raise ValueError(f"{path}: {error}") from error
        if self._strict and decoded.original_size != self.size:
            raise ValueError(
                f"{path} is of {decoded.original_size[1]} x {decoded.original_size[0]} pixels, and {self._paths[0]} of"
                f" {self.size[1]} x {self.size[0]}: give height= and width= for all to be cropped to one size"
            )
        image = torch.empty((3, *self.size), dtype=torch.uint8)
        frame(decoded.pixels, self.size, Framing(CENTER, CENTER, flip=False), image)
        return image


class DrawnPictures(PictureSet):
    """Pictures of prompts: the number of a picture gives its noise, so that it is the same on any number of ranks.

    Args:
        asked: what to draw.
        picture: of a number and a seed, the picture in full, where more is read than a prompt.
        seed: of the first picture; the next takes seed + 1.
        loaded: the model, its networks in place.
        sampler, guidance: how to draw.
        batch: pictures in one pass.
        device: of the networks.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        picture: Callable[[int, int], Picture] | None,
        seed: int,
        loaded: Loaded,
        sampler: Sampler,
        guidance: Guidance,
        batch: int,
        device: torch.device,
    ) -> None:
        self._asked, self._seed, self._loaded = asked, seed, loaded
        self._picture = picture or self._of_prompt
        self._sampler, self._guidance, self._device = sampler, guidance, device
        self.count = len(asked)
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(asked):
            by_size.setdefault((one.height, one.width), []).append(number)
        batches = [part[i : i + batch] for part in by_size.values() for i in range(0, len(part), batch)]
        step = _batches_per_part(self.count, batch)
        self._parts = [batches[i : i + step] for i in range(0, len(batches), step)]
        self.parts = len(self._parts)

    def read(self, part: int) -> Iterator[Seen]:
        for numbers in self._parts[part]:
            pictures = [self._picture(number, self._seed + number) for number in numbers]
            with torch.no_grad():
                images = draw_pass(
                    self._loaded.networks, self._loaded.process, self._sampler, self._guidance, pictures, self._device
                )
            yield Seen(numbers, torch.stack(images).to(self._device), [picture.prompt for picture in pictures])

    def _of_prompt(self, number: int, seed: int) -> Picture:
        asked = self._asked[number]
        return Picture(asked.prompt, seed, asked.height, asked.width)


class KeptPictures(PictureSet):
    """Pictures that are written to tars as they are drawn, a tar for each part, and read from there the next time.

    Args:
        drawn: the pictures.
        folder: of the tars.
        device: that they are seen on.
    """

    def __init__(self, drawn: PictureSet, folder: Path, device: torch.device) -> None:
        self._drawn, self._folder, self._device = drawn, folder, device
        self.count, self.parts = drawn.count, drawn.parts

    def read(self, part: int) -> Iterator[Seen]:
        path = self._folder / f"{part:05d}.tar"
        if path.exists():
            yield from self._kept(path)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        with tarfile.open(scratch, "w") as tar:
            for batch, seen in enumerate(self._drawn.read(part)):
                for number, image, caption in zip(seen.numbers, seen.images.cpu(), seen.captions, strict=True):
                    told = json.dumps({"caption": caption, "number": number, "batch": batch})
                    members = {"png": _png(image), "txt": caption.encode(), "json": told.encode()}
                    for extension, data in members.items():
                        member = tarfile.TarInfo(f"{number:06d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                yield seen
        scratch.replace(path)  # whole, or not at all

    def _kept(self, path: Path) -> Iterator[Seen]:
        batches: dict[int, list[tuple[int, Tensor, str]]] = {}
        with tarfile.open(path) as tar:
            members: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                members.setdefault(key, {})[extension] = file.read()
        for sample in members.values():
            told = json.loads(sample["json"])
            image = torch.from_numpy(decode_image(sample["png"]).pixels).permute(2, 0, 1)
            batches.setdefault(told["batch"], []).append((told["number"], image, told["caption"]))
        for alike in batches.values():
            numbers, images, captions = zip(*alike, strict=True)
            yield Seen(numbers, torch.stack(images).to(self._device), captions)


class ReconstructedPictures(PictureSet):
    """What a first stage makes of pictures, by way of its latents' means; each with its original.

    Args:
        originals: the pictures.
        first_stage: in place.
    """

    def __init__(self, originals: PictureSet, first_stage: nn.Module) -> None:
        self._originals, self._first_stage = originals, first_stage
        self.count, self.parts = originals.count, originals.parts

    def read(self, part: int) -> Iterator[Seen]:
        for seen in self._originals.read(part):
            with torch.no_grad():
                latents = self._first_stage.encode(seen.images.float() / 127.5 - 1)  # type: ignore[operator]
                images = self._first_stage.decode(latents)  # type: ignore[operator]
            quantized = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            yield Seen(seen.numbers, quantized, seen.captions, seen.images)


def one_size(pictures: TarPictures) -> tuple[int, int]:
    """The height and width of all pictures of a set.

    Raises:
        ValueError: they differ.
    """
    sizes = pictures.sizes()
    first, width, height = next(sizes)
    for shard, *other in sizes:
        if other != [width, height]:
            raise ValueError(
                f"{shard} has a picture of {other[0]} x {other[1]} pixels, and {first} one of {width} x {height}: give"
                " height= and width= for all to be cropped to one size"
            )
    return height, width


def single_bucket(size: tuple[int, int]) -> Buckets:
    """All pictures in one size."""
    return Buckets([Bucket(*size)])


def _batches_per_part(count: int, batch: int) -> int:
    batches = -(-count // batch)
    return max(1, min(batches // _PARTS, _LARGEST_PART // batch))


def _by_shard(selection: Selection, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Shards and their rows, for positions in ascending order."""
    by_shard: dict[int, list[int]] = {}
    for shard, row in selection.locate(positions):
        by_shard.setdefault(shard, []).append(row)
    for shard, found in by_shard.items():
        yield shard, np.array(found)


def _size_of(path: Path) -> tuple[int, int]:
    try:
        return decode_image(path.read_bytes()).original_size
    except DecodeError as error:
        raise ValueError(f"{path}: {error}") from error


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
