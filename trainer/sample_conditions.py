"""What `millrace sample` is given to draw pictures of: prompts, pictures, fields, sizes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from conf.errors import ConfigError
from data.decode import Decoded, DecodeError, decode_image
from data.fields import Field, Mask, Number
from data.fields import Picture as PictureField
from models.conditioner import Conditioner, ConditionMap
from models.conditions import LowResolution, MaskedPicture, PictureMap
from trainer.loading import Loaded
from trainer.sample_neighbours import NeighbourReader, neighbour_fields
from trainer.sampling import Picture

Map = TypeVar("Map", bound=ConditionMap)

Asked = dict[str, str]
"""What one picture is drawn of: "prompt", "image" and fields, as they were given."""

_NAMES = {"captions": "prompt", "images": "image"}


def asked_for(config: Any, loaded: Loaded) -> list[Asked]:
    """What each picture is drawn of.

    Raises:
        ConfigError: there is nothing, or as many of one as cannot go with another, or what the model does not read.
    """
    prompts = list(config.prompts)
    if config.prompts_file:
        prompts += [line.strip() for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
    columns = {"prompt": prompts, "image": list(config.images)}
    columns |= {name: [str(value) for value in values] for name, values in config.fields.items()}
    columns = {name: values for name, values in columns.items() if values}
    conditioner = loaded.networks["conditioner"]
    neighbours = neighbour_fields(loaded)
    if neighbours and "prompt" in columns and "captions" not in cast(Conditioner, conditioner).reads:
        columns = dict.fromkeys(neighbours, columns["prompt"]) | columns
    if "image" in columns and not getattr(conditioner, "reads_images", False):
        raise ConfigError(f"images: no encoder of {loaded.source} reads pictures; leave them out.")
    reads = _reads(loaded)
    if not columns and not neighbours and reads:
        raise ConfigError(f"there is nothing to draw: give {', '.join(reads.values())}.")
    number = max((len(values) for values in columns.values()), default=1)
    for name, values in columns.items():
        if len(values) not in (1, number):
            most = next(other for other, of_other in columns.items() if len(of_other) == number)
            raise ConfigError(
                f"there are {len(values)} {_key(name)} and {number} {_key(most)}: give as many, or one of either."
            )
    return [{name: values[i % len(values)] for name, values in columns.items()} for i in range(number)]


def _reads(loaded: Loaded) -> dict[str, str]:
    """What a model reads, as `asked_for` names it, and how each is given."""
    conditioner = loaded.networks["conditioner"]
    told = {"prompt": "prompts=['a red circle'] or prompts_file=<a prompt a line>", "image": "images=[a.png]"}
    if not isinstance(conditioner, Conditioner):
        return {"prompt": told["prompt"]}
    found = {}
    of_encoders = [_NAMES.get(encoder.reads, encoder.reads) for encoder in conditioner.numbered()]
    for name in [*of_encoders, *_reads_of_maps(loaded)]:
        example = loaded.fields[name].example if name in loaded.fields else "a.png"
        found[name] = told.get(name, f"fields.{name}=[{example}]")
    return found


def _reads_of_maps(loaded: Loaded) -> list[str]:
    """What no picture is drawn without, as `asked_for` names it."""
    conditioner = loaded.networks["conditioner"]
    maps = conditioner.map_list() if isinstance(conditioner, Conditioner) else []
    names = [name for one in maps for name in ((one.field,) if isinstance(one, LowResolution) else one.reads)]
    return [_NAMES.get(name, name) for name in names]


def _key(name: str) -> str:
    return f"{name}s" if name in ("prompt", "image") else f"fields.{name}"


def size_of(config: Any, loaded: Loaded, asked: Sequence[Asked]) -> tuple[int, int]:
    """Height and width to draw: as asked, or what a low-resolution picture is enlarged to, or those of training."""
    size = loaded.size
    if (map_ := map_of(loaded.networks["conditioner"], LowResolution)) is not None and map_.field in asked[0]:
        height, width = _read(asked[0][map_.field]).original_size
        unit = math.lcm(map_.factor, 8 * loaded.networks["first_stage"].downsampling)  # type: ignore[operator]
        size = (max(unit, height * map_.factor // unit * unit), max(unit, width * map_.factor // unit * unit))
    return config.height or size[0], config.width or size[1]


def map_of(conditioner: nn.Module, kind: type[Map]) -> Map | None:
    """The conditioner's map of a kind."""
    maps = conditioner.map_list() if isinstance(conditioner, Conditioner) else []
    return next((one for one in maps if isinstance(one, kind)), None)


class ConditionReader:
    """Reads what pictures are drawn of.

    Args:
        config: of the `sample` job.
        loaded: what is sampled from.
        size: height and width to draw.
        refiner: of what is drawn, whose fields pictures come with, too.
    """

    def __init__(self, config: Any, loaded: Loaded, size: tuple[int, int], refiner: Loaded | None = None) -> None:
        self._size, self._source = size, loaded.source
        self._needed = {name: how for name, how in _reads(loaded).items() if name in _reads_of_maps(loaded)}
        self._sizes: dict[str, Any] = {key: _pair(config, key) for key in ("crop", "original_size", "target_size")}
        self._fields = dict(loaded.fields)
        self._neighbours = NeighbourReader(config, loaded)
        self._fields |= self._neighbours.fields
        self._targets: dict[str, tuple[int, int]] = {}
        if (map_ := map_of(loaded.networks["conditioner"], LowResolution)) is not None:
            self._fields |= {map_.field: PictureField(""), map_.level_field: Number(member="")}
            self._targets[map_.field] = (size[0] // map_.factor, size[1] // map_.factor)
        if (edited := map_of(loaded.networks["conditioner"], PictureMap)) is not None:
            self._fields.setdefault(edited.reads[0], PictureField(""))
        if (masked := map_of(loaded.networks["conditioner"], MaskedPicture)) is not None:
            self._fields.setdefault(masked.field, Mask(""))
        for one in [loaded] + ([refiner] if refiner is not None else []):
            sizes = getattr(one.networks["conditioner"], "sizes", None)
            score = {sizes.aesthetic: Number(member="")} if sizes is not None and sizes.aesthetic is not None else {}
            self._fields = {**score, **one.fields, **self._fields}
        self._values: dict[tuple[str, str], Any] = {}

    def completed(self, asked: Asked, seed: int) -> Asked:
        """What a picture is drawn of, where nothing is asked for: pseudo-queries."""
        return asked or self._neighbours.drawn(seed)

    def picture(self, asked: Asked, seed: int) -> Picture:
        """A picture to draw.

        Raises:
            ConfigError: it comes with what the model does not read, or without what it draws nothing without.
        """
        fields = {name: self.value(name, text) for name, text in asked.items() if name not in ("prompt", "image")}
        if missing := [how for name, how in self._needed.items() if name not in asked]:
            raise ConfigError(f"{self._source} draws nothing without it: give {', '.join(missing)}.")
        image = self.image("image", asked["image"]) if "image" in asked else None
        return Picture(asked.get("prompt", ""), seed, *self._size, image, fields, **self._sizes)

    def image(self, key: str, path: str) -> Tensor:
        """The middle of a picture, (3, H, W) uint8; `key` of the config names it."""
        return self._read(key, path, PictureField(""), self._size)

    def mask(self, key: str, path: str) -> Tensor:
        """The middle of a mask, (H, W) bool."""
        return self._read(key, path, Mask(""), self._size)

    def value(self, name: str, text: str) -> Any:
        """A field's value, in a text or in the file that it names."""
        if name not in self._fields:
            there = ", ".join(self._fields) or "none"
            raise ConfigError(f"fields.{name}: the model was trained without such a field; it has {there}.")
        return self._read(f"fields.{name}", text, self._fields[name], self._targets.get(name, self._size))

    def _read(self, key: str, text: str, kind: Field, target: tuple[int, int]) -> Any:
        if (key, text) not in self._values:
            try:
                self._values[key, text] = kind.given(text, target)
            except (OSError, ValueError) as error:
                raise ConfigError(f"{key}: {text}: {error}.") from error
        return self._values[key, text]


def _pair(config: Any, key: str) -> tuple[int, int] | None:
    """Two numbers of the config, or None."""
    if config[key] is not None and len(config[key]) != 2:
        raise ConfigError(f"{key}={list(config[key])}: it takes two numbers.")
    return cast(tuple[int, int], tuple(config[key])) if config[key] is not None else None


def _read(path: str) -> Decoded:
    try:
        return decode_image(Path(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{path}: {error}.") from error
