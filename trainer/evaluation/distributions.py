"""How far a set of pictures is from another, by their features: Fréchet and kernel distance, precision and recall."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.features import Features
from trainer.distributed import World
from trainer.evaluation.metric import FeatureMetric, Gathered, Seen, sum_of_ranks

# Rows of one set whose distances to all of the other are in memory at once.
_CHUNK = 1024


class FrechetDistance(FeatureMetric):
    """FID (arXiv 1706.08500), or whatever else the features make of it: the Fréchet distance between normal
    distributions fitted to both sets. Keeps sums only.

    It falls with the number of pictures; published figures are of 50,000, or 30,000 of COCO.
    """

    def place(self, world: World) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        super().place(world)
        # Sums are reduced here: torchmetrics would gather every rank's matrices first.
        self._distance = FrechetInceptionDistance(
            _Given(self.features.num_features), reset_real_features=False, sync_on_compute=False
        ).to(world.device)

    def check(self, generated: int, reference: int | None) -> str | None:
        fewest = min(generated, generated if reference is None else reference)
        if fewest < 2:
            raise ValueError(f"{self.name}: a set of {fewest} pictures has no covariance: give at least two")
        if fewest <= self.features.num_features:
            return (
                f"{self.name}: {fewest} pictures are too few for the covariance of {self.features.num_features}"
                " features to have full rank: the distance is far too large, and only to be compared with that of as"
                " many"
            )
        return None

    def see_reference(self, seen: Seen) -> None:
        self._distance.update(seen.features(self.features).double(), real=True)

    def end_reference(self) -> None:
        self._sum("real")

    def see(self, seen: Seen) -> None:
        self._distance.update(seen.features(self.features).double(), real=False)

    def result(self) -> dict[str, float]:
        self._sum("fake")
        values = {self.name: float(self._distance.compute())} if self.world.is_main else {}
        self._distance.reset()
        return values

    def statistics(self) -> dict[str, np.ndarray]:
        """`mu` and `sigma` of the reference, as pytorch-fid and ADM keep them; `n` pictures, `features`' label."""
        n = int(self._distance.real_features_num_samples)
        mu = self._distance.real_features_sum / n
        sigma = (self._distance.real_features_cov_sum - n * torch.outer(mu, mu)) / (n - 1)
        return {
            "mu": mu.cpu().numpy(),
            "sigma": sigma.cpu().numpy(),
            "n": np.array(n),
            "features": np.array(self.label),
        }

    def load_statistics(self, path: Path) -> None:
        """Take the reference's `mu` and `sigma` from a file.

        Raises:
            ValueError: it does not have them, or for other features.
        """
        mu, sigma, n, label = read_statistics(path)
        if label not in (None, self.label):
            raise ValueError(f"{path} has statistics of {label}, and {self.name} looks through {self.label}")
        width = self.features.num_features
        if mu.shape != (width,) or sigma.shape != (width, width):
            raise ValueError(
                f"{path} has statistics of {len(mu)} features, and {self.name} compares {width} of {self.label}"
            )
        device = self._distance.real_features_sum.device
        mean, covariance = torch.from_numpy(mu).to(device), torch.from_numpy(sigma).to(device)
        self._distance.real_features_sum = mean * n
        self._distance.real_features_cov_sum = covariance * (n - 1) + n * torch.outer(mean, mean)
        self._distance.real_features_num_samples = torch.tensor(n, device=device)

    def _sum(self, kind: str) -> None:
        for name in ("sum", "cov_sum", "num_samples"):
            sum_of_ranks(getattr(self._distance, f"{kind}_features_{name}"))


class KernelDistance(FeatureMetric):
    """KID (arXiv 1801.01401): the squared maximum mean discrepancy under a cubic kernel, unbiased, as its mean and
    standard deviation over random subsets. Keeps the features of both sets on the main rank, in 4 bytes a number.

    Args:
        subsets: how many.
        subset_size: pictures of either set in each.
        seed: of the subsets.
    """

    def __init__(
        self, name: str, features: Features, subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> None:
        if subsets < 1 or subset_size < 2:
            raise ValueError(f"subsets={subsets} must be at least 1, subset_size={subset_size} at least 2")
        super().__init__(name, features)
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self._reference: Tensor | None = None
        self._of_reference, self._drawn = Gathered(), Gathered()

    def check(self, generated: int, reference: int | None) -> str | None:
        _need_pictures(self.name, reference)
        fewest = min(generated, reference or 0)
        if fewest < self.subset_size:
            raise ValueError(
                f"{self.name}: there are {fewest} pictures, and a subset has {self.subset_size} of either set: take"
                f" more, or set metric.{self.name}.subset_size lower"
            )
        return None

    def see_reference(self, seen: Seen) -> None:
        self._of_reference.add(seen.numbers, seen.features(self.features))

    def end_reference(self) -> None:
        self._reference = self._of_reference.all(self.world)

    def see(self, seen: Seen) -> None:
        self._drawn.add(seen.numbers, seen.features(self.features))

    def result(self) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        drawn = self._drawn.all(self.world)
        if drawn is None or self._reference is None:
            return {}
        with warnings.catch_warnings(), _seeded(self.seed):
            warnings.simplefilter("ignore")  # that it keeps all features
            distance = KernelInceptionDistance(
                _Given(self.features.num_features), self.subsets, self.subset_size, sync_on_compute=False
            ).to(self.world.device)
            distance.update(self._reference.double().to(self.world.device), real=True)
            distance.update(drawn.double().to(self.world.device), real=False)
            mean, deviation = distance.compute()
        return {self.name: float(mean), f"{self.name}_std": float(deviation)}


class PrecisionRecall(FeatureMetric):
    """Improved precision and recall (arXiv 1904.06991): the share of pictures that lie within the other set, which is
    what is nearer to one of its pictures than that one's k-th neighbour in the set. Keeps the features of both sets on
    the main rank, in 4 bytes a number, and takes time in proportion to the product of their sizes.

    Args:
        k: neighbours.
    """

    def __init__(self, features: Features, k: int = 3) -> None:
        if k < 1:
            raise ValueError(f"k={k}: neighbours are at least 1")
        super().__init__("precision_recall", features)
        self.k = k
        self._reference: Tensor | None = None
        self._radii: Tensor | None = None
        self._of_reference, self._drawn = Gathered(), Gathered()

    def check(self, generated: int, reference: int | None) -> str | None:
        _need_pictures(self.name, reference)
        fewest = min(generated, reference or 0)
        if fewest <= self.k:
            raise ValueError(f"{self.name}: among {fewest} pictures none has {self.k} neighbours")
        return None

    def see_reference(self, seen: Seen) -> None:
        self._of_reference.add(seen.numbers, seen.features(self.features))

    def end_reference(self) -> None:
        reference = self._of_reference.all(self.world)
        if reference is not None:
            self._reference = reference.to(self.world.device)
            self._radii = neighbour_distances(self._reference, self.k)

    def see(self, seen: Seen) -> None:
        self._drawn.add(seen.numbers, seen.features(self.features))

    def result(self) -> dict[str, float]:
        drawn = self._drawn.all(self.world)
        if drawn is None or self._reference is None or self._radii is None:
            return {}
        drawn = drawn.to(self.world.device)
        precision = share_within(drawn, self._reference, self._radii)
        recall = share_within(self._reference, drawn, neighbour_distances(drawn, self.k))
        return {"precision": precision, "recall": recall}


def neighbour_distances(points: Tensor, k: int) -> Tensor:
    """(n,) float64, the distance of each of n points (n, d) to its k-th nearest among the others."""
    found = []
    for start in range(0, len(points), _CHUNK):
        distances = _distances(points[start : start + _CHUNK], points)
        own = torch.arange(len(distances), device=points.device)
        distances[own, start + own] = torch.inf
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def share_within(points: Tensor, others: Tensor, radii: Tensor) -> float:
    """The share of points (n, d) that are within the radius (m,) of at least one of the others (m, d)."""
    inside = 0
    for start in range(0, len(points), _CHUNK):
        inside += int((_distances(points[start : start + _CHUNK], others) <= radii).any(dim=1).sum())
    return inside / len(points)


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray, int, str | None]:
    """`mu` (d,) and `sigma` (d, d) in float64; of how many pictures they are, any number where the file does not say;
    and through which network, None likewise.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        with np.load(path) as file:
            told = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no statistics that can be read: {error}") from error
    if not {"mu", "sigma"} <= told.keys():
        raise ValueError(f"{path} holds {', '.join(told) or 'nothing'}, and no mu and sigma as statistics for FID do")
    label = str(told["features"]) if "features" in told else None
    return told["mu"].astype(np.float64), told["sigma"].astype(np.float64), max(2, int(told.get("n", 2))), label


class _Given(nn.Module):
    """What torchmetrics takes for a network: it is given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _distances(points: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(points.double(), others.double())


def _need_pictures(name: str, reference: int | None) -> None:
    if reference is None:
        raise ValueError(f"{name} compares with pictures, and statistics (.npz) do for fid only: give reference=<tars>")


@contextmanager
def _seeded(seed: int) -> Iterator[Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
