"""Samplers: from noise to an image along a process, given a denoiser.

All of them integrate the process's probability-flow ODE, which for any path x_t = alpha_t x_0 + sigma_t eps reads

    dx = x_0(x, t) d alpha + eps(x, t) d sigma,

with x_0 and eps the denoiser's estimates (eps = (x - alpha x_0) / sigma). On rectified flow this is dx = v dt, under
EDM dx = eps d sigma. So one formula serves every process, and a sampler is an integration rule on a grid of times.

Randomness comes from the caller: `noise(purpose, step)` returns standard normal numbers of the samples' shape.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.process import Process

# (x_t (n, ...), t: float64 scalar on the CPU) -> x_0 estimate (n, ...)
Denoise = Callable[[Tensor, Tensor], Tensor]


class NoiseSource(Protocol):
    """Where a sampler's randomness comes from."""

    def __call__(self, purpose: str, step: int) -> Tensor:
        """Standard normal numbers (n, ...), fixed by the arguments; purpose is "start", "step" or "churn"."""


# Grids of times


class TimeGrid(ABC):
    """The times at which the denoiser is called."""

    @abstractmethod
    def times(self, process: Process, steps: int) -> Tensor:
        """(steps + 1,) float64, falling from the start time to 0."""


class UniformTimes(TimeGrid):
    """Equidistant times, then the resolution shift.

    Args:
        shift: of the resolution; None takes the process's own, as it was trained.
        last: the last time before 0, before the shift; None means the spacing itself, 1 / steps. Stable Diffusion 3's
            pipelines take almost no last step: their 0.001, already shifted once (diffusers shifts it twice).
    """

    def __init__(self, shift: float | None = None, last: float | None = None):
        self.shift = shift
        self.last = last

    def times(self, process: Process, steps: int) -> Tensor:
        if self.last is None:
            t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        else:
            t = torch.cat([torch.linspace(1, self.last, steps, dtype=torch.float64), torch.zeros(1).double()])
        shift = process.shift if self.shift is None else self.shift
        # The ends stay; at t = 0 and 1 the log-SNR that a shift goes through is infinite.
        t[1:-1] = process.path.shift(t[1:-1], shift)
        # Where the process cannot start at 1, the grid is shrunk to start at its start time.
        return t * process.start_time()


class DiscreteTimes(TimeGrid):
    """Of the discrete steps that a network was trained on, as many as wanted, in one of diffusers' spacings. Step i of
    T stands at t = (i + 1) / T, as in `ScaledLinear`.

    Args:
        spacing: "leading": every (T // steps)-th step, raised by `offset`; "trailing": counted back from the last;
            "linspace": from the first to the last, between steps where they do not fall on any.
        offset: see `spacing`.
        train_steps: T.
        to_image: whether the last step ends at the image; else at the first discrete step, which still holds a little
            noise, as Stable Diffusion's published settings have it ("set_alpha_to_one": false).
    """

    def __init__(
        self,
        spacing: Literal["leading", "trailing", "linspace"] = "trailing",
        offset: int = 0,
        train_steps: int = 1000,
        to_image: bool = True,
    ):
        self.spacing = spacing
        self.offset = offset
        self.train_steps = train_steps
        self.to_image = to_image

    def times(self, process: Process, steps: int) -> Tensor:
        if steps > self.train_steps:
            raise ValueError(f"sampler.steps={steps}: there are {self.train_steps} discrete steps")
        if self.spacing == "leading":
            chosen = torch.arange(steps, dtype=torch.float64).flip(0) * (self.train_steps // steps) + self.offset
        elif self.spacing == "trailing":
            chosen = torch.round(self.train_steps * (1 - torch.arange(steps, dtype=torch.float64) / steps)) - 1
        else:
            chosen = torch.linspace(0, self.train_steps - 1, steps, dtype=torch.float64).flip(0)
        end = torch.zeros(1, dtype=torch.float64) if self.to_image else torch.ones(1, dtype=torch.float64)
        return torch.cat([(chosen + 1).clamp(max=self.train_steps), end]) / self.train_steps


class KarrasTimes(TimeGrid):
    """Noise levels whose 1/rho-th powers are equidistant (EDM, arXiv 2206.00364, eq. 5); on any path, of sigma / alpha.

    Args:
        sigma_min, sigma_max: last and first ratio of noise to signal; the first is the path's largest if that is less.
        rho: how strongly steps gather at low noise.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigmas must satisfy 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def times(self, process: Process, steps: int) -> Tensor:
        # A path that ends before sigma_max (the linear schedule does) begins at its own noisiest level.
        reached = process.path.time(torch.tensor(-2 * math.log(self.sigma_max), dtype=torch.float64))
        sigma_max = math.exp(-float(process.path.log_snr(reached)) / 2)
        root = 1 / self.rho
        ramp = torch.linspace(sigma_max**root, self.sigma_min**root, steps, dtype=torch.float64)
        t = process.path.time(-2 * self.rho * torch.log(ramp))
        return torch.cat([t, torch.zeros(1, dtype=torch.float64)])


# Where to begin and end


@dataclass(frozen=True)
class Course:
    """Which of a sampler's steps are taken, and from what; all of them from noise, by default.

    Args:
        image: latents (n, ...) of pictures to change: they begin with as much noise as their first step has (SDEdit,
            arXiv 2108.01073).
        strength: share of the steps that are taken with `image`, the last ones; None: all.
        keep: bool, of `image`'s shape or one that spreads to it: where the image stays as it is, at every step's noise
            (RePaint's conditioning, arXiv 2201.09865, without its resampling).
        noisy: samples to go on with where another course has stopped, in the place of noise.
        start, stop: steps at times from `start` down to `stop` only, `stop` itself not included: experts for parts of
            the course (SDXL, arXiv 2307.01952, section 2.5; eDiff-I, arXiv 2211.01324).
    """

    image: Tensor | None = None
    strength: float | None = None
    keep: Tensor | None = None
    noisy: Tensor | None = None
    start: float = 1.0
    stop: float = 0.0

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}: it takes a number above 0, up to 1, which draws anew")
        if not 0 <= self.stop < self.start <= 1:
            raise ValueError(f"a course from time {self.start} to {self.stop} has no steps: times fall from 1 to 0")

    def steps(self, times: Tensor) -> tuple[int, int]:
        """Numbers of the times (steps + 1,) at which the course begins and ends."""
        total, rounding = len(times) - 1, 1e-9
        first = int((times[:-1] > self.start + rounding).sum())
        if self.strength is not None:
            first = max(first, total - int(total * self.strength))
        return first, max(first, int((times[:-1] > self.stop + rounding).sum()))


# Integration rules


class Sampler(ABC):
    """An integration rule.

    Args:
        steps: number of steps.
        grid: their times; equidistant, with the process's resolution shift, by default.
    """

    def __init__(self, steps: int, grid: TimeGrid | None = None):
        if steps < 1:
            raise ValueError(f"a sampler needs at least one step, got {steps}")
        self.steps = steps
        self.grid = grid or UniformTimes()

    def sample(self, denoise: Denoise, process: Process, noise: NoiseSource, course: "Course | None" = None) -> Tensor:
        """Samples at the end of the course, of the noise's shape."""
        return deque(self.trajectory(denoise, process, noise, course), maxlen=1).pop()

    def trajectory(
        self, denoise: Denoise, process: Process, noise: NoiseSource, course: "Course | None" = None
    ) -> Iterator[Tensor]:
        """The samples after each step of the course.

        Raises:
            ValueError: the course has no steps.
        """
        course = course or Course()
        times = self.grid.times(process, self.steps)
        first, last = course.steps(times)
        times = times[first : last + 1]
        if len(times) < 2:
            raise ValueError(f"none of the sampler's {self.steps} steps is left to take: take more steps")
        alpha, sigma = process.alpha_sigma(times[0])
        if course.noisy is not None:
            x = course.noisy
        elif course.image is not None and (first > 0 or course.keep is None):
            x = alpha * course.image + sigma * noise("start", 0)
        else:
            # As if the data had unit variance, like diffusers: 1 on every path but EDM's, there sqrt(sigma^2 + 1).
            x = torch.hypot(alpha, sigma) * noise("start", 0)
        for step, after in enumerate(self.integrate(x, times, denoise, process, noise), 1):
            if course.keep is not None and course.image is not None:
                alpha, sigma = process.alpha_sigma(times[step])
                done = first + step == self.steps
                known = course.image if done else alpha * course.image + sigma * noise("start", 0)
                after.copy_(torch.where(course.keep, known, after))
            yield after

    @abstractmethod
    def integrate(
        self, x: Tensor, times: Tensor, denoise: Denoise, process: Process, noise: NoiseSource
    ) -> Iterator[Tensor]:
        """From x at times[0], the samples at times[1], times[2], ...

        What the caller writes into a yielded tensor, the next step begins with.
        """


class DDIM(Sampler):
    """First order: x_0 and eps are held over a step (arXiv 2010.02502).

    With eta = 0 this is Euler's method on the ODE above, on every path.

    Args:
        steps, grid: as in `Sampler`.
        eta: share of the noise that is drawn afresh in each step; 0 is deterministic, 1 is ancestral sampling.
    """

    def __init__(self, steps: int, eta: float = 0.0, grid: TimeGrid | None = None):
        super().__init__(steps, grid)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta}")
        self.eta = eta

    def integrate(
        self, x: Tensor, times: Tensor, denoise: Denoise, process: Process, noise: NoiseSource
    ) -> Iterator[Tensor]:
        for step, (t, t_next) in enumerate(pairwise(times)):
            (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
            x0 = denoise(x, t)
            eps = (x - alpha * x0) / sigma
            # Variance of q(x_next | x_t, x_0) for any path; eq. 16 of the paper on variance-preserving ones.
            fresh = self.eta * sigma_next * torch.sqrt(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2)
            x = alpha_next * x0 + torch.sqrt(sigma_next**2 - fresh**2) * eps
            if fresh > 0:
                x = x + fresh * noise("step", step)
            yield x


class Euler(DDIM):
    """Euler's method on the ODE: for rectified flow x <- x + v dt.

    Args:
        steps, grid: as in `Sampler`.
    """

    def __init__(self, steps: int, grid: TimeGrid | None = None):
        super().__init__(steps, eta=0.0, grid=grid)


class Heun(Sampler):
    """Second order, two denoiser calls a step: Heun's method on the ODE above (EDM, arXiv 2206.00364, algorithm 2).

    The last step, to t = 0, is Euler's. Churn, off by default, adds noise before a step and removes it again.

    Args:
        steps, grid: as in `Sampler`.
        churn: S_churn; over all steps the noise is raised by about this many times itself.
        churn_min, churn_max: the ratios sigma / alpha between which churn acts.
        churn_noise: S_noise, standard deviation of the added noise.
    """

    def __init__(
        self,
        steps: int,
        grid: TimeGrid | None = None,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
    ):
        super().__init__(steps, grid)
        if churn < 0:
            raise ValueError(f"churn must not be negative, got {churn}")
        self.churn = churn
        self.churn_min = churn_min
        self.churn_max = churn_max
        self.churn_noise = churn_noise

    def integrate(
        self, x: Tensor, times: Tensor, denoise: Denoise, process: Process, noise: NoiseSource
    ) -> Iterator[Tensor]:
        for step, (t, t_next) in enumerate(pairwise(times)):
            x, t = self._add_noise(x, t, step, process, noise)
            (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
            x0 = denoise(x, t)
            eps = (x - alpha * x0) / sigma
            euler = alpha_next * x0 + sigma_next * eps
            if sigma_next == 0:
                x = euler
            else:
                x0_next = denoise(euler, t_next)
                eps_next = (euler - alpha_next * x0_next) / sigma_next
                x = x + (alpha_next - alpha) * (x0 + x0_next) / 2 + (sigma_next - sigma) * (eps + eps_next) / 2
            yield x

    def _add_noise(
        self, x: Tensor, t: Tensor, step: int, process: Process, noise: NoiseSource
    ) -> tuple[Tensor, Tensor]:
        """Raise sigma / alpha by the factor 1 + gamma: (x at the noisier time, that time)."""
        alpha, sigma = process.alpha_sigma(t)
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        if gamma == 0 or alpha == 0 or not self.churn_min <= sigma / alpha <= self.churn_max:
            return x, t  # pure noise cannot be made noisier
        noisier = process.path.shift(t, 1 + gamma)
        alpha_up, sigma_up = process.alpha_sigma(noisier)
        rescale = alpha_up / alpha
        added = torch.sqrt(sigma_up**2 - (rescale * sigma) ** 2) * self.churn_noise
        return rescale * x + added * noise("churn", step), noisier


class PLMS(Sampler):
    """Pseudo linear multistep (Liu et al., arXiv 2202.09778): Adams and Bashforth's fourth-order mean of the last four
    noise predictions, moved as in DDIM. The first step averages two predictions, at both of its ends, so that there is
    one call more than steps. Stable Diffusion 1's sampler ("PNDM" without its Runge-Kutta steps).
    """

    _WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def integrate(
        self, x: Tensor, times: Tensor, denoise: Denoise, process: Process, noise: NoiseSource
    ) -> Iterator[Tensor]:
        before: list[Tensor] = []  # noise predictions, the newest first
        for step, (t, t_next) in enumerate(pairwise(times)):
            (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
            x0 = denoise(x, t)
            before = [(x - alpha * x0) / sigma, *before[:3]]
            if alpha == 0:  # pure noise, from which no image follows by way of the noise
                x = alpha_next * x0 + sigma_next * before[0]
                yield x
                continue
            weighted = zip(self._WEIGHTS[len(before) - 1], before, strict=True)
            eps = torch.stack([weight * one for weight, one in weighted]).sum(0)
            if step == 0 and sigma_next > 0:
                ahead = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps
                eps = (eps + (ahead - alpha_next * denoise(ahead, t_next)) / sigma_next) / 2
            x = alpha_next * (x - sigma * eps) / alpha + sigma_next * eps
            yield x


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): second order with one denoiser call a step (arXiv 2211.01095, algorithm 2).

    It integrates in log(alpha / sigma), extrapolating x_0 linearly from the last two calls. The first step and the
    last, to t = 0, are of first order.
    """

    def integrate(
        self, x: Tensor, times: Tensor, denoise: Denoise, process: Process, noise: NoiseSource
    ) -> Iterator[Tensor]:
        half_log_snr = process.path.log_snr(times) / 2
        x0_before: Tensor | None = None
        width_before = torch.tensor(0.0)
        for step, (t, t_next) in enumerate(pairwise(times)):
            (_, sigma), (alpha_next, sigma_next) = process.alpha_sigma(t), process.alpha_sigma(t_next)
            width = half_log_snr[step + 1] - half_log_snr[step]
            x0 = denoise(x, t)
            extrapolated = x0
            if x0_before is not None and sigma_next > 0:
                extrapolated = x0 + width / (2 * width_before) * (x0 - x0_before)
            x = (sigma_next / sigma) * x - alpha_next * torch.expm1(-width) * extrapolated
            x0_before, width_before = x0, width
            yield x
