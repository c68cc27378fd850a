"""A run saved under one engine and world size goes on under another: state to the bit, training to rounding."""

from pathlib import Path

import pytest
import torch

from tests.trainer.ranks import ranks
from tests.trainer.toys import ADVERSARIAL, DENOISE, OPTIMIZER, batch_of, join, toy_networks, train
from trainer.checkpoint import CheckpointError, CheckpointPolicy, Record, load_weights
from trainer.ema import ConstantDecay, Ema, PowerFunction
from trainer.engines.base import Engine, EngineConfig
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.resume import resume_run, run_shards, save_run

ENGINES: dict[str, EngineConfig] = {
    "fsdp": FSDP(precision="fp32"),
    "hsdp": FSDP(precision="fp32", replicas=2),
    "zero1": DeepSpeed(precision="fp32", stage=1),
    "zero2": DeepSpeed(precision="fp32", stage=2),
    "zero3": DeepSpeed(precision="fp32", stage=3),
}
PHASES = {"denoise": DENOISE, "adversarial": ADVERSARIAL}
Held = dict[str, list]


def build(kind: str, phases: str) -> tuple[Engine, Ema]:
    chosen = PHASES[phases]
    optimizers = {phase.name: OPTIMIZER for phase in chosen}
    engine = ENGINES[kind].build(toy_networks(chosen), chosen, optimizers, 7, torch.device("cpu"))
    ema = Ema({"decay_9": ConstantDecay(0.9), "p10": PowerFunction(0.10)})
    ema.attach(engine)
    return engine, ema


def go(engine: Engine, ema: Ema, phases: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses += train(engine, PHASES[phases], range(step, step + 1))[0]
        ema.update(step + 1)
    return losses


def all_held(engine: Engine, ema: Ema) -> Held:
    """As `toys.held`, under the names of a checkpoint and with averages."""
    return {"all": [(s.name, s.shape, s.boxes, s.tensor.clone()) for s in run_shards(engine, ema)]}


def start(kind: str, phases: str, folder: Path) -> Held:
    """Train 3 steps, save, and give the state that was saved."""
    engine, ema = build(kind, phases)
    go(engine, ema, phases, range(3))
    checkpointer = CheckpointPolicy().build(folder)
    save_run(checkpointer, Record(step=3, plan={"rows": 5}, skipped_steps=[2]), engine, ema)
    held = all_held(engine, ema)
    go(engine, ema, phases, range(3, 4))  # while it is being written
    checkpointer.wait()
    return held


def resume(kind: str, phases: str, folder: Path, more: int) -> tuple[Held, list[float], Held]:
    """State after resuming, losses of further steps, state after them."""
    engine, ema = build(kind, phases)
    go(engine, ema, phases, range(50, 51))  # another history, all of which has to go
    checkpointer = CheckpointPolicy().build(folder)
    found = checkpointer.latest()
    assert found.path is not None and not found.refused
    record = resume_run(checkpointer, found.path, engine, ema)
    assert (record.step, record.plan, record.skipped_steps) == (3, {"rows": 5}, [2])
    assert engine.steps_taken() == {phase.name: 3 for phase in PHASES[phases]}
    resumed = all_held(engine, ema)
    losses = go(engine, ema, phases, range(3, 3 + more))
    return resumed, losses, all_held(engine, ema)


def uninterrupted(kind: str, phases: str, steps: int) -> tuple[list[float], Held]:
    engine, ema = build(kind, phases)
    losses = go(engine, ema, phases, range(steps))
    return losses, all_held(engine, ema)


@pytest.fixture(scope="module")
def reference():
    """Losses and state of 6 uninterrupted steps on one rank."""
    ((losses, held),) = ranks(1).run(uninterrupted, "fsdp", "denoise", 6)
    return losses, join([held], "all")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saving", "loading"),
    [
        (("fsdp", 2), [("fsdp", 2), ("fsdp", 1), ("fsdp", 4), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)]),
        (("hsdp", 4), [("fsdp", 2), ("zero3", 4)]),
        (("zero1", 2), [("fsdp", 1), ("zero3", 2), ("zero1", 4)]),
        (("zero2", 2), [("fsdp", 4), ("zero2", 1)]),
        (("zero3", 2), [("fsdp", 2), ("zero1", 2), ("zero3", 4)]),
    ],
    ids=lambda value: value[0] + str(value[1]) if isinstance(value, tuple) else "",
)
def test_every_engine_goes_on_from_every_other(tmp_path, reference, saving, loading):
    losses, final = reference
    saved = join(ranks(saving[1]).run(start, saving[0], "denoise", tmp_path), "all")
    for kind, world in loading:
        answers = ranks(world).run(resume, kind, "denoise", tmp_path, 3)
        resumed = join([resumed for resumed, _, _ in answers], "all")
        assert resumed.keys() == saved.keys()
        assert all(torch.equal(resumed[name], saved[name]) for name in saved), (kind, world)
        torch.testing.assert_close(answers[0][1], losses[3:], rtol=1e-4, atol=0)
        after = join([after for _, _, after in answers], "all")
        for name, expected in final.items():
            torch.testing.assert_close(
                after[name], expected, rtol=1e-3, atol=1e-5, msg=f"{name} under {kind} on {world}"
            )


@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_the_same_world_goes_on_bit_for_bit(tmp_path, kind):
    ranks(2).run(start, kind, "denoise", tmp_path)
    answers = ranks(2).run(resume, kind, "denoise", tmp_path, 3)
    expected = ranks(2).run(uninterrupted, kind, "denoise", 6)
    assert [a[1] for a in answers] == [losses[3:] for losses, _ in expected]
    ours, theirs = join([a[2] for a in answers], "all"), join([held for _, held in expected], "all")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_phases_of_two_networks_go_on_from_zero_to_fsdp(tmp_path):
    saved = join(ranks(2).run(start, "zero2", "adversarial", tmp_path), "all")
    answers = ranks(1).run(resume, "fsdp", "adversarial", tmp_path, 1)
    resumed = join([resumed for resumed, _, _ in answers], "all")
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)
    assert len(saved) == 5 * len([name for name in saved if "/" not in name])  # weights, two moments, two averages


def test_one_process_reads_weights_and_averages_of_a_zero3_run(tmp_path):
    saved = join(ranks(2).run(start, "zero3", "denoise", tmp_path), "all")
    path = tmp_path / "step_00000003"
    for ema, prefix in ((None, ""), ("p10", "ema.p10/")):
        for name, value in load_weights(path, "denoiser", ema).items():
            assert torch.equal(value, saved[f"{prefix}denoiser.{name}"])
    network = toy_networks(DENOISE, meta=False)["denoiser"]
    missing, unexpected = network.load_state_dict(load_weights(path, "denoiser"), strict=False)
    assert missing == ["position"] and not unexpected


def resume_other_phases(folder: Path) -> str:
    engine, ema = build("fsdp", "adversarial")
    checkpointer = CheckpointPolicy().build(folder)
    try:
        resume_run(checkpointer, folder / "step_00000003", engine, ema)
    except CheckpointError as error:
        return str(error)
    return ""


def test_another_runs_checkpoint_is_refused_by_name(tmp_path):
    ranks(2).run(start, "fsdp", "denoise", tmp_path)
    for message in ranks(2).run(resume_other_phases, tmp_path):
        assert "missing: discriminator.blocks.0.weight" in message and "init_from" in message


def swap(kind: str) -> list[float]:
    """Losses on a fixed batch: of the weights, of their average, and of the weights again; and bits that changed."""
    engine, ema = build(kind, "denoise")
    go(engine, ema, "denoise", range(4))
    before = all_held(engine, ema)
    losses = [forward(engine)]
    with ema.swapped("p10"):
        losses.append(forward(engine))
    losses.append(forward(engine))
    after = all_held(engine, ema)
    changed = sum(not torch.equal(a[3], b[3]) for a, b in zip(before["all"], after["all"], strict=True))
    return [*losses, changed]


def forward(engine: Engine) -> float:
    batch = batch_of(90)
    with torch.no_grad():
        prediction = engine.networks["denoiser"](batch["x"], timestep=batch["timestep"], label=batch["label"])
    return (prediction - batch["target"]).square().mean().item()


@pytest.mark.parametrize("kind", ["fsdp", "zero1", "zero3"])
def test_the_average_is_what_the_networks_compute_with_while_swapped(tmp_path, kind):
    (before, swapped, after, changed), _ = ranks(2).run(swap, kind)
    assert before == after and changed == 0
    ranks(2).run(start_four, kind, tmp_path)
    network = toy_networks(DENOISE, meta=False)["denoiser"]
    network.load_state_dict(load_weights(tmp_path / "step_00000004", "denoiser", ema="p10"), strict=False)
    engine = type("Alone", (), {"networks": {"denoiser": network}})()
    assert forward(engine) == pytest.approx(swapped, rel=1e-5)
    assert abs(before - swapped) > 1e-4 * before


def start_four(kind: str, folder: Path) -> None:
    engine, ema = build(kind, "denoise")
    go(engine, ema, "denoise", range(4))
    save_run(CheckpointPolicy(asynchronous=False).build(folder), Record(step=4), engine, ema)
