"""The UNet, whose skip connections pass its blocks by, under every engine against one process of plain torch."""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch

from models.initialization import initialize
from models.unet import UNet
from tests.trainer.ranks import ranks
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.engines.networks import blocks_of, compile_blocks
from trainer.engines.optimizer import AdamW
from trainer.objectives.base import Phase

CONFIG = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PHASE = Phase("main", ("denoiser",))
STEPS, LR = 3, 0.01
SIDES = (8, 12, 8)


def batch_of(step: int, n: int = 4, side: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(n, 4, side, side, generator=generator),
        "timestep": 1000 * torch.rand(n, generator=generator),
        "context": torch.randn(n, 3, 12, generator=generator),
        "target": torch.randn(n, 4, side, side, generator=generator),
    }


def loss_of(network, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    prediction = network(batch["x"], batch["timestep"], context=batch["context"])
    return (prediction - batch["target"]).square().flatten(1).mean(1)


@contextmanager
def traced_only():
    """Compiling without the compiler's back end, which takes a minute for so many kinds of blocks."""
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        yield


@traced_only()
def train(config) -> list[float]:
    """Losses over the whole batch, of which each rank has its share."""
    torch._dynamo.reset()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with torch.device("meta"):
        network = UNet(**CONFIG)
    engine = config.build({"denoiser": network}, (PHASE,), {"main": AdamW()}, 7, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        mine = {name: value.chunk(world)[rank] for name, value in batch_of(step, side=SIDES[step]).items()}
        with engine.accumulating(PHASE, last=True):
            loss = loss_of(engine.networks["denoiser"], mine).sum() / 4
            engine.backward(PHASE, loss)
        engine.step(PHASE, LR)
        whole = loss.detach().clone()
        torch.distributed.all_reduce(whole)
        losses.append(whole.item())
    return losses


@pytest.fixture(scope="module")
def alone() -> list[float]:
    network = initialize(UNet(**CONFIG), 7, "denoiser")
    optimizer = AdamW()
    built = optimizer.build((p, kind) for p, kind in _kinds(network))
    losses = []
    for step in range(STEPS):
        loss = loss_of(network, batch_of(step, side=SIDES[step])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), optimizer.max_grad_norm or torch.inf)
        for group in built.param_groups:
            group["lr"] = LR
        built.step()
        built.zero_grad()
        losses.append(loss.item())
    return losses


def _kinds(network):
    from trainer.engines.optimizer import kinds_of

    kinds = kinds_of(network)
    return [(p, kinds[name]) for name, p in network.named_parameters()]


@pytest.mark.parametrize(
    "config",
    [
        FSDP(precision="fp32", activation_checkpointing=True),
        DeepSpeed(stage=2, precision="fp32"),
        DeepSpeed(stage=3, precision="fp32", activation_checkpointing=True),
        FSDP(precision="fp32", compile=True, activation_checkpointing=True),
    ],
    ids=["fsdp-checkpointing", "zero2", "zero3-checkpointing", "fsdp-compiled"],
)
def test_it_trains_as_alone(config, alone):
    for losses in ranks(2).run(train, config, timeout_s=900):
        torch.testing.assert_close(losses, alone, rtol=2e-5, atol=0.0)
    assert alone[-1] != alone[0]


def test_all_but_the_ends_is_in_blocks():
    """What engines leave to the root are the ends, the projections around transformers, and the embeddings."""
    network = UNet(**CONFIG)
    blocks = {id(p) for block in blocks_of(network) for p in block.parameters()}
    outside = {name.split(".")[-2] for name, p in network.named_parameters() if id(p) not in blocks}
    assert outside == {"conv_in", "conv_out", "conv_norm_out", "norm", "proj_in", "proj_out", "up", "down"}


@traced_only()
def test_every_kind_of_block_compiles_to_few_graphs_for_all_shapes():
    """Two, and a third where one block gets a view and another does not: a transformer's first and its second."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = initialize(UNet(**CONFIG), 7)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batches = [batch_of(0, n=4, side=8), batch_of(1, n=3, side=12), batch_of(2, n=5, side=16)]
    expected = [loss_of(network, batch).detach() for batch in batches]
    compile_blocks(network)
    kinds = {block.forward.__name__ for block in blocks_of(network)}
    with torch._dynamo.config.patch(recompile_limit=3):
        for batch, value in zip(batches, expected, strict=True):
            torch.testing.assert_close(loss_of(network, batch).detach(), value, rtol=1e-5, atol=1e-6)
    assert len(kinds) > 8  # the compiler's own limit for one function
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(kinds) + 1
