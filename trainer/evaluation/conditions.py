"""What pictures are drawn of where captions do not tell it: classes, boxes, maps, pictures and neighbours of samples;
or neighbours of captions and of entries of a database.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from data.reader import BadSliceError
from data.tars import TarSplit
from models.conditioner import Conditioner
from trainer.evaluation.pictures import Asked
from trainer.sample_neighbours import NeighbourReader
from trainer.sampling import Picture
from trainer.validation import validation_samples

log = logging.getLogger(__name__)

# Of what is random about fields: the holes of inpainting.
_SEED = 0


def read_of_samples(conditioner: nn.Module) -> list[str]:
    """Names of what a conditioner reads of samples, beside captions: "images", fields."""
    if not isinstance(conditioner, Conditioner):
        return []
    maps = {"images"} if len(conditioner.map_list()) else set()  # some make do without fields, none without pictures
    return sorted((conditioner.reads | maps) - {"captions"})


class Conditions(ABC):
    """Pictures to draw under more than captions."""

    @abstractmethod
    def asked(self) -> list[Asked]:
        """Sizes of all pictures, and captions as far as they are known before a picture is drawn."""

    @abstractmethod
    def picture(self, number: int, seed: int) -> Picture:
        """The picture of a number.

        Raises:
            ValueError: what it is drawn of cannot be read.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that pictures depend on, beside numbers, seeds and what `asked` tells."""


class NeighbourConditions(Conditions):
    """Pictures to draw of neighbours in a database: of their captions, looked for by its CLIP; or each of an entry's
    that its seed draws, a pseudo-query (Blattmann et al. 2022, arXiv 2204.11824, section 3.3).

    Args:
        asked: captions and sizes.
        reader: of neighbours.
        drawn: entries, instead of captions.
    """

    def __init__(self, asked: Sequence[Asked], reader: NeighbourReader, drawn: bool) -> None:
        self._asked, self._reader, self._drawn = list(asked), reader, drawn

    def asked(self) -> list[Asked]:
        return self._asked

    def picture(self, number: int, seed: int) -> Picture:
        one, kinds = self._asked[number], self._reader.fields
        size = one.height, one.width
        if self._drawn:
            fields = {name: kinds[name].given(entry, size) for name, entry in self._reader.drawn(seed).items()}
        else:
            fields = {name: kind.of_text(one.prompt, size) for name, kind in kinds.items()}
        return Picture(one.prompt, seed, *size, fields=fields)

    @property
    def fingerprint(self) -> str:
        return self._reader.fingerprint(self._drawn)


class SampleConditions(Conditions):
    """Pictures to draw, each under what a sample comes with, whose own picture the drawn one is to be like.

    Args:
        split: of tars, with the fields that the model was trained with.
        count: pictures to draw, each of a sample chosen by a hash; they come again where there are fewer.
    """

    def __init__(self, split: TarSplit, count: int) -> None:
        self._split, self._count = split, count
        self._samples = validation_samples(split, count)
        self._reader = split.reader(_SEED, crop="center", flip=False, encoded=False)

    def asked(self) -> list[Asked]:
        buckets = [self._split.buckets[planned.bucket] for planned in self._samples]
        return [
            Asked("", buckets[i % len(buckets)].height, buckets[i % len(buckets)].width) for i in range(self._count)
        ]

    def picture(self, number: int, seed: int) -> Picture:
        """See `Conditions.picture`. A sample that cannot be read gives way to the next of its size, if there is one."""
        first = number % len(self._samples)
        bucket = self._samples[first].bucket
        for planned in self._samples[first:] + self._samples[:first]:
            if planned.bucket != bucket:
                continue
            try:
                batch = self._reader[planned].batch
            except BadSliceError as error:
                log.warning("another sample's conditions are taken: %s", error)
                continue
            fields = {name: values[0] for name, values in batch.fields.items()}
            return Picture(batch.captions[0], seed, *batch.target_size, image=batch.images[0], fields=fields)
        raise ValueError(f"no sample of {self._split.buckets[bucket]} can be read")

    @property
    def fingerprint(self) -> str:
        of_samples = [selection.fingerprint for selection in self._split.selections.values()]
        return " ".join([*of_samples, *self._split.made_of().values()])
