"""Pseudo-queries: entries of a database in the place of samples, for pictures of which nothing is asked (Blattmann et
al. 2022, arXiv 2204.11824, section 3.3).

An entry y is drawn as often as it is among the k neighbours of training's n samples x: with p(y) = |{x: y in
neighbours(x)}| / kn. Of the entries that ever are one, only a share m is kept, the likeliest. The picture is then drawn
of the entry's own k neighbours.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data.retrieval.field import NeighbourField
from data.scores import open_scores
from data.tars import TarData


@dataclass(frozen=True, eq=False)
class Proposal:
    """Entries of a database to draw from.

    Args:
        ids: (m,) int64, the likeliest first.
        weights: (m,) what their probabilities are proportional to.
    """

    ids: np.ndarray
    weights: np.ndarray

    def __call__(self, uniform: float) -> int:
        """The entry that a uniform number in [0, 1) draws."""
        upto = np.cumsum(self.weights, dtype=np.float64)
        place = np.searchsorted(upto, uniform * upto[-1], side="right")
        return int(self.ids[min(int(place), len(self.ids) - 1)])


def proposal(counts: np.ndarray, top_m: float, alike: bool = False) -> Proposal:
    """The likeliest entries.

    Args:
        counts: (rows,) how often each of a database's entries is a neighbour of training's samples.
        top_m: share of the entries that ever are one, of which at least one is kept.
        alike: make all that are kept as likely, as the published scripts do by default.

    Raises:
        ValueError: a share outside of (0, 1], or no sample has a neighbour.
    """
    if not 0 < top_m <= 1:
        raise ValueError(f"top_m={top_m}: a share of the entries, above 0 and at most 1")
    seen = np.flatnonzero(counts)
    if not len(seen):
        raise ValueError("no sample of training has a neighbour in the database")
    order = seen[np.argsort(-counts[seen], kind="stable")]
    ids = order[: max(1, int(top_m * len(order)))]
    return Proposal(ids, np.ones(len(ids)) if alike else counts[ids])


def count_neighbours(data: TarData, neighbours: NeighbourField) -> np.ndarray:
    """How often each of the database's entries is a neighbour of training's samples, (rows,) int64.

    Args:
        data: of training, whose fields are `neighbours` alone.
        neighbours: as training reads them, k of each sample.

    Raises:
        ConfigError, ValueError: the columns are not there, or of another database.
        StoreError: a store fails.
    """
    counts = np.zeros(neighbours.opened.rows, np.int64)
    for source in data.sources:
        selection, manifests = data.select(source, "train"), data.manifests(source)
        for shard, manifest in enumerate(manifests):
            rows = selection.row[selection.shard_offsets[shard] : selection.shard_offsets[shard + 1]]
            if not len(rows):
                continue
            with open_scores(manifest, neighbours.column, data.store) as file:
                table = file.read(columns=neighbours.columns, use_threads=False).take(pa.array(rows))
            ids, similarities = (_matrix(table[column]) for column in neighbours.columns)
            counts += np.bincount(neighbours.chosen(ids, similarities), minlength=len(counts))
    return counts


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of one length, (n, length), without those that are missing."""
    lists = column.combine_chunks()
    return lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, lists.type.list_size)
