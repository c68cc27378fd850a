"""What a filter is: something that tells numbers of a sample (`Filter`), or of a sample among all (`GlobalFilter`).

A filter keeps nothing and drops nothing. It writes columns, over which a `where` clause then decides.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa

from data.decode import DecodeError, decode_image
from data.tracking import RunLog

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")
Place = Literal["first", "middle", "last"]
PLACES: tuple[Place, ...] = ("first", "middle", "last")


@dataclass(frozen=True)
class Failure:
    """Why a sample has no scores.

    Args:
        reason: a few words, the same for all samples that fail in this way; they are counted by it.
        detail: what is particular to this one.
    """

    reason: str
    detail: str = ""


class Media:
    """A sample as filters see it. All filters of a pass get the same object, so that it is decoded once.

    Args:
        key: of the sample.
        row: values of the manifest columns that the filters need; also of score columns, for a `GlobalFilter`.
        kind: of its picture or clip; None if it has neither.
        data: the encoded picture or clip, b"" unless some filter of the pass looks at such media.
        side: pixels; see `image`.
        span: of a clip, the frames [start, end) that are the sample; None: all.
        picture: the decoded picture, where there is no encoded one: a frame of a clip.
    """

    def __init__(
        self,
        key: str,
        row: Mapping[str, Any],
        kind: Kind | None,
        data: bytes,
        side: int,
        span: tuple[int, int] | None = None,
        picture: np.ndarray | None = None,
    ) -> None:
        self.key, self.row, self.kind, self.data, self.side, self.span = key, row, kind, data, side, span
        self._picture = picture

    @property
    def caption(self) -> str:
        """The manifest's caption, "" if there is none."""
        return self.row.get("caption") or ""

    @property
    def image(self) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright, transparency over white. Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their
        size, as long as both sides still are at least `side`.

        Raises:
            DecodeError: see `decode_image`.
        """
        if isinstance(self._decoded, DecodeError):
            raise self._decoded
        return self._decoded

    def failure(self) -> Failure | None:
        """Why the picture or clip cannot be seen, if so. A picture is decoded for it."""
        if self.kind is None:
            return Failure("no picture or clip")
        if self.kind == "image" and isinstance(self._decoded, DecodeError):
            return Failure("undecodable picture", str(self._decoded))
        return None

    def release(self) -> None:
        """Let go of the decoded picture."""
        self.__dict__.pop("_decoded", None)

    @cached_property
    def _decoded(self) -> np.ndarray | DecodeError:
        if self._picture is not None:
            return self._picture
        try:
            return decode_image(self.data, cover=(self.side, self.side)).pixels
        except DecodeError as error:
            return error


class _Columns(ABC):
    """What both kinds of filter tell of themselves.

    Attributes:
        name: of the score file; no other filter has it. Lower case, without dots.
        version: to be raised whenever equal samples and settings would get other scores than before.
        columns: what it writes, in lower case; no other filter, nor the manifest, has columns of these names.
    """

    name: str
    version: int = 1
    columns: pa.Schema

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that changes scores, as JSON values: constructor arguments, hashes of model weights."""


class Filter(_Columns):
    """Scores samples one by one (or in batches, where a model is faster so). Picklable; a constructor loads no model:
    that waits for the first `score`, in the process that calls it.

    Attributes:
        media: what it looks at: samples with other media get None. "image": pictures, and of clips some frames, from
            whose scores come the clip's (see `curation.video.combine`). "video": clips. "any": pictures and clips, as
            encoded. "none": only the manifest's columns.
        frames: those frames; by default, as in SVD (arXiv 2311.15127, appendix C), three.
        batched: whether `score` runs a model, which wants many samples at once and rounds differently in other batches;
            else it gets pictures one after the other, with the pixels still in the processor's cache. Where nothing is
            decoded it gets many in any case.
        needs: manifest columns that it reads from `Media.row`.
    """

    media: ClassVar[Literal["none", "image", "video", "any"]]
    frames: ClassVar[tuple[Place, ...]] = PLACES
    batched: ClassVar[bool] = False
    needs: Sequence[str] = ()

    @property
    def kinds(self) -> frozenset[Kind]:
        """Media that it looks at."""
        if self.media == "none":
            return frozenset()
        return frozenset({"video"}) if self.media == "video" else frozenset(KINDS)

    @abstractmethod
    def score(self, samples: Sequence[Media]) -> Sequence[Mapping[str, Any] | Failure]:
        """For each sample the values of all columns (None where they cannot be told), or why there are none.

        Samples that lack the media, or whose picture cannot be decoded, are left out before.
        """


class ShardColumns(Protocol):
    """A shard as a `GlobalFilter` sees it."""

    @property
    def rows(self) -> int:
        """Number of samples."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Columns of the manifest or of other filters' score files; those that the shard lacks are null."""


class GlobalFilter(_Columns):
    """Scores each sample by its place among all others, from the columns of other filters.

    Attributes:
        needs: columns of the manifest or of other filters; when they change anywhere, all is scored again.
    """

    needs: Sequence[str]

    @abstractmethod
    def score_all(
        self, shards: Sequence[ShardColumns], tasks: int = 1, log: RunLog | None = None
    ) -> Iterator[pa.Table]:
        """For each shard, in order, a table of `columns` with a row for each of its samples.

        Args:
            shards: all there are; picklable.
            tasks: processes to share the work (see `data.tasks`), on which the result does not depend.
            log: that gets rows about the progress.
        """
