"""Bytes per rank of a network of 52 million parameters, counted over the storages of every tensor that is alive."""

import gc

import pytest
import torch

from tests.trainer.ranks import Ranks
from tests.trainer.toys import DENOISE, OPTIMIZER, Denoiser, batch_of, toy_loss
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP

WORLD = 2
BUCKET = 500_000  # small beside the network, so that DeepSpeed's communication buffers do not count


def living_bytes() -> int:
    """Bytes of the distinct storages of all tensors in the process, gradients included."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor) or thing.is_meta:
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            local = getattr(tensor, "_local_tensor", tensor)
            if local is not None and (storage := local.untyped_storage()).nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def fresh_ranks():
    """Processes that no earlier test has left tensors in."""
    group = Ranks(WORLD)
    yield group
    group.close()


def measure(config):
    """(parameters, measured bytes before the optimiser's step, the engine's own account)."""
    before = living_bytes()
    with torch.device("meta"):
        network = Denoiser(width=1000, depth=13)
    numel = sum(p.numel() for p in network.parameters())
    engine = config.build({"denoiser": network}, DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))
    (phase,) = DENOISE
    batch = batch_of(0)
    for last in (False, True):
        with engine.accumulating(phase, last):
            engine.backward(phase, toy_loss(phase, engine.networks, batch).sum() / 32)
    measured = living_bytes() - before
    account = engine.memory()
    assert not engine.step(phase, 0.01).skipped
    return numel, measured, account


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sharded", "replicated"),
    [
        # Bytes per parameter. float32: master, gradient, two moments; ZeRO-1/2 keep a whole copy for the forward pass,
        # and ZeRO-3 its share of one.
        pytest.param(FSDP(), 16, 0, id="fsdp-bf16"),
        pytest.param(FSDP(replicas=2), 0, 16, id="replicated-bf16"),
        # bfloat16 weights and gradients and float32 sums of gradients on every rank; master and moments shared out.
        pytest.param(DeepSpeed(stage=1, bucket_elements=BUCKET), 12, 8, id="zero1-bf16"),
        # In float32, ZeRO-1 keeps of the gradient only what it owns once the last pass is reduced.
        pytest.param(DeepSpeed(stage=1, bucket_elements=BUCKET, precision="fp32"), 16, 4, id="zero1-fp32"),
        pytest.param(DeepSpeed(stage=2, bucket_elements=BUCKET), 16, 2, id="zero2-bf16"),
        pytest.param(DeepSpeed(stage=3, bucket_elements=BUCKET), 18, 0, id="zero3-bf16"),
    ],
)
def test_a_rank_holds_what_its_stage_shards_and_replicates(fresh_ranks, config, sharded, replicated):
    for numel, measured, account in fresh_ranks.run(measure, config):
        assert numel > 50_000_000
        expected = numel * (sharded / WORLD + replicated)
        assert measured == pytest.approx(expected, rel=0.05)
        assert sum(account.values()) == pytest.approx(expected, rel=0.05)
