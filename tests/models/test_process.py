"""The formulations of diffusion against closed forms (SD3, arXiv 2403.03206; EDM, arXiv 2206.00364) and diffusers."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import conf
from models.densities import CosMap, LogitNormal, Mode, Steps, Uniform
from models.parameterizations import EDMPreconditioning, Image, Noise, V, Velocity
from models.process import Process
from models.schedules import (
    EDM,
    Cosine,
    Linear,
    NoisePath,
    RectifiedFlow,
    ScaledLinear,
    SquaredCosine,
    VarianceExploding,
    ZeroTerminalSNR,
)
from models.weighting import MeasuredAs, MinSNR, Unweighted

FORMULATIONS = ["rectified_flow", "rectified_flow_image", "eps_linear", "eps_cosine", "v_linear", "v_cosine"]
FORMULATIONS += ["v_zero_snr", "edm", "edm_rf", "edm_cosine"]
PATHS = {
    "rectified flow": RectifiedFlow(),
    "cosine": Cosine(),
    "linear": ScaledLinear(),
    "DDPM's linear": Linear(),
    "squared cosine": SquaredCosine(),
    "zero terminal SNR": ZeroTerminalSNR(ScaledLinear()),
    "edm": EDM(),
    "exploding": VarianceExploding(Cosine()),
}
INNER = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def process_of(name: str, *overrides: str) -> Process:
    with initialize_config_dir(str(Path(conf.__file__).parent), version_base=None):
        return instantiate(compose(overrides=[f"+process={name}", *overrides]).process)


def plain(path, parameterization, density=None, weight=None, shift=1.0) -> Process:
    return Process(path, parameterization, density or Uniform(), weight or Unweighted(), shift)


def quantiles(count: int = 200_000) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def noise_weight(process: Process, t: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
    """w_t of L_w = -1/2 E[w_t lambda'_t |eps error|^2], for training times of the given density at t."""
    t = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(process.path.log_snr(t).sum(), t)
    t = t.detach()
    ratio = process.parameterization.error_ratio(*process.alpha_sigma(t))
    return -2 * process.loss_weight(t) * ratio * density / slope


def assert_proportional(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(actual / actual[0], expected / expected[0], rtol=rtol, atol=0)


# Paths


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_log_snr_agrees_with_the_coefficients_and_is_inverted_by_time(path: NoisePath):
    alpha, sigma = path.alpha_sigma(INNER)
    torch.testing.assert_close(path.log_snr(INNER), torch.log(alpha**2 / sigma**2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.time(path.log_snr(INNER)), INNER, rtol=1e-9, atol=1e-9)
    assert (path.log_snr(INNER).diff() < 0).all()


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_shift_moves_the_log_snr_by_minus_the_log_of_the_pixel_ratio(path: NoisePath):
    t = torch.linspace(0.2, 0.6, 9, dtype=torch.float64)
    pixels, base = 512 * 512, 384 * 384
    shifted = path.shift(t, math.sqrt(pixels / base))
    torch.testing.assert_close(path.log_snr(shifted) - path.log_snr(t), torch.full_like(t, -math.log(pixels / base)))


def test_resolution_shift_of_rectified_flow_is_the_papers_formula_and_keeps_the_ends():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    ratio = math.sqrt(1024**2 / 256**2)
    torch.testing.assert_close(RectifiedFlow().shift(t, ratio), ratio * t / (1 + (ratio - 1) * t))
    torch.testing.assert_close(NoisePath.shift(RectifiedFlow(), t, ratio), RectifiedFlow().shift(t, ratio))


@pytest.mark.parametrize(
    ("path", "betas"),
    [
        (ScaledLinear(0.00085, 0.012), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (Linear(), {"beta_schedule": "linear"}),
        (SquaredCosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_schedules_of_steps_equal_diffusers_at_every_step(path, betas):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**betas)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    alpha, sigma = path.alpha_sigma(t)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(path.network_time(t), torch.arange(1000, dtype=torch.float64))


def test_uniform_times_give_edm_the_papers_normal_log_snr():
    log_snr = EDM(p_mean=0.5, p_std=1.4).log_snr(quantiles())
    assert scipy.stats.kstest(log_snr.numpy(), scipy.stats.norm(-2 * 0.5, 2 * 1.4).cdf).statistic < 1e-4


def test_edm_network_time_is_c_noise():
    sigma = torch.tensor([0.01, 0.5, 1.0, 40.0], dtype=torch.float64)
    path = EDM()
    t = path.time(-2 * torch.log(sigma))
    torch.testing.assert_close(path.alpha_sigma(t)[1], sigma)
    torch.testing.assert_close(path.network_time(t), torch.log(sigma) / 4)


# Densities


def mode_cdf(t: np.ndarray, scale: float) -> np.ndarray:
    """P(time <= t): the map falls with u, so it is one minus the u that gives t, found by bisection."""
    low, high = np.zeros_like(t), np.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = 1 - middle - scale * (np.cos(np.pi * middle / 2) ** 2 - 1 + middle) > t
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return 1 - low


def integrated(density):
    """Distribution function of a density over (0, 1), by fine trapezoids."""
    grid = np.linspace(0, 1, 200_001)
    with np.errstate(all="ignore"):
        values = np.nan_to_num(density(grid))
    mass = np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 2 * np.diff(grid))])
    assert mass[-1] == pytest.approx(1, abs=1e-4)
    return lambda t: np.interp(t, grid, mass)


def logit_normal_density(mean: float, std: float):
    def density(t):
        logit = np.log(t / (1 - t))
        return np.exp(-((logit - mean) ** 2) / (2 * std**2)) / (std * np.sqrt(2 * np.pi) * t * (1 - t))

    return density


DENSITIES = {
    "uniform": (Uniform(), lambda t: t),
    "uniform(0.1, 0.3)": (Uniform(0.1, 0.3), lambda t: np.clip((t - 0.1) / 0.2, 0, 1)),
    **{
        f"logit-normal({m}, {s})": (LogitNormal(m, s), integrated(logit_normal_density(m, s)))
        for m, s in [(0.0, 1.0), (0.5, 0.6), (-1.0, 0.4), (1.0, 1.0)]
    },
    **{f"mode({s})": (Mode(s), lambda t, s=s: mode_cdf(t, s)) for s in [-1.0, 0.0, 1.29, 1.75]},
    "cosmap": (CosMap(), integrated(lambda t: 2 / (np.pi - 2 * np.pi * t + 2 * np.pi * t**2))),
}


@pytest.mark.parametrize(("density", "cdf"), DENSITIES.values(), ids=DENSITIES.keys())
def test_times_follow_the_papers_density(density, cdf):
    t = density.sample(quantiles()).numpy()
    assert t.min() >= 0 and t.max() <= 1
    assert scipy.stats.kstest(t, cdf).statistic < 1e-4


def test_cosmap_gives_rectified_flow_the_log_snr_of_the_cosine_path():
    u = quantiles(1001)
    torch.testing.assert_close(RectifiedFlow().log_snr(CosMap().sample(u)), Cosine().log_snr(u), rtol=1e-9, atol=1e-9)


def test_shifted_logit_normal_times_are_logit_normal_with_a_shifted_mean():
    process = plain(RectifiedFlow(), Velocity(), LogitNormal(0.0, 1.0), shift=3.0)
    expected = LogitNormal(math.log(3.0), 1.0).sample(quantiles(1001))
    torch.testing.assert_close(process.sample_t(quantiles(1001)), expected)


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_first_and_last_uniform_numbers_give_finite_training_quantities(name: str, shift: float):
    process = process_of(name, f"process.shift={shift}")
    t = process.sample_t(torch.tensor([0.0, 0.5, 1 - 2.0**-24]))
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t = process.add_noise(x0, noise, t)
    for value in [process.target(x0, noise, t), process.network_input(x_t, t), process.network_time(t)]:
        assert value.isfinite().all()
    assert process.loss_weight(t).isfinite().all() and (process.loss_weight(t) > 0).all()
    assert t.dtype == x_t.dtype == process.loss_weight(t).dtype == torch.float32


# Parameterizations


@pytest.mark.parametrize("name", FORMULATIONS)
def test_a_perfect_prediction_gives_back_image_and_noise(name: str):
    process = process_of(name)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x0, noise = torch.randn(2, 7, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t = process.add_noise(x0, noise, t)
    prediction = process.target(x0, noise, t)
    torch.testing.assert_close(process.to_x0(prediction, x_t, t), x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(process.to_noise(prediction, x_t, t), noise, rtol=1e-6, atol=1e-6)


def test_the_targets_are_the_ones_of_their_papers():
    x0, noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    angle = (t * math.pi / 2)[:, None]
    torch.testing.assert_close(plain(RectifiedFlow(), Velocity()).target(x0, noise, t), noise - x0)
    torch.testing.assert_close(plain(RectifiedFlow(), Image()).target(x0, noise, t), x0)
    torch.testing.assert_close(plain(Cosine(), Noise()).target(x0, noise, t), noise)
    torch.testing.assert_close(plain(Cosine(), V()).target(x0, noise, t), angle.cos() * noise - angle.sin() * x0)


def test_edm_denoiser_is_the_papers_preconditioned_network():
    sigma = torch.tensor([0.02, 0.5, 7.0], dtype=torch.float64)
    data = 0.5
    process = plain(EDM(), EDMPreconditioning(data))
    t = process.path.time(-2 * torch.log(sigma))
    x, prediction = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = sigma[:, None]
    skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    torch.testing.assert_close(process.to_x0(prediction, x, t), skip * x + out * prediction)
    torch.testing.assert_close(process.network_input(x, t), x / (s**2 + data**2).sqrt())


def test_edm_loss_weighs_the_images_error_by_the_papers_lambda():
    sigma = torch.tensor([0.02, 0.5, 7.0], dtype=torch.float64)
    data = 0.5
    process = plain(EDM(), EDMPreconditioning(data))
    t = process.path.time(-2 * torch.log(sigma))
    x0, noise, error = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x_t = process.add_noise(x0, noise, t)
    prediction = process.target(x0, noise, t) + error
    image_error = (process.to_x0(prediction, x_t, t) - x0).square().mean(1)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    torch.testing.assert_close(process.loss_weight(t) * error.square().mean(1), weight * image_error)


# Weights: every formulation as a weighting of the noise error (SD3, section 2 and 3.1)

ONES = torch.ones_like(INNER)


def test_rectified_flow_is_the_weighting_t_over_one_minus_t():
    weight = noise_weight(plain(RectifiedFlow(), Velocity()), INNER, ONES)
    torch.testing.assert_close(weight, INNER / (1 - INNER))


def test_a_density_of_times_multiplies_the_weighting():
    process = plain(RectifiedFlow(), Velocity(), LogitNormal(0.5, 0.6))
    counts = torch.histc(process.sample_t(quantiles()), bins=100, min=0, max=1) / len(quantiles()) * 100
    middles = (torch.arange(100, dtype=torch.float64) + 0.5)[20:80] / 100
    density = torch.from_numpy(logit_normal_density(0.5, 0.6)(middles.numpy()))
    expected = middles / (1 - middles) * density
    torch.testing.assert_close(noise_weight(process, middles, counts[20:80]), expected, rtol=0.02, atol=0)


def test_cosine_weightings_are_sech_for_noise_and_exponential_for_v():
    log_snr = Cosine().log_snr(INNER)
    assert_proportional(noise_weight(plain(Cosine(), Noise()), INNER, ONES), 1 / torch.cosh(log_snr / 2))
    assert_proportional(noise_weight(plain(Cosine(), V()), INNER, ONES), torch.exp(-log_snr / 2))


@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.2, 1.2), (0.6, 1.2), (0.0, 0.6)])
def test_edm_weighting_is_a_normal_density_times_the_preconditionings_factor(p_mean: float, p_std: float):
    process = process_of("edm", f"process.path.p_mean={p_mean}", f"process.path.p_std={p_std}")
    log_snr = process.path.log_snr(INNER)
    normal = torch.from_numpy(scipy.stats.norm(-2 * p_mean, 2 * p_std).pdf(log_snr.numpy()))
    assert_proportional(noise_weight(process, INNER, ONES), normal * (torch.exp(-log_snr) + 0.5**2))


@pytest.mark.parametrize("name", ["edm_rf", "edm_cosine"])
def test_the_hybrids_have_the_noise_levels_and_the_weighting_of_their_models(name: str):
    process = process_of(name)
    model = process_of({"edm_rf": "rectified_flow", "edm_cosine": "v_cosine"}[name])
    torch.testing.assert_close(process.path.log_snr(INNER), model.path.log_snr(INNER))
    torch.testing.assert_close(
        noise_weight(process, INNER, ONES), noise_weight(model, INNER, ONES), rtol=1e-6, atol=1e-9
    )


def test_measuring_a_formulation_as_itself_changes_nothing():
    weight = MeasuredAs(Cosine(), V())(INNER, Cosine(), V())
    torch.testing.assert_close(weight, ONES)


# Configs and errors


def test_study_formulations_are_overrides_of_the_configs():
    process = process_of("rectified_flow", "process/density=mode", "process.density.scale=1.75", "process.shift=3.0")
    assert isinstance(process.density, Mode) and process.density.scale == 1.75 and process.shift == 3.0
    assert isinstance(process_of("rectified_flow").density, LogitNormal)


def test_validation_times_are_equidistant_and_inside():
    times = process_of("rectified_flow").validation_times(8)
    assert times.tolist() == [(2 * i + 1) / 16 for i in range(8)]


@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_a_density_of_the_least_noisy_fifth_trains_and_validates_the_last_200_levels(shift):
    process = process_of("eps_linear", "process.density.high=0.2", f"process.shift={shift}")
    u = torch.cat([torch.zeros(1), quantiles().float(), torch.tensor([1 - 2.0**-24])])
    levels = process.network_time(process.sample_t(u))
    most = process.network_time(process.path.shift(torch.tensor(0.2), shift)).item()
    assert most == pytest.approx(199, abs=1e-4) or (shift < 1 and most < 199)
    assert levels.min() == pytest.approx(-1, abs=1e-3) and levels.max() == pytest.approx(most, abs=1e-3)
    times = process.validation_times(4)
    assert process.network_time(times).tolist() == pytest.approx(
        [(most + 1) * part - 1 for part in (1 / 8, 3 / 8, 5 / 8, 7 / 8)]
    )


def test_sampling_starts_at_one_or_where_the_image_can_still_be_found():
    assert process_of("rectified_flow").start_time() == 1
    assert process_of("rectified_flow_image").start_time() == 1
    assert process_of("v_cosine").start_time() == 1
    assert process_of("eps_linear").start_time() == 1
    for name in ["eps_cosine", "edm", "edm_rf", "edm_cosine"]:
        process = process_of(name)
        alpha, sigma = process.alpha_sigma(process.start_time())
        assert (sigma / alpha).item() == pytest.approx(80, rel=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Mode(1.8),
        lambda: Mode(-1.1),
        lambda: LogitNormal(0.0, 0.0),
        lambda: Uniform(0.5, 0.5),
        lambda: Uniform(0.0, 1.5),
        lambda: Steps(1000, high=1.5),
        lambda: Steps(10, low=0.51, high=0.54),
        lambda: EDM(p_std=-1.0),
        lambda: ScaledLinear(0.02, 0.01),
        lambda: EDMPreconditioning(0.0),
        lambda: plain(RectifiedFlow(), Velocity(), shift=0.0),
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(ValueError, match="must"):
        build()


def test_steps_are_the_integers_that_ddpm_draws():
    u = quantiles(10_000).float()
    process = plain(ScaledLinear(), Noise(), Steps(1000))
    told, counts = process.network_time(process.sample_t(u)).round(decimals=3).unique(return_counts=True)
    assert told.tolist() == list(range(1000)) and set(counts.tolist()) == {10}


def test_steps_of_a_part_are_those_of_its_levels():
    """SDXL's refiner: the 200 with the least noise; and a part between two ends."""
    u = quantiles(10_000).float()
    for density, expected in ((Steps(1000, high=0.2), range(200)), (Steps(1000, 0.2, 0.7), range(200, 700))):
        process = plain(ScaledLinear(), Noise(), density)
        told, counts = process.network_time(process.sample_t(u)).round(decimals=3).unique(return_counts=True)
        assert told.tolist() == list(expected) and set(counts.tolist()) == {10_000 // len(expected)}
        assert process.span == pytest.approx((expected[0] / 1000, (expected[-1] + 1) / 1000))


# What diffusers has functions for


def test_zero_terminal_snr_is_what_diffusers_rescales_to():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0).sqrt()
    path = ZeroTerminalSNR(ScaledLinear(0.00085, 0.012))
    steps = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = path.alpha_sigma(steps)
    torch.testing.assert_close(alpha, expected, rtol=1e-9, atol=1e-12)
    assert alpha[-1] == 0 and sigma[-1] == 1
    assert path.network_time(steps).tolist() == pytest.approx(range(1000))
    process = process_of("v_zero_snr")
    assert process.start_time() == 1
    assert process.sample_t(torch.tensor([0.0, 0.9999999])).isfinite().all()


@pytest.mark.parametrize("path", [ScaledLinear(), Cosine(), ZeroTerminalSNR(ScaledLinear())])
@pytest.mark.parametrize(
    ("parameterization", "published"),
    [
        (Noise(), lambda snr, capped: capped / snr),
        (V(), lambda snr, capped: capped / (snr + 1)),
        (Image(), lambda snr, capped: capped),
    ],
)
@pytest.mark.parametrize("gamma", [None, 1.0, 20.0])
def test_min_snr_weights_are_the_papers(path, parameterization, published, gamma):
    """Under the paper's gamma, which is the default, and others."""
    snr = torch.exp(path.log_snr(INNER))
    expected = published(snr, snr.clamp(max=gamma or 5.0))
    assert (snr > (gamma or 5)).any() and (snr < (gamma or 5)).any()
    weight = MinSNR() if gamma is None else MinSNR(gamma)
    torch.testing.assert_close(plain(path, parameterization, weight=weight).loss_weight(INNER), expected)


def test_min_snr_is_a_choice_of_the_process():
    assert isinstance(process_of("v_zero_snr", "process/weight=min_snr").weight, MinSNR)
    assert isinstance(process_of("eps_linear").weight, Unweighted)
    weights = process_of("eps_linear", "process/weight=min_snr", "process.weight.gamma=2").loss_weight(INNER)
    snr = torch.exp(ScaledLinear().log_snr(INNER))
    torch.testing.assert_close(weights, snr.clamp(max=2.0) / snr)
    with pytest.raises(ValueError, match="gamma"):
        MinSNR(0.0)


def test_the_bounds_terms_are_divergences_of_ddpms_posteriors():
    """Against the two Gaussians themselves (DDPM, arXiv 2006.11239, eq. 6 and 7), and LDM's weights on the error."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    product = torch.cumprod(1 - betas, 0)
    path = ScaledLinear(0.0015, 0.0195)
    process = plain(path, Noise())
    generator = torch.Generator().manual_seed(0)
    x0, estimate, noise = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    steps = torch.tensor([1, 2, 500, 999])
    t = (steps + 1) / 1000
    terms = process.bound(x0, estimate, t, 1000)
    for i, step in enumerate(steps.tolist()):
        beta, now, before = betas[step], product[step], product[step - 1]
        x_t = now.sqrt() * x0[i] + (1 - now).sqrt() * noise[i]
        std = (beta * (1 - before) / (1 - now)).sqrt()

        def posterior(image, x_t=x_t, beta=beta, now=now, before=before, std=std):
            mean = before.sqrt() * beta / (1 - now) * image + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t
            return torch.distributions.Normal(mean, std)

        divergence = torch.distributions.kl_divergence(posterior(x0[i]), posterior(estimate[i])).mean()
        assert terms[i].item() == pytest.approx(divergence.item(), rel=2e-3)  # float32 times
        # ldm.models.diffusion.ddpm: beta^2 / (2 variance alpha (1 - product)) on the noise's mean squared error
        ldm = beta**2 / (2 * std**2 * (1 - beta) * (1 - now))
        error = ((x0[i] - estimate[i]) * (now / (1 - now)).sqrt()).square().mean()
        assert terms[i].item() == pytest.approx((ldm * error).item(), rel=2e-3)
    first, second = process.bound(x0[:2], x0[:2] + 1, torch.tensor([1e-3, 2e-3], dtype=torch.float64), 1000)
    assert first == second > 0
