"""Samplers step by step against diffusers' schedulers and EDM's algorithm, and on a problem with a known solution."""

import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import conf
from models.guidance import Guidance, denoiser
from models.process import Process
from models.samplers import DDIM, PLMS, DPMSolverPP2M, Euler, Heun, KarrasTimes, Sampler, UniformTimes

SHAPE = (2, 3, 4, 4)
STEPS = 10


def build(*overrides: str):
    with initialize_config_dir(str(Path(conf.__file__).parent), version_base=None):
        return instantiate(compose(overrides=[f"+{o}" if "/" not in o and "." not in o else o for o in overrides]))


def process_of(name: str, *overrides: str) -> Process:
    return build(f"process={name}", *overrides).process


class Network(torch.nn.Module):
    """A smooth, nonlinear stand-in for a denoising network; it heeds the timestep unless told not to."""

    def __init__(self, heeds_time: bool = True):
        super().__init__()
        self.time_gain = 0.1 if heeds_time else 0.0
        self.calls: list[torch.Tensor] = []

    def forward(self, x, timestep):
        self.calls.append(timestep)
        return torch.tanh(0.7 * x.roll(1, -1) - 0.3 * x) + self.time_gain * torch.sin(timestep / 300).view(-1, 1, 1, 1)


def keyed_noise(purpose: str, step: int) -> torch.Tensor:
    seed = {"start": 1, "step": 2, "churn": 3}[purpose] * 1000 + step
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def ours(sampler: Sampler, process: Process, heeds_time: bool = True) -> tuple[list[torch.Tensor], list[float]]:
    network = Network(heeds_time)
    steps = list(sampler.trajectory(denoiser(network, process, {}), process, keyed_noise))
    assert all(call.shape == (SHAPE[0],) and call.dtype == torch.float32 for call in network.calls)
    return steps, [call[0].item() for call in network.calls]


def assert_same_steps(mine: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    assert len(mine) == len(theirs) == STEPS
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        error = (a - b).norm() / b.norm()
        assert error < tolerance, f"step {step}: relative error {error:.1e}"


def run_scheduler(scheduler, x, heeds_time: bool = True) -> tuple[list[torch.Tensor], list[float]]:
    """diffusers' own loop: scale, predict, step."""
    network, samples, timesteps = Network(heeds_time), [], []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = network(scaled, t.float().expand(SHAPE[0]))
        x = scheduler.step(prediction, t, x).prev_sample
        samples.append(x)
        timesteps.append(t.item())
    return samples, timesteps


# Against diffusers


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_equals_flow_match_euler_on_its_own_times(shift: float):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0))
    # diffusers has shifted its last time, 1 / 1000, before it shifts the whole grid
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)
    mine, calls = ours(Euler(STEPS, UniformTimes(shift, last)), process_of("rectified_flow"))
    assert calls == pytest.approx(timesteps, rel=1e-5)
    assert_same_steps(mine, theirs)


def test_euler_equals_flow_match_euler_on_equidistant_times_with_the_processs_shift():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0))
    mine, calls = ours(Euler(STEPS), process_of("rectified_flow", "process.shift=2.0"))
    assert calls == pytest.approx(timesteps, rel=1e-5)
    assert_same_steps(mine, theirs)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_equals_flow_match_heun(shift: float):
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(STEPS)
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0))
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)
    mine, calls = ours(Heun(STEPS, UniformTimes(shift, last)), process_of("rectified_flow"))
    assert calls == pytest.approx(timesteps, rel=1e-5)
    # of every two diffusers steps the first is a half-step; the last step is one alone
    assert_same_steps(mine, [*theirs[1:-1:2], theirs[-1]])


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("formulation", "prediction"), [("eps_linear", "epsilon"), ("v_linear", "v_prediction")])
def test_ddim_equals_diffusers(eta: float, formulation: str, prediction: str):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    x, network, theirs = keyed_noise("start", 0), Network(), []
    for i, t in enumerate(scheduler.timesteps):
        fresh = keyed_noise("step", i) if eta else None
        x = scheduler.step(network(x, t.float().expand(SHAPE[0])), t, x, eta=eta, variance_noise=fresh).prev_sample
        theirs.append(x)
    mine, calls = ours(DDIM(STEPS, eta), process_of(formulation))
    assert calls == pytest.approx(scheduler.timesteps.tolist(), abs=1e-4)
    assert_same_steps(mine, theirs, tolerance=5e-5)


LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("eta", [0.0, 0.6])  # at 1, diffusers' first step has the root of its rounding
def test_ddim_from_pure_noise_equals_diffusers(eta: float):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **LINEAR,
        clip_sample=False,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )
    scheduler.set_timesteps(STEPS)
    x, network, theirs = keyed_noise("start", 0), Network(), []
    for i, t in enumerate(scheduler.timesteps):
        fresh = keyed_noise("step", i) if eta else None
        x = scheduler.step(network(x, t.float().expand(SHAPE[0])), t, x, eta=eta, variance_noise=fresh).prev_sample
        theirs.append(x)
    mine, calls = ours(DDIM(STEPS, eta), process_of("v_zero_snr"))
    assert calls == pytest.approx(scheduler.timesteps.tolist(), abs=1e-4)
    assert_same_steps(mine, theirs, tolerance=5e-5)


@pytest.mark.parametrize(("formulation", "prediction"), [("eps_linear", "epsilon"), ("v_linear", "v_prediction")])
def test_ddim_at_the_steps_of_stable_diffusion_equals_its_pipelines(formulation: str, prediction: str):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    scheduler.set_timesteps(STEPS)
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0))
    sampler = build("sampler=ddim_sd", f"sampler.steps={STEPS}").sampler
    mine, calls = ours(sampler, process_of(formulation))
    assert calls == pytest.approx(timesteps, abs=1e-4)
    assert_same_steps(mine, theirs, tolerance=5e-5)


def test_plms_equals_stable_diffusions_pipeline():
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**LINEAR, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0))
    mine, calls = ours(build("sampler=plms", f"sampler.steps={STEPS}").sampler, process_of("eps_linear"))
    assert calls == pytest.approx(timesteps, abs=1e-4)
    # its first step is the two calls of an improved Euler step
    assert_same_steps(mine, theirs[1:], tolerance=5e-5)


def test_euler_at_the_steps_of_sdxl_equals_its_pipeline():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**LINEAR, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(STEPS)
    process = process_of("eps_linear")
    start = keyed_noise("start", 0) * scheduler.init_noise_sigma
    theirs, timesteps = run_scheduler(scheduler, start)
    sampler = build("sampler=euler_sdxl", f"sampler.steps={STEPS}").sampler
    times = sampler.grid.times(process, STEPS)
    mine, calls = ours(sampler, process)
    assert calls == pytest.approx(timesteps, abs=1e-4)
    alphas = [process.alpha_sigma(t)[0].float() for t in times[1:]]
    assert_same_steps(mine, [x * alpha for x, alpha in zip(theirs, alphas, strict=True)], tolerance=5e-5)


@pytest.mark.parametrize("formulation", ["eps_linear", "v_linear", "rectified_flow"])
def test_dpm_solver_equals_diffusers(formulation: str):
    from diffusers import DPMSolverMultistepScheduler

    common = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    if formulation == "rectified_flow":
        scheduler = DPMSolverMultistepScheduler(
            **common, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    else:
        scheduler = DPMSolverMultistepScheduler(
            **common,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            prediction_type={"eps_linear": "epsilon", "v_linear": "v_prediction"}[formulation],
        )
    scheduler.set_timesteps(STEPS)
    # diffusers cuts the timesteps of flows to whole numbers, so there the network must not heed them
    heeds_time = formulation != "rectified_flow"
    start = keyed_noise("start", 0)
    if formulation == "rectified_flow":  # its first sigma is just below 1, where ours scale the noise to unit variance
        start = start * torch.hypot(scheduler.sigmas[0], 1 - scheduler.sigmas[0])
    theirs, timesteps = run_scheduler(scheduler, start, heeds_time)
    process = process_of(formulation)
    if formulation == "rectified_flow":
        mine, calls = ours(DPMSolverPP2M(STEPS, GivenTimes(scheduler.sigmas.tolist())), process, heeds_time)
        assert calls == pytest.approx(timesteps, abs=1)
    else:
        mine, calls = ours(DPMSolverPP2M(STEPS), process)
        assert calls == pytest.approx(timesteps, abs=1e-3)
    assert_same_steps(mine, theirs, tolerance=5e-5)


class GivenTimes(UniformTimes):
    """Times written down by the test."""

    def __init__(self, times: list[float]):
        super().__init__()
        self.given = torch.tensor(times, dtype=torch.float64)

    def times(self, process, steps):
        assert len(self.given) == steps + 1
        return self.given


def test_euler_on_karras_levels_equals_edm_euler():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    scheduler.set_timesteps(STEPS)
    theirs, timesteps = run_scheduler(scheduler, keyed_noise("start", 0) * scheduler.init_noise_sigma)
    process = process_of("edm", "process.path.time_scale=0.25")
    mine, calls = ours(Euler(STEPS, KarrasTimes()), process)
    assert calls == pytest.approx(timesteps, rel=1e-4, abs=1e-5)
    assert_same_steps(mine, theirs)


def test_ddim_with_full_eta_equals_euler_ancestral():
    from diffusers import EulerAncestralDiscreteScheduler

    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    process = process_of("eps_linear")
    alphas = [process.alpha_sigma(t)[0] for t in UniformTimes().times(process, STEPS)]
    x, network, theirs = keyed_noise("start", 0) / alphas[0].float(), Network(), []
    for i, t in enumerate(scheduler.timesteps):
        prediction = network(scheduler.scale_model_input(x, t), t.float().expand(SHAPE[0]))
        fresh = keyed_noise("step", i)
        with FixedNoise(fresh):
            x = scheduler.step(prediction, t, x).prev_sample
        theirs.append(x * alphas[i + 1].float())
    mine, _ = ours(DDIM(STEPS, eta=1.0), process)
    assert_same_steps(mine, theirs, tolerance=5e-5)


class FixedNoise:
    """Within it, diffusers' ancestral scheduler draws the given numbers."""

    def __init__(self, noise: torch.Tensor):
        self.noise = noise

    def __enter__(self):
        from diffusers.schedulers import scheduling_euler_ancestral_discrete as module

        self.module, self.original = module, module.randn_tensor
        module.randn_tensor = lambda *_, **__: self.noise

    def __exit__(self, *_):
        self.module.randn_tensor = self.original


# Against EDM's algorithm, written down from the paper


@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_heun_with_churn_is_edms_algorithm_2(churn: float):
    process = process_of("edm", "process.path.time_scale=0.25")
    sampler = Heun(STEPS, KarrasTimes(0.01, 50.0), churn, churn_min=0.05, churn_max=30.0, churn_noise=1.003)
    mine, _ = ours(sampler, process)

    network, data = Network(), 0.5

    def denoise(x, sigma):
        c = math.sqrt(sigma**2 + data**2)
        raw = network(x / c, torch.full((SHAPE[0],), math.log(sigma) / 4))
        return data**2 / c**2 * x + sigma * data / c * raw

    levels = [(50 ** (1 / 7) + i / (STEPS - 1) * (0.01 ** (1 / 7) - 50 ** (1 / 7))) ** 7 for i in range(STEPS)] + [0.0]
    x, theirs = keyed_noise("start", 0) * math.sqrt(50**2 + 1), []
    for i in range(STEPS):
        gamma = min(churn / STEPS, math.sqrt(2) - 1) if 0.05 <= levels[i] <= 30 else 0
        raised = levels[i] * (1 + gamma)
        if gamma:
            x = x + math.sqrt(raised**2 - levels[i] ** 2) * 1.003 * keyed_noise("churn", i)
        slope = (x - denoise(x, raised)) / raised
        following = x + (levels[i + 1] - raised) * slope
        if levels[i + 1]:
            slope_there = (following - denoise(following, levels[i + 1])) / levels[i + 1]
            following = x + (levels[i + 1] - raised) * (slope + slope_there) / 2
        x = following
        theirs.append(x)
    assert_same_steps(mine, theirs)


# On Gaussian data, where the exact denoiser and the ODE's solution are known

FORMULATIONS = [
    "rectified_flow",
    "eps_linear",
    "v_linear",
    "v_zero_snr",
    "eps_cosine",
    "v_cosine",
    "edm",
    "edm_rf",
    "edm_cosine",
]
MEAN, STD = 0.7, 0.3


def gaussian_error(sampler: Sampler, process: Process) -> float:
    """Relative error at t = 0 against the ODE's solution: the standardised sample is carried along unchanged."""

    def denoise(x, t):
        alpha, sigma = process.alpha_sigma(t)
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)

    start = sampler.grid.times(process, sampler.steps)[0]
    alpha, sigma = process.alpha_sigma(start)
    x = torch.hypot(alpha, sigma) * keyed_noise("start", 0)
    exact = MEAN + STD * (x - alpha * MEAN) / torch.sqrt(alpha**2 * STD**2 + sigma**2)
    result = sampler.sample(denoise, process, keyed_noise)
    return ((result - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", FORMULATIONS)
@pytest.mark.parametrize("rule", [Euler, Heun, DPMSolverPP2M, PLMS])
def test_samplers_converge_to_the_odes_solution_at_their_order(name: str, rule: type[Sampler]):
    process = process_of(name)
    grid = UniformTimes() if name == "rectified_flow" else KarrasTimes()
    coarse, fine = gaussian_error(rule(40, grid), process), gaussian_error(rule(160, grid), process)
    assert fine < (0.05 if rule is Euler else 0.01)
    # four times the steps: first order divides the error by 4, second order by 16 (8 leaves room for the end steps)
    assert fine < coarse / (3 if rule is Euler else 6) or fine < 1e-4


@pytest.mark.parametrize("name", FORMULATIONS)
def test_every_sampler_is_finite_on_every_formulation(name: str):
    process = process_of(name)
    for sampler in [
        Euler(4),
        Heun(4, churn=1.0),
        DDIM(4, 1.0),
        DPMSolverPP2M(4),
        PLMS(6),
        PLMS(1),
        Heun(4, KarrasTimes(), churn=1.0),
        Euler(1),
    ]:
        result = sampler.sample(denoiser(Network(), process, {}), process, keyed_noise)
        assert result.isfinite().all() and result.dtype == torch.float32, type(sampler).__name__


def test_sampler_configs_build():
    for name in ["euler", "heun", "ddim", "dpmpp_2m", "edm_heun", "plms", "ddim_sd", "euler_sdxl"]:
        assert isinstance(build(f"sampler={name}").sampler, Sampler)


# Guidance


class Conditional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x, timestep, context):
        self.batches.append(len(x))
        return x * 0.5 + context.view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1) / 1000


def test_guidance_mixes_two_predictions_of_one_call():
    process, network = process_of("rectified_flow"), Conditional()
    condition, null = {"context": torch.tensor([1.0, 2.0])}, {"context": torch.tensor([0.0, 0.5])}
    t, x = torch.tensor(0.4, dtype=torch.float64), keyed_noise("start", 0)
    guided = denoiser(network, process, condition, null, Guidance(3.0))(x, t)
    assert network.batches == [4]
    alone = [denoiser(Conditional(), process, c)(x, t) for c in (null, condition)]
    torch.testing.assert_close(guided, alone[0] + 3.0 * (alone[1] - alone[0]))


def test_guidance_acts_within_its_interval_only():
    process, network = process_of("rectified_flow"), Conditional()
    condition, null = {"context": torch.ones(2)}, {"context": torch.zeros(2)}
    denoise = denoiser(network, process, condition, null, Guidance(3.0, low=0.2, high=0.7))
    for t in [0.1, 0.2, 0.5, 0.7, 0.9]:
        denoise(keyed_noise("start", 0), torch.tensor(t, dtype=torch.float64))
    assert network.batches == [2, 4, 4, 4, 2]


def test_guidance_configs_build_and_impossible_settings_are_refused():
    assert build("guidance=cfg").guidance.scale == 4.5
    assert build("guidance=none").guidance.scale == 1.0
    with pytest.raises(ValueError, match="needs null conditions"):
        denoiser(Conditional(), process_of("rectified_flow"), {}, None, Guidance(2.0))
    with pytest.raises(ValueError, match="interval"):
        Guidance(2.0, low=0.5, high=0.4)
    with pytest.raises(ValueError, match="at least one step"):
        Euler(0)
    with pytest.raises(ValueError, match="eta"):
        DDIM(10, eta=1.5)
