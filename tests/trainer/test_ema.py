"""Averages against one process, closed forms and brute-force sums over the whole history of the weights."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.trainer.checkpoint.layouts import part, random_cut
from tests.trainer.ranks import ranks
from trainer.checkpoint import Checkpointer, CheckpointError, CheckpointPolicy, Record, load_weights
from trainer.ema import ConstantDecay, Ema, PowerFunction, gamma_of, reconstruct, reconstruction_weights
from trainer.engines.base import Shard

SHAPES = {"net.a": (5, 3), "net.b": (4,), "net.c": ()}
LENGTHS = {
    "decay_9": ConstantDecay(0.9),
    "plain": ConstantDecay(0.5, warmup=False),
    "p05": PowerFunction(0.05),
    "p10": PowerFunction(0.10),
}


def weights_at(step: int) -> dict[str, torch.Tensor]:
    """A random walk of the weights with a drift: the history that averages are taken of."""
    generator = torch.Generator().manual_seed(0)
    walks = {name: torch.randn((200, *shape), generator=generator).cumsum(0) for name, shape in SHAPES.items()}
    return {name: walk[step] + 0.1 * step for name, walk in walks.items()}


class WalkingEngine:
    """As much of an engine as averages see: shards of a random cut, whose weights follow `weights_at`."""

    def __init__(self, rank: int = 0, world: int = 1, cut_seed: int = 0) -> None:
        import random

        self._boxes = {name: held[rank] for name, held in random_cut(random.Random(cut_seed), SHAPES, world).items()}
        self._tensors = {name: part(value, self._boxes[name]) for name, value in weights_at(0).items()}
        self.refreshed = 0

    def go_to(self, step: int) -> None:
        for name, value in weights_at(step).items():
            self._tensors[name].copy_(part(value, self._boxes[name]))

    def shards(self, kind: str) -> Iterator[Shard]:
        assert kind == "weight"
        for name, shape in SHAPES.items():
            yield Shard(name, shape, tuple(self._boxes[name]), self._tensors[name])

    def written(self) -> None:
        self.refreshed += 1


def averaged(every: int, steps: int, engine: WalkingEngine | None = None) -> tuple[Ema, WalkingEngine]:
    engine = engine or WalkingEngine()
    ema = Ema(dict(LENGTHS), every)
    ema.attach(engine)
    for step in range(1, steps + 1):
        engine.go_to(step)
        ema.update(step)
    return ema, engine


def history_average(counts: list[float]) -> dict[str, torch.Tensor]:
    """Sum of counts[step] * weights_at(step)."""
    return {
        name: sum(count * weights_at(step)[name].double() for step, count in enumerate(counts) if count)
        for name in SHAPES
    }


def constant_counts(decay: float, warmup: bool, every: int, steps: int) -> list[float]:
    """What each step's weights count for, each update rescaling all before it."""
    counts = [1.0] + [0.0] * steps
    for n in range(1, steps // every + 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        counts = [c * d for c in counts]
        counts[n * every] += 1 - d
    return counts


def power_counts(sigma_rel: float, every: int, steps: int) -> list[float]:
    """The profile integrated over the steps since the update before: t^(gamma + 1) is its integral."""
    power, until = gamma_of(sigma_rel) + 1, steps - steps % every
    return [
        ((t / until) ** power - ((t - every) / until) ** power) if t and t % every == 0 and t <= until else 0.0
        for t in range(steps + 1)
    ]


@pytest.mark.parametrize("every", [1, 7])
def test_every_length_is_the_sum_over_the_history_that_its_definition_says(every):
    ema, _ = averaged(every, steps=100)
    expected = {
        "decay_9": history_average(constant_counts(0.9, True, every, 100)),
        "plain": history_average(constant_counts(0.5, False, every, 100)),
        "p05": history_average(power_counts(0.05, every, 100)),
        "p10": history_average(power_counts(0.10, every, 100)),
    }
    for shard in ema.shards():
        length, _, name = shard.name.removeprefix("ema.").partition("/")
        assert shard.shape == SHAPES[name]
        torch.testing.assert_close(shard.tensor.double(), expected[length][name].reshape(-1), rtol=1e-5, atol=1e-5)


def test_a_power_function_has_the_width_it_is_named_for():
    for sigma_rel in (0.01, 0.05, 0.10, 0.15, 0.25, 12**-0.5):
        counts = np.array(power_counts(sigma_rel, 1, 20_000))
        middle = (np.arange(counts.size) - 0.5) / 20_000
        mean = (counts * middle).sum()
        assert counts.sum() == pytest.approx(1)
        assert math.sqrt((counts * (middle - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-3)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)  # arXiv 2312.02696, section 3.1
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.01)


def averages_on_rank(folder) -> None:
    ema, _ = averaged(3, 60, WalkingEngine(dist.get_rank(), dist.get_world_size(), cut_seed=dist.get_world_size()))
    CheckpointPolicy(asynchronous=False).build(folder).save(Record(step=60), ema.shards())


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_averages_are_bit_equal_to_one_process(tmp_path, world):
    ranks(world).run(averages_on_rank, tmp_path)
    ema, _ = averaged(3, 60)
    for shard in ema.shards():
        length, _, name = shard.name.removeprefix("ema.").partition("/")
        saved = load_weights(tmp_path / "step_00000060", "net", ema=length)[name.removeprefix("net.")]
        whole = torch.empty(SHAPES[name])
        start = 0
        for box in shard.boxes:  # a single process may hold a tensor in several boxes, too
            slices = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            size = math.prod(box.sizes)
            whole[slices] = shard.tensor[start : start + size].view(box.sizes)
            start += size
        assert torch.equal(saved, whole), shard.name


def test_swapping_shows_the_average_and_restores_every_bit():
    ema, engine = averaged(1, 30)
    weights = [shard.tensor.clone() for shard in engine.shards("weight")]
    averages = {shard.name: shard.tensor.clone() for shard in ema.shards()}
    with pytest.raises(KeyError), ema.swapped("p10"):
        assert engine.refreshed == 1
        for shard in engine.shards("weight"):
            assert torch.equal(shard.tensor, averages[f"ema.p10/{shard.name}"])
        with pytest.raises(AssertionError, match="swapped"):
            ema.update(31)
        raise KeyError("validation failed")
    assert engine.refreshed == 2
    assert all(torch.equal(s.tensor, w) for s, w in zip(engine.shards("weight"), weights, strict=True))
    assert all(torch.equal(shard.tensor, averages[shard.name]) for shard in ema.shards())
    with pytest.raises(ValueError, match=r"keeps decay_9, plain, p05, p10"), ema.swapped("0.5"):
        pass


def test_a_saved_average_goes_on_as_if_never_interrupted(tmp_path):
    uninterrupted, _ = averaged(4, 50)
    first, _ = averaged(4, 30)
    checkpointer = Checkpointer(tmp_path)
    path = checkpointer.save(Record(step=30, ema=first.state()), first.shards())

    engine = WalkingEngine()
    second = Ema(dict(LENGTHS), 4)
    second.attach(engine)
    second.load_state(checkpointer.load(path, second.shards()).ema)
    for step in range(31, 51):
        engine.go_to(step)
        second.update(step)
    for a, b in zip(uninterrupted.shards(), second.shards(), strict=True):
        assert torch.equal(a.tensor, b.tensor), a.name


def test_a_length_that_changed_under_its_name_is_refused():
    state = Ema({"long": ConstantDecay(0.99)}).state()
    with pytest.raises(ValueError, match=r"ema\.lengths\.long"):
        Ema({"long": ConstantDecay(0.999)}).load_state(state)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """Checkpoints with the two tracked lengths at every tenth of 160 steps."""
    folder = tmp_path_factory.mktemp("snapshots")
    engine = WalkingEngine()
    ema = Ema({"p05": PowerFunction(0.05), "p10": PowerFunction(0.10), "decay_9": ConstantDecay(0.9)})
    ema.attach(engine)
    checkpointer = CheckpointPolicy(keep_last=None).build(folder)
    paths = []
    for step in range(1, 161):
        engine.go_to(step)
        ema.update(step)
        if step % 10 == 0:
            paths.append(checkpointer.save(Record(step=step, ema=ema.state()), ema.shards()))
    checkpointer.wait()
    return paths


@pytest.mark.parametrize(("sigma_rel", "error"), [(0.05, 1e-5), (0.075, 2e-3), (0.12, 5e-3), (0.15, 2e-2), (0.2, 5e-2)])
def test_other_lengths_are_reconstructed_from_snapshots(snapshots, sigma_rel, error):
    tracked = history_average(power_counts(sigma_rel, 1, 160))
    drift = {name: (weights_at(160)[name].double() - tracked[name]).norm() for name in SHAPES}
    for name, value in reconstruct(snapshots, "net", sigma_rel).items():
        difference = (value.double() - tracked[f"net.{name}"]).norm()
        assert difference < error * drift[f"net.{name}"], (
            f"{name}: {difference / drift[f'net.{name}']:.1e} of the drift"
        )


def test_an_average_as_of_an_earlier_step_uses_no_later_snapshot(snapshots):
    tracked = history_average(power_counts(0.10, 1, 80))
    for name, value in reconstruct(snapshots, "net", 0.10, step=80).items():
        torch.testing.assert_close(value.double(), tracked[f"net.{name}"], rtol=1e-4, atol=1e-4)


def test_reconstruction_needs_snapshots(snapshots):
    with pytest.raises(CheckpointError, match="power-function"):
        reconstruct(snapshots, "net", 0.1, step=5)


def test_reconstruction_minimises_the_distance_between_profiles():
    """Against profiles sampled finely and a general least-squares solver."""
    stored = [(t, gamma_of(s)) for t in (250.0, 500.0, 750.0, 1000.0) for s in (0.05, 0.10)]
    target = (1000.0, gamma_of(0.15))
    tau = (np.arange(200_000) + 0.5) / 200_000 * 1000

    def profile(t: float, gamma: float) -> np.ndarray:
        return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)

    matrix = np.stack([profile(*p) for p in stored], axis=1)
    reference = np.linalg.lstsq(matrix, profile(*target), rcond=None)[0]
    np.testing.assert_allclose(reconstruction_weights(stored, target), reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: ConstantDecay(1.0), "decay"),
        (lambda: PowerFunction(0.3), "sigma_rel"),
        (lambda: Ema({}, every=0), "every"),
        (lambda: Ema({"a/b": ConstantDecay(0.9)}), "lengths"),
        (lambda: Ema({"0.9": ConstantDecay(0.9)}), "no dot"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, key):
    with pytest.raises(ValueError, match=key):
        build()
