"""Every engine against one process of plain torch: losses, gradient norms, weights and moments."""

import pytest
import torch

from tests.trainer.ranks import ranks
from tests.trainer.toys import (
    ADVERSARIAL,
    DENOISE,
    OPTIMIZER,
    Trace,
    batch_of,
    held,
    join,
    slices,
    toy_loss,
    toy_networks,
    train,
    train_alone,
)
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.engines.optimizer import AdamW
from trainer.objectives.base import Phase

STEPS = 20

SHARDED = {
    "fsdp": FSDP(precision="fp32"),
    "zero1": DeepSpeed(stage=1, precision="fp32"),
    "zero2": DeepSpeed(stage=2, precision="fp32"),
    "zero3": DeepSpeed(stage=3, precision="fp32"),
}
every_engine = pytest.mark.parametrize("config", SHARDED.values(), ids=SHARDED)


def build(config, phases, optimizer=OPTIMIZER):
    optimizers = {phase.name: optimizer for phase in phases}
    return config.build(toy_networks(phases), phases, optimizers, 7, torch.device("cpu"))


def train_sharded(config, phases, steps, size, optimizer=OPTIMIZER):
    engine = build(config, phases, optimizer)
    losses, norms = train(engine, phases, range(steps), size)
    return losses, norms, held(engine), engine.steps_taken()


def assert_like(results: list, reference: Trace, tolerance: float) -> None:
    for losses, norms, _, _ in results:
        torch.testing.assert_close(losses, reference.losses, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(norms, reference.norms, rtol=tolerance, atol=0.0)
    parts = [part for _, _, part, _ in results]
    weights = join(parts, "weight")
    assert weights.keys() == reference.weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, reference.weights[name], rtol=tolerance, atol=tolerance)
    for kind in ("exp_avg", "exp_avg_sq"):
        for name, moment in join(parts, kind).items():
            expected = reference.moments[f"{name}/{kind}"]
            torch.testing.assert_close(moment, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.fixture(scope="module")
def alone() -> Trace:
    return train_alone(DENOISE, STEPS)


@pytest.fixture(scope="module")
def adversarial_alone() -> Trace:
    return train_alone(ADVERSARIAL, STEPS)


@pytest.mark.parametrize(
    ("world", "config"),
    [
        pytest.param(1, FSDP(precision="fp32"), id="fsdp-1"),
        pytest.param(2, FSDP(precision="fp32", reduce_each_pass=False), id="fsdp-2-reduce-last"),
        pytest.param(2, FSDP(precision="fp32", activation_checkpointing=True), id="fsdp-2-checkpointing"),
        pytest.param(2, FSDP(precision="fp32", offload=True, reshard_after_forward=False), id="fsdp-2-offload"),
        pytest.param(4, FSDP(precision="fp32"), id="fsdp-4"),
        pytest.param(4, FSDP(precision="fp32", replicas=2), id="hsdp-2x2"),
        pytest.param(4, FSDP(precision="fp32", replicas=4), id="replicated-4"),
        pytest.param(1, DeepSpeed(stage=2, precision="fp32"), id="zero2-1"),
        pytest.param(2, DeepSpeed(stage=1, precision="fp32"), id="zero1-2"),
        pytest.param(2, DeepSpeed(stage=1, precision="fp32", offload=True), id="zero1-2-offload"),
        pytest.param(
            2, DeepSpeed(stage=2, precision="fp32", activation_checkpointing=True), id="zero2-2-checkpointing"
        ),
        pytest.param(
            2, DeepSpeed(stage=3, precision="fp32", activation_checkpointing=True), id="zero3-2-checkpointing"
        ),
        pytest.param(2, DeepSpeed(stage=3, precision="fp32", offload=True), id="zero3-2-offload"),
        pytest.param(4, DeepSpeed(stage=1, precision="fp32"), id="zero1-4"),
        pytest.param(4, DeepSpeed(stage=2, precision="fp32"), id="zero2-4"),
        pytest.param(4, DeepSpeed(stage=3, precision="fp32"), id="zero3-4"),
    ],
)
def test_a_sharded_run_of_several_passes_equals_one_process(world, config, alone):
    size = 1 if world < 4 else 2  # samples a pass; 8 samples a step
    results = ranks(world).run(train_sharded, config, DENOISE, STEPS, size)
    assert_like(results, alone, 1e-4)
    assert all(steps == {"main": STEPS} for *_, steps in results)


@every_engine
def test_a_loss_through_another_phases_network_and_weighed_at_the_last_layer_equals_one_process(
    config, adversarial_alone
):
    results = ranks(2).run(train_sharded, config, ADVERSARIAL, STEPS, 2)
    assert_like(results, adversarial_alone, 1e-4)
    assert results[0][3] == {"discriminator": STEPS, "generator": STEPS}


@pytest.mark.parametrize("config", [FSDP(precision="bf16"), *(DeepSpeed(stage=s) for s in (1, 2, 3))])
def test_bf16_stays_near_the_fp32_run_and_starts_from_the_very_same_masters(config, alone):
    first, later = ranks(2).run(train_bf16, config, STEPS)
    start = train_alone(DENOISE, 0).weights
    for name, weight in join([first[1], later[1]], "weight").items():
        assert torch.equal(weight, start[name])
    torch.testing.assert_close(first[0], alone.losses, rtol=0.05, atol=0.0)
    # Masters finer than bfloat16: updates are not rounded away.
    assert any((w != w.bfloat16().float()).any() for w in join([first[2], later[2]], "weight").values())


def train_bf16(config, steps):
    engine = build(config, DENOISE)
    start = held(engine)
    losses, _ = train(engine, DENOISE, range(steps))
    return losses, start, held(engine)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_the_global_norm_clips_as_torch_does(max_grad_norm):
    optimizer = AdamW(eps=1e-3, max_grad_norm=max_grad_norm)  # an eps at which Adam feels the gradient's scale
    reference = train_alone(DENOISE, 4, optimizer=optimizer)
    for config in (SHARDED["fsdp"], SHARDED["zero2"], SHARDED["zero3"]):
        assert_like(ranks(2).run(train_sharded, config, DENOISE, 4, 2, optimizer), reference, 1e-4)


def poisoned_step(config):
    """A step with one NaN on one rank, between honest ones."""
    engine = build(config, DENOISE)
    train(engine, DENOISE, range(2))
    before = held(engine)
    (phase,) = DENOISE
    part = slices(batch_of(2), 4)[torch.distributed.get_rank()]
    if torch.distributed.get_rank() == 1:
        part["x"][0, 0] = float("nan")
    with engine.accumulating(phase, last=True):
        engine.backward(phase, toy_loss(phase, engine.networks, part).sum())
    result = engine.step(phase, 0.1)
    after = held(engine)
    unchanged = all(torch.equal(a[3], b[3]) for kind in before for a, b in zip(before[kind], after[kind], strict=True))
    finite = engine.steps_taken()
    losses, _ = train(engine, DENOISE, range(2, 4))
    return result.skipped, unchanged, finite, losses


@every_engine
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(config):
    reference = train_alone(DENOISE, 4).losses[2:]
    for skipped, unchanged, steps, losses in ranks(2).run(poisoned_step, config):
        assert skipped and unchanged
        assert steps == {"main": 2}
        torch.testing.assert_close(losses, reference, rtol=1e-4, atol=0.0)


def discard_between(config):
    engine = build(config, DENOISE)
    (phase,) = DENOISE
    losses = []
    for step in range(3):
        with engine.accumulating(phase, last=True):
            engine.backward(phase, toy_loss(phase, engine.networks, slices(batch_of(50), 4)[0]).sum())
        engine.discard(phase)
        losses += train(engine, DENOISE, range(step, step + 1))[0]
    return losses


@every_engine
def test_discarded_gradients_leave_no_trace(config):
    reference = train_alone(DENOISE, 3).losses
    for losses in ranks(2).run(discard_between, config):
        torch.testing.assert_close(losses, reference, rtol=1e-4, atol=0.0)


BOTH = (Phase("both", ("denoiser", "generator")),)


def use_one_then_the_other(config):
    """A phase of two networks, of which a step uses both, the next only one."""
    engine = build(config, BOTH)
    (phase,) = BOTH
    batch = slices(batch_of(0), 4)[torch.distributed.get_rank()]
    norms = []
    for used in (("denoiser", "generator"), ("denoiser",), ("generator",)):
        with engine.accumulating(phase, last=True):
            loss = torch.zeros(())
            if "denoiser" in used:
                loss = loss + toy_loss(DENOISE[0], engine.networks, batch).sum()
            if "generator" in used:
                loss = loss + engine.networks["generator"](batch["image"]).square().sum()
            engine.backward(phase, loss)
        norms.append(engine.step(phase, 0.01).grad_norm)
    return norms, held(engine)


def test_what_a_step_does_not_use_has_no_gradient_in_it_under_any_engine():
    results = {name: ranks(2).run(use_one_then_the_other, config) for name, config in SHARDED.items()}
    weights = {name: join([part for _, part in parts], "weight") for name, parts in results.items()}
    for name in SHARDED:
        torch.testing.assert_close(results[name][0][0], results["fsdp"][0][0], rtol=1e-4, atol=0.0)
        for key, weight in weights[name].items():
            torch.testing.assert_close(weight, weights["fsdp"][key], rtol=1e-4, atol=1e-6)


def resume(config):
    """Three steps; then all state copied into a fresh engine that has run (so that it may hold stale weights)."""
    first = build(config, ADVERSARIAL)
    train(first, ADVERSARIAL, range(3))
    second = build(config, ADVERSARIAL)
    train(second, ADVERSARIAL, range(7, 8))
    with torch.no_grad():
        for network in second.networks.values():
            network(batch_of(0)["image"])  # leaves what it gathered, where an engine keeps it
        for kind in first.kinds():
            for source, target in zip(first.shards(kind), second.shards(kind), strict=True):
                assert (source.name, source.boxes) == (target.name, target.boxes)
                target.tensor.copy_(source.tensor)
    second.written()
    second.set_steps_taken(first.steps_taken())
    image = batch_of(0)["image"]
    with torch.no_grad():
        for name in first.networks:
            assert torch.equal(first.networks[name](image), second.networks[name](image)), "outdated weights"
    return [train(engine, ADVERSARIAL, range(3, 6)) for engine in (first, second)]


@pytest.mark.parametrize(
    "config",
    [*SHARDED.values(), FSDP(), DeepSpeed(stage=1), DeepSpeed(stage=2, offload=True), DeepSpeed(stage=3)],
    ids=[*SHARDED, "fsdp-bf16", "zero1-bf16", "zero2-bf16-offload", "zero3-bf16"],
)
def test_state_written_through_shards_continues_bit_for_bit(config):
    for uninterrupted, resumed in ranks(2).run(resume, config):
        assert uninterrupted == resumed


def outputs_of_frozen(config_kind, sharded):
    """What a frozen network gives, under an engine that trains another; and whether all of it is held here."""
    config = config_kind(precision="fp32", shard_frozen=["discriminator"] if sharded else [])
    networks = toy_networks(ADVERSARIAL)
    phases = ADVERSARIAL[1:]
    engine = config.build(networks, phases, {"generator": OPTIMIZER}, 7, torch.device("cpu"))
    (phase,) = phases
    image = batch_of(0)["image"]
    frozen = engine.memory()["frozen"]
    with engine.accumulating(phase, last=True):
        loss = engine.networks["discriminator"](engine.networks["generator"](image))
        engine.backward(phase, loss.sum() / 16)
    norm = engine.step(phase, 0.0).grad_norm
    return loss.detach(), norm, frozen


@pytest.mark.parametrize("kind", [FSDP, DeepSpeed])
def test_frozen_networks_let_gradients_through_whole_or_sharded(kind):
    networks = toy_networks(ADVERSARIAL, meta=False)
    networks["discriminator"].requires_grad_(False)
    loss = networks["discriminator"](networks["generator"](batch_of(0)["image"]))
    (loss.sum() / 8).backward()
    norm = torch.stack([p.grad.norm() for p in networks["generator"].parameters()]).norm().item()
    whole = 4 * sum(p.numel() for p in networks["discriminator"].parameters())
    for sharded in (False, True):
        results = ranks(2).run(outputs_of_frozen, kind, sharded)
        for out, grad_norm, _ in results:
            torch.testing.assert_close(out, loss.detach())
            assert grad_norm == pytest.approx(norm, rel=1e-5)
        held_bytes = sum(frozen for *_, frozen in results)
        # Rows are shared out whole: of 5 rows over two ranks FSDP2 stores 6.
        assert whole <= held_bytes < 1.3 * whole if sharded else held_bytes == 2 * whole


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: DeepSpeed(stage=0), "engine.stage=0"),
        (lambda: DeepSpeed(stage=3, compile=True), "engine=fsdp"),
        (lambda: AdamW(betas=[0.9]), "betas="),
        (lambda: AdamW(max_grad_norm=0.0), "max_grad_norm="),
    ],
)
def test_wrong_configurations_say_what_to_change(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def build_wrongly(replicas, shard_frozen, phases):
    optimizers = {"main": OPTIMIZER}
    try:
        config = FSDP(replicas=replicas, shard_frozen=shard_frozen)
        config.build(toy_networks(DENOISE), phases, optimizers, 7, torch.device("cpu"))
    except ValueError as error:
        return str(error)
    return "built"


def test_engines_refuse_what_does_not_fit_the_run():
    assert "replicas=3 does not divide the 2 ranks" in ranks(2).run(build_wrongly, 3, [], DENOISE)[0]
    assert "shard_frozen" in ranks(2).run(build_wrongly, 1, ["denoiser"], DENOISE)[0]
    assert "no optimizer" in ranks(2).run(build_wrongly, 1, [], ADVERSARIAL)[0]


@every_engine
def test_a_network_whose_buffers_training_would_change_is_refused(config):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"denoiser\.1 keeps running statistics"):
        config.build({"denoiser": network}, DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))
