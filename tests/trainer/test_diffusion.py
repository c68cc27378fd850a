"""Plain diffusion's losses: what is measured, of which noise, and the bound."""

import pytest
import torch
from torch import Tensor, nn

from conf.compose import compose
from conf.schema import build
from data.batch import Batch
from data.draws import slice_draws
from models.conditioner import Conditioner
from models.densities import Uniform
from models.first_stage import Identity
from models.given import Given
from models.guidance import Guidance
from models.initialization import initialize
from models.parameterizations import Noise
from models.process import Process
from models.samplers import Euler
from models.schedules import ScaledLinear
from models.unet import UNet
from models.weighting import Unweighted
from tools import cli
from trainer.objectives.diffusion import Diffusion

PROCESS = Process(ScaledLinear(), Noise(), Uniform(), Unweighted())
N, SIDE = 6, 8


class Remembers(nn.Module):
    """Predicts half of what it sees, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.seen.append((x, timestep))
        return x / 2


def batch_of(n: int = N) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        draws=slice_draws(3, 5, 1, n),
        keys=[""] * n,
        captions=[""] * n,
        images=torch.randint(0, 256, (n, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        original_size=torch.full((n, 2), SIDE),
        crop=torch.zeros(n, 2, dtype=torch.int64),
    )


def run(**options) -> tuple[Diffusion, dict[str, nn.Module], Remembers]:
    denoiser = Remembers()
    networks = {"denoiser": denoiser, "conditioner": Conditioner([]), "first_stage": Identity()}
    return Diffusion(PROCESS, Euler(2), Guidance(), **options), networks, denoiser


def noise_of(x_t: Tensor, timestep: Tensor, x0: Tensor) -> Tensor:
    alpha, sigma = PROCESS.alpha_sigma(((timestep + 1) / 1000).view(-1, 1, 1, 1))
    return (x_t - alpha * x0) / sigma


def test_absolute_and_squared_errors():
    batch = batch_of()
    x0 = batch.images.float() / 127.5 - 1
    for kind, error in [("squared", torch.square), ("absolute", torch.abs)]:
        objective, networks, denoiser = run(error=kind)
        losses = objective.losses(objective.phases[0], networks, batch)
        x_t, timestep = denoiser.seen[0]
        expected = error(x_t / 2 - noise_of(x_t, timestep, x0)).mean((1, 2, 3))
        torch.testing.assert_close(losses.per_sample, expected, rtol=1e-3, atol=1e-4)


def test_edms_loss_of_a_unet_is_the_papers():
    """Table 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 |D(x_0 + n) - x_0|^2, D = c_skip x + c_out F(c_in x)."""
    kinds = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    network = UNet([8, 16], **kinds, in_channels=3, out_channels=3, norm_num_groups=4, attention_head_dim=8)
    initialize(network, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    networks = {"denoiser": network, "conditioner": Conditioner([]), "first_stage": Identity()}
    objective = Diffusion(build(compose("train", ["process=edm"]).process), Euler(2), Guidance())
    batch = batch_of()
    losses = objective.losses(objective.phases[0], networks, batch)

    x0 = batch.images.float() / 127.5 - 1
    sigma = torch.exp(-1.2 + 1.2 * torch.special.ndtri(batch.draws.uniform("time"))).view(-1, 1, 1, 1)
    x, data, total = x0 + sigma * batch.draws.normal("noise", x0.shape[1:]), 0.5, sigma**2 + 0.25
    with torch.no_grad():
        told = network(x / total.sqrt(), 250 * sigma.log().flatten())
    denoised = data**2 / total * x + sigma * data / total.sqrt() * told
    expected = (total / (sigma * data) ** 2 * (denoised - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses.per_sample, expected, rtol=1e-3, atol=1e-4)


def test_offset_noise_is_one_number_for_a_channel():
    seen = {}
    for offset in (0.0, 0.05):
        objective, networks, denoiser = run(offset_noise=offset)
        objective.losses(objective.phases[0], networks, batch_of(64))
        seen[offset] = noise_of(*denoiser.seen[0], batch_of(64).images.float() / 127.5 - 1)
    added = seen[0.05] - seen[0.0]
    assert (added - added.mean((2, 3), keepdim=True)).abs().max() < 1e-3
    numbers = added.mean((2, 3))
    assert numbers.flatten().unique().numel() == numbers.numel()
    assert 0.04 < numbers.std() < 0.06


def test_offset_noise_is_drawn_apart_from_the_noise():
    """Of latents with many channels, whose offsets would else begin like the noise itself."""
    x0, t = torch.zeros(64, 16, 4, 4), torch.full((64,), 0.5)
    seen = []
    for offset in (0.0, 1.0):
        objective, _, denoiser = run(offset_noise=offset)
        objective.losses_at(denoiser, x0, {}, batch_of(64), t)
        seen.append(noise_of(*denoiser.seen[0], x0))
    noise, numbers = seen[0].flatten(1), (seen[1] - seen[0])[:, :, 0, 0]
    correlations = torch.corrcoef(torch.cat([noise, numbers], dim=1).T)[:256, 256:]
    assert correlations.abs().max() < 0.7


def test_validation_is_under_offset_noise_too():
    batch = batch_of()
    x0 = batch.images.float() / 127.5 - 1
    noises = []
    for offset in (0.0, 0.5):
        objective, networks, denoiser = run(offset_noise=offset, validation_times=4)
        objective.validation_losses(networks, batch)
        noises.append([noise_of(x_t, timestep, x0) for x_t, timestep in denoiser.seen])
    for plain, shifted in zip(*noises, strict=True):
        added = shifted - plain
        torch.testing.assert_close(added, added.mean((2, 3), keepdim=True).expand_as(added), rtol=0, atol=1e-3)
        assert added.mean((2, 3)).std() > 0.2


def test_offset_noise_belongs_to_the_sample():
    objective, networks, denoiser = run(offset_noise=1.0)
    batch = batch_of()
    objective.losses(objective.phases[0], networks, batch)
    for part in batch.split(2):
        objective.losses(objective.phases[0], networks, part)
    assert torch.equal(denoiser.seen[0][0], torch.cat([x for x, _ in denoiser.seen[1:]]))


def test_the_bound_is_estimated_in_validation():
    batch = batch_of()
    x0 = batch.images.float() / 127.5 - 1
    objective, networks, denoiser = run(bound_steps=1000, validation_times=4)
    values = objective.validation_losses(networks, batch)
    expected = []
    for x_t, timestep in denoiser.seen:
        t = (timestep + 1) / 1000
        expected.append(1000 * PROCESS.bound(x0, PROCESS.to_x0(x_t / 2, x_t, t), t, 1000))
    torch.testing.assert_close(values["bound"], torch.stack(expected).mean(0), rtol=1e-4, atol=0)
    without, networks, _ = run(validation_times=4)
    others = without.validation_losses(networks, batch)
    assert "bound" not in others
    assert torch.equal(others["loss"], values["loss"])


@pytest.mark.parametrize("process", ["edm", "rectified_flow", "v_cosine"])
def test_a_bound_in_steps_is_refused_of_a_process_without(process, capsys):
    arguments = ["train", f"process={process}", "objective.bound_steps=1000", "data.sources.a.shards=/nowhere"]
    assert cli.execute(arguments) == 2
    assert "objective.bound_steps=1000 is of a discrete process" in capsys.readouterr().err


class Keeps(nn.Module):
    """Three encoders and one other part, of which it gives nothing but remembers what is kept."""

    encoders, parts = 3, 4

    def forward(self, given: Given, keep: Tensor) -> dict[str, Tensor]:
        self.keep = keep
        return {}


def test_encoders_are_dropped_together_or_each_by_itself():
    """All three in a tenth of samples under SD3's rate of 46.4 % apart; in 10 % under one rate together."""
    n = 4000
    batch = batch_of(n)
    networks = {"conditioner": Keeps(), "first_stage": Identity()}
    for options, each, all_of_them in (
        ({"caption_dropout": 0.1}, 0.1, 0.1),
        ({"caption_dropout": 0.464, "dropout_apart": True}, 0.464, 0.464**3),
        ({"caption_dropout": [0.3, 0.3, 0.3]}, 0.3, 0.027),
        ({"caption_dropout": [0.3, 0.3, 0.3, 0.0]}, 0.3, 0.027),
    ):
        Diffusion(PROCESS, Euler(2), Guidance(), **options).conditions(networks, batch)
        dropped = ~networks["conditioner"].keep
        assert dropped[:, :3].float().mean(0).tolist() == pytest.approx([each] * 3, abs=0.03)
        assert dropped[:, :3].all(1).float().mean().item() == pytest.approx(all_of_them, abs=0.015)
        assert not dropped[:, 3].any()
    Diffusion(PROCESS, Euler(2), Guidance()).conditions(networks, batch, dropout=False)
    assert networks["conditioner"].keep.all()
