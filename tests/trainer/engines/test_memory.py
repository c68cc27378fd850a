"""Bytes per rank of a network of 52 million parameters, counted over the storages of every tensor that is alive."""

import gc

import pytest
import torch

from tests.trainer.ranks import Ranks, ranks
from tests.trainer.toys import DENOISE, OPTIMIZER, Denoiser, batch_of, toy_loss
from trainer.engines.deepspeed import DeepSpeed, live_elements
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


def most_gathered(config: DeepSpeed) -> list[int]:
    """In each of three steps: the most elements of weights that are whole on this rank when a module is run."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    with torch.device("meta"):
        network = Denoiser(width=100, depth=13)
    engine = config.build({"denoiser": network}, DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))
    parameters: list = list(network.parameters())
    most, gathered = [], []

    def look(*_: object) -> None:
        gathered.append(sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE))

    for module in network.modules():
        module.register_forward_hook(look)
        module.register_full_backward_hook(look)
    (phase,) = DENOISE
    for step in range(3):
        gathered.clear()
        with engine.accumulating(phase, True):
            engine.backward(phase, toy_loss(phase, engine.networks, batch_of(step)).sum() / 16)
        assert not engine.step(phase, 0.01).skipped
        most.append(max(gathered))
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_3_gathers_two_blocks_at_once_and_a_module_that_is_in_use(checkpointing):
    config = DeepSpeed(stage=3, bucket_elements=5_000, activation_checkpointing=checkpointing)
    with torch.device("meta"):
        network = Denoiser(width=100, depth=13)
    largest = max(p.numel() for p in network.parameters())
    limit = live_elements(network) + 5_000 + largest
    assert limit < 0.4 * sum(p.numel() for p in network.parameters())
    for most in ranks(WORLD).run(most_gathered, config):
        assert all(largest <= number <= limit for number in most)
