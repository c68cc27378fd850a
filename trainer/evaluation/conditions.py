"""What pictures are drawn of where captions do not tell it: classes, boxes, maps and pictures of samples."""

import logging

from torch import nn

from data.reader import BadSliceError
from data.tars import TarSplit
from models.conditioner import Conditioner
from trainer.evaluation.pictures import Asked
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


class SampleConditions:
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
        """Sizes of all pictures; captions are read when they are drawn."""
        buckets = [self._split.buckets[planned.bucket] for planned in self._samples]
        return [
            Asked("", buckets[i % len(buckets)].height, buckets[i % len(buckets)].width) for i in range(self._count)
        ]

    def picture(self, number: int, seed: int) -> Picture:
        """The picture of a number. A sample that cannot be read gives way to the next of its size.

        Raises:
            ValueError: none of them can be read.
        """
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
        """Of the samples and their order."""
        return " ".join(selection.fingerprint for selection in self._split.selections.values())
