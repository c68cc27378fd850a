"""Distances between sets of pictures: against torchmetrics on the pictures themselves, scipy, brute force and prdc."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from models.features import RandomStandIn
from tests.foreign import ask, install
from tests.trainer.ranks import ranks
from trainer.distributed import World
from trainer.evaluation.distributions import (
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    neighbour_distances,
    share_within,
)
from trainer.evaluation.metric import FeatureMetric, Seen

WIDTH, BATCH = 12, 10


def pictures(count: int, seed: int) -> torch.Tensor:
    """Noise of uneven brightness; sets of different seeds differ in contrast."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(40, 200, (count, 1, 1, 1), generator=generator)
    spread = 30 + 25 * seed
    noise = torch.randint(-spread, spread, (count, 3, 16, 16), generator=generator)
    return (bright + noise).clamp(0, 255).to(torch.uint8)


def measured(metric: FeatureMetric, reference: torch.Tensor, drawn: torch.Tensor, rank: int = 0, size: int = 1) -> dict:
    """The result of a metric, of which this rank sees every size-th batch."""
    metric.place(World(rank, size, rank, torch.device("cpu"), launched=False))
    for images, see in ((reference, metric.see_reference), (drawn, metric.see)):
        for start in range(rank * BATCH, len(images), size * BATCH):
            part = images[start : start + BATCH]
            see(Seen(range(start, start + len(part)), part, [""] * len(part)))
        if images is reference:
            metric.end_reference()
    return metric.result()


def all_of(rank: int, size: int) -> dict:
    """What three metrics say on a rank; they share their features."""
    features = RandomStandIn(WIDTH)
    metrics = [
        FrechetDistance("fid", features),
        KernelDistance("kid", features, 10, 50),
        PrecisionRecall(features),
    ]
    values: dict[str, float] = {}
    for metric in metrics:
        values |= metric.named(measured(metric, pictures(120, 0), pictures(95, 1), rank, size))
    return values


def _on_ranks(size: int) -> dict:
    return all_of(torch.distributed.get_rank(), size)


@pytest.fixture(scope="module")
def alone() -> dict:
    return all_of(0, 1)


def test_distances_are_torchmetrics_on_the_same_pictures(alone: dict):
    features = RandomStandIn(WIDTH)
    fid = FrechetInceptionDistance(features)
    kid = KernelInceptionDistance(features, 10, 50)
    for metric in (fid, kid):
        metric.update(pictures(120, 0), real=True)
        metric.update(pictures(95, 1), real=False)
    assert alone["fid_random_stand_in"] == pytest.approx(float(fid.compute()), rel=1e-4)
    torch.manual_seed(0)
    mean, deviation = kid.compute()
    assert alone["kid_random_stand_in"] == pytest.approx(float(mean), rel=1e-3)
    assert alone["kid_std_random_stand_in"] == pytest.approx(float(deviation), rel=1e-3)
    assert alone["kid_std_random_stand_in"] > 0


def test_the_frechet_distance_is_scipys(alone: dict):
    a, b = (RandomStandIn(WIDTH)(pictures(*which)).double().numpy() for which in ((120, 0), (95, 1)))
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + d - 2 * sqrtm(c @ d).real)
    assert alone["fid_random_stand_in"] == pytest.approx(expected, rel=1e-6)


def test_each_setting_is_measured_for_itself_against_one_reference():
    """What a metric saw before its last result is forgotten, but not the reference."""
    features = RandomStandIn(WIDTH)
    for metric in (
        FrechetDistance("fid", features),
        KernelDistance("kid", features, 10, 50),
        PrecisionRecall(features),
    ):
        first = measured(metric, pictures(120, 0), pictures(95, 1))
        others = pictures(95, 2)
        metric.see(Seen(range(95), others, [""] * 95))
        other = metric.result()
        metric.see(Seen(range(95), pictures(95, 1), [""] * 95))
        assert metric.result() == pytest.approx(first, rel=1e-6)
        assert other != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_what_one_process_gives(alone: dict, size: int):
    first, *others = ranks(size).run(_on_ranks, size)
    assert others == [{}] * (size - 1)
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        assert first[name] == pytest.approx(value, rel=1e-9), name


def test_precision_and_recall_are_brute_forces():
    generator = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(80, 4, generator=generator), 0.6 * torch.randn(60, 4, generator=generator) + 0.8
    real[7] = real[8]  # twins are neighbours at no distance

    def within(points: torch.Tensor, others: torch.Tensor) -> float:
        inside = 0
        for point in points.double():
            for i, other in enumerate(others.double()):
                radius = sorted(float((other - o).norm()) for j, o in enumerate(others.double()) if j != i)[2]
                if float((point - other).norm()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    precision = share_within(drawn, real, neighbour_distances(real, 3))
    recall = share_within(real, drawn, neighbour_distances(drawn, 3))
    assert (precision, recall) == (within(drawn, real), within(real, drawn))
    assert 0.3 < precision < 1 and 0 < recall < 0.9


def test_precision_is_of_the_drawn_and_recall_of_the_reference(alone: dict):
    features = RandomStandIn(WIDTH)
    real, drawn = features(pictures(120, 0)), features(pictures(95, 1))
    precision = share_within(drawn, real, neighbour_distances(real, 3))
    recall = share_within(real, drawn, neighbour_distances(drawn, 3))
    assert (alone["precision_random_stand_in"], alone["recall_random_stand_in"]) == (precision, recall)
    assert precision != recall


_PRDC = """
import json, sys
import numpy as np
from prdc import compute_prdc
real, drawn = (np.load(path) for path in sys.argv[1:3])
print(json.dumps(compute_prdc(real, drawn, nearest_k=3)))
"""


def test_precision_and_recall_are_prdcs(tmp_path: Path):
    folder = install(tmp_path / "prdc", "prdc", "scikit-learn", "joblib", "threadpoolctl", "narwhals")
    rng = np.random.default_rng(0)
    real, drawn = rng.standard_normal((2500, 6)), 0.8 * rng.standard_normal((1100, 6)) + 0.5
    np.save(tmp_path / "real.npy", real)
    np.save(tmp_path / "drawn.npy", drawn)
    theirs = ask(folder, _PRDC, str(tmp_path / "real.npy"), str(tmp_path / "drawn.npy"))
    a, b = torch.from_numpy(real), torch.from_numpy(drawn)
    assert share_within(b, a, neighbour_distances(a, 3)) == pytest.approx(theirs["precision"], abs=1e-9)
    assert share_within(a, b, neighbour_distances(b, 3)) == pytest.approx(theirs["recall"], abs=1e-9)


def test_statistics_from_a_file_stand_for_the_pictures(tmp_path: Path, alone: dict):
    features = RandomStandIn(WIDTH)
    metric = FrechetDistance("fid", features)
    measured(metric, pictures(120, 0), pictures(95, 1))
    told = metric.statistics()
    points = features(pictures(120, 0)).double().numpy()
    np.testing.assert_allclose(told["mu"], points.mean(0), rtol=1e-9)
    np.testing.assert_allclose(told["sigma"], np.cov(points, rowvar=False), rtol=1e-6, atol=1e-12)
    # As others write them, without what we add.
    np.savez(tmp_path / "theirs.npz", mu=points.mean(0), sigma=np.cov(points, rowvar=False))
    again = FrechetDistance("fid", features)
    again.place(World(0, 1, 0, torch.device("cpu"), launched=False))
    again.load_statistics(tmp_path / "theirs.npz")
    drawn = pictures(95, 1)
    again.see(Seen(range(95), drawn, [""] * 95))
    assert again.result()["fid"] == pytest.approx(alone["fid_random_stand_in"], rel=1e-6)

    np.savez(tmp_path / "ours.npz", **told)
    other = FrechetDistance("fid", RandomStandIn(WIDTH))
    other.label = "inception_v3"
    other.place(World(0, 1, 0, torch.device("cpu"), launched=False))
    with pytest.raises(ValueError, match="statistics of random_stand_in, and fid looks through inception_v3"):
        other.load_statistics(tmp_path / "ours.npz")
    narrow = FrechetDistance("fid", RandomStandIn(WIDTH - 1))
    narrow.place(World(0, 1, 0, torch.device("cpu"), launched=False))
    with pytest.raises(ValueError, match=f"statistics of {WIDTH} features, and fid compares {WIDTH - 1}"):
        narrow.load_statistics(tmp_path / "theirs.npz")


def test_sets_that_are_too_small_are_refused_or_warned_of():
    features = RandomStandIn(WIDTH)
    assert "too few for the covariance of 12 features" in (FrechetDistance("fid", features).check(12, 500) or "")
    assert FrechetDistance("fid", features).check(500, None) is None
    with pytest.raises(ValueError, match=r"99 pictures.*a subset has 1000.*metric\.kid\.subset_size"):
        KernelDistance("kid", features).check(99, 5000)
    with pytest.raises(ValueError, match="statistics"):
        PrecisionRecall(features).check(99, None)
