"""muP: activations and their changes keep their size over widths (arXiv 2203.03466, appendix D.1), at the base width
nothing changes, and every engine steps each matrix by its own rate."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.initialization import initialize
from models.mmdit import MMDiT
from tests.trainer.ranks import ranks
from tests.trainer.toys import held, join
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.engines.optimizer import AdamW, kinds_of, set_learning_rate
from trainer.objectives.base import Phase

WIDTHS = (64, 128, 256, 512)
BASE = 64


def network(width: int, base: int | None, **changes) -> MMDiT:
    settings = {
        **{"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2},
        **{"attention_head_dim": 32, "num_attention_heads": width // 32, "joint_attention_dim": 24},
        **{"pooled_projection_dim": 24, "pos_embed_max_size": 4, "qk_norm": "rms_norm", "base_width": base},
    }
    return initialize(MMDiT(**(settings | changes)), seed=0)


def inputs(seed: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((8, 4, 8, 8), (8, 5, 24), (8, 24))
    x, context, pooled = (torch.randn(shape, generator=rng) for shape in shapes)
    return x, torch.rand(8, generator=rng) * 1000, context, pooled


def train(denoiser: MMDiT, steps: int, lr: float) -> None:
    optimizer = AdamW(weight_decay=0.0).build((p, kinds_of(denoiser)[n]) for n, p in denoiser.named_parameters())
    set_learning_rate(optimizer, lr)
    target = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for step in range(steps):
        optimizer.zero_grad()
        (denoiser(*inputs(step % 2)) - target).square().mean().backward()
        optimizer.step()


def coordinates(width: int, base: int | None, steps: int = 4, lr: float = 0.02) -> dict[str, float]:
    """Mean sizes of activations after a few steps, by the module that gives them, and of the prediction."""
    denoiser = network(width, base)
    train(denoiser, steps, lr)
    sizes: dict[str, float] = {}
    modules = {
        "text": denoiser.text_embedding,
        "vector": denoiser.time_embedding,
        "modulation": denoiser.blocks[1].image.modulation,
        "attention": denoiser.blocks[1].image.attention.out,
        "mlp": denoiser.blocks[1].image.mlp.down,
        "prediction": denoiser.final,
    }

    def keep(name: str):
        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            sizes[name] = output.detach().abs().mean().item()

        return hook

    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        denoiser(*inputs(0))
    return sizes


def growth(sizes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Slopes of log size over log width."""
    logs = np.log2(WIDTHS)
    return {name: float(np.polyfit(logs, np.log2([s[name] for s in sizes]), 1)[0]) for name in sizes[0]}


def test_activations_keep_their_size_under_mup_and_grow_without():
    with_it = growth([coordinates(width, BASE) for width in WIDTHS])
    without = growth([coordinates(width, None) for width in WIDTHS])
    assert all(abs(slope) < 0.2 for slope in with_it.values()), with_it
    for name in ("modulation", "attention", "mlp", "prediction"):
        assert without[name] > with_it[name] + 0.3, (name, without, with_it)


def test_at_the_base_width_nothing_changes():
    plain, wide = network(BASE, None), network(BASE, BASE)
    for (name, a), (_, b) in zip(plain.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    train(plain, 2, 0.01)
    train(wide, 2, 0.01)
    assert torch.equal(plain(*inputs(0)), wide(*inputs(0)))
    assert {kind.factor for kind in kinds_of(plain).values()} == {1.0}


def test_variances_and_rates_follow_the_papers_table():
    base, wide = network(64, 64), network(512, 64)
    kinds = kinds_of(wide)
    weights = {n: (a, b) for (n, a), b in zip(base.named_parameters(), wide.parameters(), strict=True)}
    for name in ("patch_embedding.weight", "text_embedding.weight", "time_embedding.up.weight"):  # inputs
        a, b = weights[name]
        assert b.std().item() == pytest.approx(a.std().item(), rel=0.1) and kinds[name].factor == 1.0
    hidden = ("blocks.0.image.attention.linear.weight", "blocks.0.text.mlp.up.weight", "pooled_embedding.down.weight")
    for name in hidden:
        a, b = weights[name]
        assert b.std().item() == pytest.approx(a.std().item() / 8**0.5, rel=0.1) and kinds[name].factor == 1 / 8
    for name in ("final.weight", "final_modulation.weight", "blocks.1.image.modulation.weight"):
        assert not weights[name][1].any() and kinds[name].factor == 1 / 8
    assert all(kinds[name].factor == 1.0 for name, p in wide.named_parameters() if p.ndim == 1)


def test_attention_is_divided_by_the_channels_of_a_head():
    # Twice as wide by heads twice as wide: logits are divided by 64 where the root of 64 would be 8.
    wide = network(128, 64, attention_head_dim=64, num_attention_heads=2, base_head_dim=32)
    assert wide.blocks[0].scale == pytest.approx(32**0.5 / 64)
    assert network(128, 64).blocks[0].scale == pytest.approx(32**-0.5)


PHASE = Phase("denoise", ("denoiser",))
ENGINES = {
    "fsdp": FSDP(precision="fp32"),
    "zero1": DeepSpeed(stage=1, precision="fp32"),
    "zero3": DeepSpeed(stage=3, precision="fp32"),
}
ADAMW = AdamW(weight_decay=0.1)


def step_sharded(config) -> dict[str, list]:
    """One step, of a gradient that is the same on both ranks."""
    settings = network(128, 64).config
    with torch.device("meta"):
        denoiser = MMDiT(**settings)
    engine = config.build({"denoiser": denoiser}, (PHASE,), {"denoise": ADAMW}, 3, torch.device("cpu"))
    with engine.accumulating(PHASE, last=True):
        engine.backward(PHASE, engine.networks["denoiser"](*inputs(0)).sum() / 2)
    engine.step(PHASE, 0.01)
    return held(engine)


@pytest.mark.parametrize("config", ENGINES.values(), ids=ENGINES)
def test_engines_step_each_matrix_by_its_own_rate(config):
    found = join(ranks(2).run(step_sharded, config), "weight")
    alone = initialize(MMDiT(**network(128, 64).config), 3, "denoiser")
    optimizer = ADAMW.build((p, kinds_of(alone)[n]) for n, p in alone.named_parameters())
    set_learning_rate(optimizer, 0.01)
    alone(*inputs(0)).sum().backward()
    nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
    optimizer.step()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(found[f"denoiser.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
