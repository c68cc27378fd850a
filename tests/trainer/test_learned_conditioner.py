"""A conditioner that learns with the denoiser: under every engine its gradient is that of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from data.draws import slice_draws
from models.conditioner import Conditioner
from models.conditions import ClassEncoder, SemanticMap
from models.densities import Uniform
from models.first_stage import Identity
from models.guidance import Guidance
from models.initialization import initialize
from models.layout import Layout, LayoutEncoder
from models.parameterizations import Noise
from models.process import Process
from models.samplers import Euler
from models.schedules import ScaledLinear
from models.token_transformer import BertTextEncoder
from models.weighting import Unweighted
from tests.trainer.ranks import ranks
from tests.trainer.toys import Seeded
from trainer.checkpoint.layout import box_views
from trainer.engines.base import EngineConfig
from trainer.engines.deepspeed import DeepSpeed
from trainer.engines.fsdp import FSDP
from trainer.engines.optimizer import AdamW
from trainer.objectives.diffusion import Diffusion

ENGINES: dict[str, EngineConfig] = {
    "fsdp": FSDP(precision="fp32"),
    "checkpointed": FSDP(precision="fp32", activation_checkpointing=True),
    "zero1": DeepSpeed(precision="fp32", stage=1),
    "zero3": DeepSpeed(precision="fp32", stage=3),
}
OPTIMIZER = AdamW(weight_decay=0.0, max_grad_norm=None)
TINY = {"width": 8, "layers": 2, "heads": 2, "head_dim": 4}


class Reader(Seeded):
    """A denoiser that reads a context and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(6, 8, 3, padding=1)
        self.of_context = nn.Linear(8, 8)
        self.exit = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, concat: Tensor) -> Tensor:
        told = self.of_context(context).tanh().mean(1) + (timestep[:, None] / 1000).sin()
        return self.exit(nn.functional.silu(self.entry(torch.cat([x, concat], 1)) + told[:, :, None, None]))


def networks_of(meta: bool) -> dict[str, nn.Module]:
    with torch.device("meta" if meta else "cpu"):
        text = BertTextEncoder(None, length=12, vocabulary=100, **TINY)
        encoders = [ClassEncoder(5, 8), text, LayoutEncoder(classes=4, objects=2, vocabulary=26, **TINY)]
        conditioner = Conditioner(encoders, dropped="empty", maps=[SemanticMap(4, 3)])
        networks: dict[str, nn.Module] = {"denoiser": Reader(), "conditioner": conditioner}
    if not meta:
        networks = {name: initialize(network, 7, name) for name, network in networks.items()}
    return networks | {"first_stage": Identity()}


def objective() -> Diffusion:
    process = Process(ScaledLinear(0.0015, 0.0195, 1000), Noise(), Uniform(), Unweighted())
    return Diffusion(process, Euler(2), Guidance(), caption_dropout=0.3, error="absolute", train_conditioner=True)


def batch_of(n: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    boxes = [Layout((i % 4,), ((0.0, 0.1 * i, 0.5, 1.0),)) for i in range(n)]
    return Batch(
        draws=slice_draws(3, 0, 0, n),
        keys=[str(i) for i in range(n)],
        captions=[f"number {i}" for i in range(n)],
        images=torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8),
        original_size=torch.full((n, 2), 8),
        crop=torch.zeros(n, 2, dtype=torch.int64),
        fields={
            "class": torch.arange(n) % 5,
            "boxes": boxes,
            "map": torch.randint(4, (n, 8, 8), generator=generator).to(torch.int16),
        },
    )


def first_moments(kind: str) -> tuple[dict[str, list], float]:
    """(1 - beta_1) times the gradient, after one step; and the loss."""
    goal = objective()
    phase = goal.phases[0]
    engine = ENGINES[kind].build(networks_of(meta=True), goal.phases, {phase.name: OPTIMIZER}, 7, torch.device("cpu"))
    (part, *_) = batch_of().split(8 // dist.get_world_size())[dist.get_rank() :]
    losses = []
    for last, one in enumerate(part.split(len(part) // 2)):
        with engine.accumulating(phase, last=bool(last)):
            given = goal.losses(phase, engine.networks, one)
            engine.backward(phase, given.per_sample.sum() / 8)
        losses.append(given.per_sample.sum().item() / 8)
    engine.step(phase, 1e-3)
    held: dict[str, list] = {}
    for shard in engine.shards("exp_avg"):
        for box, view in box_views(shard):
            held.setdefault(shard.name, []).append((shard.shape, box, view.clone()))
    return held, sum(losses)


@pytest.mark.parametrize("kind", ENGINES)
def test_gradients_reach_it_and_are_those_of_one_process(kind):
    networks, goal = networks_of(meta=False), objective()
    loss = goal.losses(goal.phases[0], networks, batch_of()).per_sample.mean()
    loss.backward()
    expected = {
        f"{network}.{name}": parameter.grad
        for network in ("denoiser", "conditioner")
        for name, parameter in networks[network].named_parameters()
    }
    assert all(gradient is not None and gradient.any() for gradient in expected.values())
    results = ranks(2).run(first_moments, kind)
    assert sum(loss for _, loss in results) == pytest.approx(loss.item(), rel=1e-5)
    found = {name: torch.full(gradient.shape, torch.nan) for name, gradient in expected.items()}
    for held, _ in results:
        for name, parts in held.items():
            for shape, box, values in parts:
                assert shape == found[name].shape
                place = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                found[name][place] = values.view(box.sizes)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], 0.1 * gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
