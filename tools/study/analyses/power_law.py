"""Power laws with a floor, L = E + sum_k A_k x_k^-a_k, fitted to losses, with intervals for what they say.

The fit is that of Hoffmann et al. (arXiv 2203.15556, section 3.3): a Huber loss between the logarithms of the losses
and of the law, which is computed as a log-sum-exp of its terms, from many starts, the best of which is taken.

The intervals are a parametric bootstrap, for a few seeds of a few sizes are too few to be drawn from with replacement.
Runs of one size deviate from the law together (the law is not quite true) and each alone (its seed):

    log L_ij = log f(x_i) + u_i + e_ij,    u_i ~ N(0, tau^2),    e_ij ~ N(0, sigma_i^2).

Seeds tell small runs apart more than large ones, so sigma_i is a power of the size (`seed_noise`); of tau little is
known, and only a distribution is given (`law_misfit`). The fit weighs a size of n seeds by 1 / (tau^2 + sigma_i^2 / n).
Each replicate draws deviations that might be behind the data, adds that much to the losses once more, and fits anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import OptimizeResult, least_squares
from scipy.special import logsumexp, softmax

from tools.study.analyses.law_misfit import LawMisfit, law_misfit
from tools.study.analyses.seed_noise import SeedNoise, seed_noise

# Starts: exponents, and the floor as a share of the lowest loss.
_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
_FLOORS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class PowerLaw:
    """L = E + sum_k A_k x_k^-a_k.

    Args:
        floor: E, the irreducible loss.
        log_factors: log A, (K,): of compute, A may be larger than a float.
        exponents: a, (K,).
    """

    floor: float
    log_factors: np.ndarray
    exponents: np.ndarray

    @property
    def factors(self) -> np.ndarray:
        """A, (K,)."""
        return np.exp(self.log_factors)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Losses (n,) at x (n, K)."""
        return self.floor + np.exp(self.log_factors - self.exponents * np.log(x)).sum(1)


@dataclass(frozen=True)
class Fit:
    """A law and the losses that it was fitted to.

    Args:
        law: the best of all starts.
        x: (n, K), positive.
        losses: (n,), positive.
        sizes: (n,) int, equal for runs that differ in their seed alone.
        noise: between seeds.
        misfit: what the deviation tau of sizes from the law may be.
        huber: see `fit`.
    """

    law: PowerLaw
    x: np.ndarray
    losses: np.ndarray
    sizes: np.ndarray
    noise: SeedNoise
    misfit: LawMisfit
    huber: float

    @property
    def residuals(self) -> np.ndarray:
        """(n,), of the logarithms."""
        return np.log(self.losses) - np.log(self.law(self.x))

    def tau(self, share: float = 0.5) -> float:
        """The deviation of sizes from the law that is this likely not to be exceeded."""
        points = _Points.of(self.x, self.losses, self.sizes)
        return self.misfit.quantile(points.variances(self.noise), share)

    def deviations(self) -> np.ndarray:
        """(sizes,), from the smallest on: standard deviations between seeds, of the logarithm."""
        z = np.unique(_size(self.x))
        return self.noise.sigma * self.noise.shape(z)


def fit(x: np.ndarray, losses: np.ndarray, sizes: Sequence[int] | np.ndarray, huber: float = 1e-3) -> Fit:
    """Fit a law to losses.

    Args:
        x: (n, K), positive: compute, or parameters and samples.
        losses: (n,), positive.
        sizes: (n,), equal for runs that differ in their seed alone.
        huber: residuals of the logarithm, at the middle size, count linearly beyond this; 1e-3 in the paper, where runs
            have no repeats. Noise of seeds is larger, and a width about that noise wastes less of the data.

    Raises:
        ValueError: there are fewer different x than parameters.
    """
    x, losses, sizes = np.asarray(x, float), np.asarray(losses, float), np.asarray(sizes)
    parameters, different = 1 + 2 * x.shape[1], len(np.unique(x, axis=0))
    if different < parameters:
        raise ValueError(f"a law of {parameters} parameters cannot be fitted to runs of {different} sizes")
    points = _Points.of(x, losses, sizes)
    noise = seed_noise(points.y, points.size, sizes)
    theta = points.best(points.scale(noise, 0.0), huber)
    # tau weighs the sizes, and comes from the law that they give: once more is enough.
    tau = points.misfit(theta).quantile(points.variances(noise), 0.5)
    theta = points.best(points.scale(noise, tau), huber)
    return Fit(points.law(theta), x, losses, sizes, noise, points.misfit(theta), huber)


@dataclass(frozen=True)
class Replicates:
    """Laws that the data might have given, and how far a single run might be from them.

    Args:
        laws: one for each replicate.
        noises: between seeds, likewise.
        taus: (replicates,), standard deviations of sizes about the law.
        units: (replicates,) standard normal, how far a new run is off in its own deviations.
    """

    laws: list[PowerLaw]
    noises: list[SeedNoise]
    taus: np.ndarray
    units: np.ndarray

    def exponents(self, level: float) -> np.ndarray:
        """(2, K): the interval of each exponent."""
        return _interval(np.array([law.exponents for law in self.laws]), level)

    def floor(self, level: float) -> np.ndarray:
        """(2,): the interval of the irreducible loss."""
        return _interval(np.array([law.floor for law in self.laws]), level)

    def curve(self, x: np.ndarray, level: float) -> np.ndarray:
        """(2, n): the interval of the law at x (n, K), without the noise of a run."""
        return _interval(np.array([law(x) for law in self.laws]), level)

    def run(self, x: np.ndarray, level: float) -> np.ndarray:
        """(2,): the interval in which a single further run at x (K,) ends with so much probability."""
        laws = np.array([law(x[None])[0] for law in self.laws])
        seeds = np.array([noise.sigma * noise.shape(_size(x[None]))[0] for noise in self.noises])
        return _interval(laws * np.exp(np.hypot(self.taus, seeds) * self.units), level)


def replicate(fitted: Fit, count: int, seed: int = 0) -> Replicates:
    """Bootstrap a fit; see the module's text.

    Args:
        count: of replicates.
    """
    rng = np.random.default_rng(seed)
    points = _Points.of(fitted.x, fitted.losses, fitted.sizes)
    start = points.theta(fitted.law)
    laws, noises, taus = [], [], np.empty(count)
    for i in range(count):
        drawn = fitted.noise.draw(rng)
        taus[i] = fitted.misfit.draw(points.variances(drawn), rng)
        of_seeds = drawn.sigma * drawn.shape(points.size) * rng.standard_normal(len(points.y))
        y = points.y + taus[i] * rng.standard_normal(len(points.counts))[points.group] + of_seeds
        laws.append(points.law(_minimise(start, points, y, points.scale(drawn, taus[i]), fitted.huber).x))
        noises.append(drawn)
    return Replicates(laws, noises, taus, rng.standard_normal(count))


@dataclass(frozen=True)
class _Points:
    """Losses as the fit sees them. The law's parameters are theta = (log E, log A at z = 0, a), (1 + 2 K,).

    Args:
        middle: (K,), the mean of log x, from which z is reckoned so that A and a are told apart.
        z: (n, K).
        y: (n,), log losses.
        group: (n,), the size of each run.
        counts: (sizes,), runs.
        size: (n,), log size: what the noise of seeds depends on.
    """

    middle: np.ndarray
    z: np.ndarray
    y: np.ndarray
    group: np.ndarray
    counts: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, losses: np.ndarray, sizes: np.ndarray) -> "_Points":
        middle = np.log(x).mean(0)
        _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        return cls(middle, np.log(x) - middle, np.log(losses), group, counts, _size(x))

    def variances(self, noise: SeedNoise) -> np.ndarray:
        """(sizes,), of the means by the noise of seeds."""
        of_size = np.bincount(self.group, self.size) / self.counts
        return (noise.sigma * noise.shape(of_size)) ** 2 / self.counts

    def scale(self, noise: SeedNoise, tau: float) -> np.ndarray:
        """(n,), what residuals are divided by: 1 in the middle."""
        scale = np.sqrt((self.variances(noise) + tau**2) * self.counts)[self.group]
        return scale / np.exp(np.log(scale).mean()) if scale.all() else np.ones_like(scale)

    def best(self, scale: np.ndarray, huber: float) -> np.ndarray:
        """theta of the best fit from many starts."""
        k, lowest = len(self.middle), np.exp(self.y.min())
        found = []
        for share, *exponents in product(_FLOORS, *[_EXPONENTS] * k):
            factor = np.log((np.exp(self.y.mean()) - share * lowest) / k)
            start = np.array([np.log(share * lowest), *[factor] * k, *exponents])
            found.append(_minimise(start, self, self.y, scale, huber))
        return min(found, key=lambda fit: fit.cost).x

    def terms(self, theta: np.ndarray) -> np.ndarray:
        """(n, 1 + K), logarithms of the law's."""
        k = len(self.middle)
        return np.column_stack([np.full(len(self.z), theta[0]), theta[1 : 1 + k] - theta[1 + k :] * self.z])

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """(n, 1 + 2 K), of the law's logarithm."""
        shares = softmax(self.terms(theta), axis=1)
        return np.column_stack([shares, -shares[:, 1:] * self.z])

    def misfit(self, theta: np.ndarray) -> LawMisfit:
        """What the means of the sizes say of tau."""
        residuals = np.bincount(self.group, self.y - logsumexp(self.terms(theta), axis=1)) / self.counts
        _, first = np.unique(self.group, return_index=True)
        means = np.bincount(self.group, self.y) / self.counts
        return law_misfit(residuals, self.jacobian(theta)[first], float(np.ptp(means)))

    def law(self, theta: np.ndarray) -> PowerLaw:
        k = len(self.middle)
        exponents = theta[1 + k :]
        return PowerLaw(float(np.exp(theta[0])), theta[1 : 1 + k] + exponents * self.middle, exponents)

    def theta(self, law: PowerLaw) -> np.ndarray:
        return np.concatenate([[np.log(law.floor)], law.log_factors - law.exponents * self.middle, law.exponents])


def _size(x: np.ndarray) -> np.ndarray:
    """Log sizes (n,) of x (n, K): what the noise of seeds depends on."""
    return np.log(x).mean(1)


def _minimise(start: np.ndarray, points: _Points, y: np.ndarray, scale: np.ndarray, huber: float) -> OptimizeResult:
    """theta of least Huber loss of residuals over `scale`, from one start."""
    return least_squares(
        lambda theta: (logsumexp(points.terms(theta), axis=1) - y) / scale,
        start,
        lambda theta: points.jacobian(theta) / scale[:, None],
        loss="huber",
        f_scale=huber,
        x_scale="jac",
        max_nfev=500,
        ftol=1e-10,
        xtol=1e-10,
        gtol=1e-14,
    )


def _interval(values: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
