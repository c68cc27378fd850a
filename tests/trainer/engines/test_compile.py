"""Compiled blocks under sharding: the same numbers, few graphs, and an error rather than a silent fall back."""

import re

import pytest
import torch
from torch import nn

from models.unet import UNet
from models.unet_blocks import Conv
from tests.trainer.ranks import ranks
from tests.trainer.toys import DENOISE, OPTIMIZER, batch_of, held, join, toy_loss, toy_networks
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.engines.networks import compile_all


def train_shapes(config):
    """Steps on batches of changing size. Returns losses, state, graphs compiled, and the error at a too low limit."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = config.build(toy_networks(DENOISE), DENOISE, {"main": OPTIMIZER}, 7, torch.device("cpu"))
    (phase,) = DENOISE
    losses = []

    def step(n: int) -> None:
        with engine.accumulating(phase, last=True):
            loss = toy_loss(phase, engine.networks, batch_of(n, n)).sum() / n
            engine.backward(phase, loss)
        engine.step(phase, 0.01)
        losses.append(loss.item())

    for n in (4, 6, 8, 3):
        step(n)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    state = held(engine)
    if not config.compile:
        return losses, state, graphs, ""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        try:
            for n in (4, 6):
                step(n)
        except Exception as error:
            return losses[:4], state, graphs, type(error).__name__
    return losses, state, graphs, "no error"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eager", "compiled"),
    [
        (FSDP(precision="fp32"), FSDP(precision="fp32", compile=True, activation_checkpointing=True)),
        (DeepSpeed(stage=2, precision="fp32"), DeepSpeed(stage=2, precision="fp32", compile=True)),
    ],
    ids=["fsdp", "zero2"],
)
def test_blocks_compile_to_two_graphs_for_all_shapes(eager, compiled):
    reference = ranks(2).run(train_shapes, eager)
    results = ranks(2).run(train_shapes, compiled)
    for losses, _, graphs, error in results:
        torch.testing.assert_close(losses, reference[0][0], rtol=1e-5, atol=0.0)
        assert graphs == 2
        assert error == "FailOnRecompileLimitHit"
    weights, expected = (join([part for _, part, _, _ in runs], "weight") for runs in (results, reference))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_convolutions_read_their_weights_where_they_are():
    """Forward and backward allocate nothing of the weight's size, but its gradient."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    torch._dynamo.reset()
    block = nn.ModuleList([Conv(24, 40)])
    compile_all(block, UNet.compiler_options)
    x = torch.randn(2, 24, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    _, codes = run_fw_bw_and_get_code(lambda: block[0](x))
    assert len(codes) == 2
    for code in codes:
        assert "convolution" in code
        assert not re.search(r"empty_strided_cpu\(\(40, (3, 3, 24|24, 3, 3)\)", code)
