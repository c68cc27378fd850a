"""Small networks, and what a single process makes of them: the reference of every engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batch import Batch
from models.initialization import initialize
from trainer.engines.base import Engine
from trainer.engines.optimizer import AdamW
from trainer.gradients import LastLayer
from trainer.objectives.base import Losses, Objective, Phase


class Seeded(nn.Module):
    """Fills matrices with a normal of their fan-in, the rest near one (scales) or zero."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        if tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:
            tensor.normal_(float("norm" in name and "weight" in name), 0.1, generator=generator)

    def init_buffers(self) -> None:
        for buffer in self.buffers():
            buffer.copy_(torch.linspace(-0.5, 0.5, buffer.numel()).view_as(buffer))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x) + shift)))


class Denoiser(Seeded):
    """(n, 5), timestep (n,), label (n,) -> (n, 5). Sizes that no world divides, a buffer, an embedding, and a parameter
    of the network's own."""

    block_lists = ("blocks",)

    def __init__(self, width: int = 11, depth: int = 3):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.embed = nn.Embedding(3, width)
        self.entry = nn.Linear(5, width)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.exit = nn.Linear(width, 5)
        self.register_buffer("position", torch.zeros(width))

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32, "a timestep loses its meaning in low precision"
        x = self.entry(x) * self.scale
        x = x + self.position.to(x.dtype) + self.embed(label)
        shift = self.time((timestep[:, None] - 998).sin().to(x.dtype))
        for block in self.blocks:
            x = block(x, shift)
        return self.exit(x)


class Generator(Seeded):
    """(n, 3, 6, 6) -> the same. Ends in the convolution at which losses are weighed."""

    block_lists = ("blocks",)

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 7, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(7, 7, 3, padding=1) for _ in range(2)])
        self.exit = nn.Conv2d(7, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = x + nn.functional.silu(block(x))
        return self.exit(x)


class Discriminator(Seeded):
    """(n, 3, 6, 6) -> (n,)."""

    block_lists = ("blocks",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 5, 4, stride=2), nn.Conv2d(5, 5, 2)])
        self.exit = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = nn.functional.leaky_relu(block(x), 0.2)
        return self.exit(x.flatten(1)).squeeze(1)


@dataclass
class Trace:
    """What a training left behind."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def batch_of(step: int, n: int = 8) -> dict[str, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        "x": torch.randn(n, 5, generator=generator),
        "target": torch.randn(n, 5, generator=generator),
        "timestep": 1000 * torch.rand(n, generator=generator),
        "label": torch.randint(0, 3, (n,), generator=generator),
        "image": torch.randn(n, 3, 6, 6, generator=generator),
    }


DENOISE = (Phase("main", ("denoiser",)),)
ADVERSARIAL = (Phase("discriminator", ("discriminator",)), Phase("generator", ("generator",)))
OPTIMIZER = AdamW(weight_decay=0.1, max_grad_norm=1.0)


def toy_networks(phases: Sequence[Phase], meta: bool = True) -> dict[str, nn.Module]:
    """The networks of the phases, on the meta device or (the reference's) initialised."""
    kinds = {"denoiser": Denoiser, "generator": Generator, "discriminator": Discriminator}
    names = [name for phase in phases for name in phase.trainable]
    with torch.device("meta" if meta else "cpu"):
        networks: dict[str, nn.Module] = {name: kinds[name]() for name in names}
    return networks if meta else {name: initialize(network, 7, name) for name, network in networks.items()}


def toy_loss(phase: Phase, networks: Any, batch: dict[str, Tensor]) -> Tensor:
    """(n,) losses. The generator's follows VQGAN: its adversarial part is weighed by the ratio of gradient norms at the
    last layer, over the slice."""
    if phase.name == "main":
        prediction = networks["denoiser"](batch["x"], timestep=batch["timestep"], label=batch["label"])
        return (prediction - batch["target"]).square().mean(1)
    if phase.name == "discriminator":
        with torch.no_grad():
            fake = networks["generator"](batch["image"])
        relu = nn.functional.relu
        return 0.5 * (relu(1 - networks["discriminator"](batch["image"])) + relu(1 + networks["discriminator"](fake)))
    with LastLayer(networks["generator"].exit) as last:
        fake = networks["generator"](batch["image"])
    nll = (fake - batch["image"]).abs().mean((1, 2, 3))
    adversarial = -networks["discriminator"](fake)
    nll_norm, adversarial_norm = last.gradient_norms([nll.mean(), adversarial.mean()])
    return nll + (nll_norm / (adversarial_norm + 1e-4)).clamp(0, 1e4) * adversarial


class Adversarial(Objective):
    """`toy_loss` of a run's pictures: two phases, and nothing of diffusion. It neither validates nor draws."""

    networks = ("generator", "discriminator")
    phases = ADVERSARIAL
    scope = "slice"

    def losses(self, phase: Phase, networks: Mapping[str, nn.Module], batch: Batch) -> Losses:
        return Losses(toy_loss(phase, networks, {"image": pixels(batch)}))


class ValidatedAdversarial(Adversarial):
    """The same, validated by its reconstruction error."""

    def validation_losses(self, networks: Mapping[str, nn.Module], batch: Batch) -> dict[str, Tensor]:
        error = networks["generator"](pixels(batch)) - pixels(batch)
        return {"loss": error.abs().mean((1, 2, 3)), "squared": error.square().mean((1, 2, 3))}


def pixels(batch: Batch) -> Tensor:
    return batch.images.float() / 127.5 - 1


def slices(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    n = len(batch["x"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, n, size)]


def learning_rate(step: int) -> float:
    return 0.02 / (1 + step / 10)


def train_alone(phases: Sequence[Phase], steps: int, size: int = 2, optimizer: AdamW = OPTIMIZER) -> Trace:
    """Plain torch: one process, one AdamW per phase, slices of `size` one after the other."""
    networks = toy_networks(phases, meta=False)
    optimizers = {}
    for phase in phases:
        named = [(n, p) for name in phase.trainable for n, p in networks[name].named_parameters()]
        decayed = [p for n, p in named if p.ndim > 1 and "embed" not in n]
        plain = [p for n, p in named if p.ndim <= 1 or "embed" in n]
        optimizers[phase.name] = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            betas=tuple(optimizer.betas),
            eps=optimizer.eps,
            foreach=False,
        )
    losses, norms = [], []
    for step in range(steps):
        batch = batch_of(step)
        for phase in phases:
            for name, network in networks.items():
                network.requires_grad_(name in phase.trainable)
            total = 0.0
            for part in slices(batch, size):
                loss = toy_loss(phase, networks, part).sum() / len(batch["x"])
                loss.backward()
                total += loss.item()
            parameters = [p for name in phase.trainable for p in networks[name].parameters()]
            norms.append(nn.utils.clip_grad_norm_(parameters, optimizer.max_grad_norm or float("inf")).item())
            losses.append(total)
            for group in optimizers[phase.name].param_groups:
                group["lr"] = learning_rate(step)
            optimizers[phase.name].step()
            optimizers[phase.name].zero_grad()
    names = {p: f"{name}.{n}" for name, network in networks.items() for n, p in network.named_parameters()}
    moments = {
        f"{names[p]}/{kind}": state[kind]
        for o in optimizers.values()
        for p, state in o.state.items()
        for kind in ("exp_avg", "exp_avg_sq")
    }
    return Trace(losses, norms, {n: p.detach() for p, n in names.items()}, moments)


def train(engine: Engine, phases: Sequence[Phase], steps: range, size: int = 2) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of an engine over the same batches: this rank's slices, one pass each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses, norms = [], []
    for step in steps:
        batch = batch_of(step)
        n = len(batch["x"])
        mine = {k: v[rank * n // world : (rank + 1) * n // world] for k, v in batch.items()}
        for phase in phases:
            passes = slices(mine, size)
            total = torch.zeros(())
            for i, part in enumerate(passes):
                with engine.accumulating(phase, last=i == len(passes) - 1):
                    loss = toy_loss(phase, engine.networks, part).sum() / n
                    engine.backward(phase, loss)
                total += loss.detach()
            dist.all_reduce(total)
            losses.append(total.item())
            norms.append(engine.step(phase, learning_rate(step)).grad_norm)
    return losses, norms


def held(engine: Engine) -> dict[str, list]:
    """Every shard of this rank, to be sent to the test's process and joined there by `join`."""
    return {
        kind: [(s.name, s.shape, s.boxes, s.tensor.clone()) for s in engine.shards(kind)] for kind in engine.kinds()
    }


def join(parts: Sequence[dict[str, list]], kind: str) -> dict[str, Tensor]:
    """Whole tensors of all ranks' shards. Every element must be held by some rank, and replicas must be equal."""
    whole: dict[str, Tensor] = {}
    for name, shape, boxes, tensor in (shard for part in parts for shard in part[kind]):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        offset = 0
        for box in boxes:
            place = target[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))]
            numel = place.numel()
            values = tensor[offset : offset + numel].view(place.shape)
            offset += numel
            assert (place.isnan() | (place == values)).all(), f"two ranks disagree on {name}"
            place.copy_(values)
        assert offset == tensor.numel(), f"the boxes of {name} do not fill its tensor"
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"part of {name} is held by no rank"
    return whole
