"""Power laws with a floor, L = E + sum_k A_k x_k^-a_k, fitted to losses, with intervals for what they say.

The fit is that of Hoffmann et al. (arXiv 2203.15556, section 3.3): a Huber loss between the logarithms of the losses
and of the law, which is computed as a log-sum-exp of its terms, from many starts, the best of which is taken.

The intervals are a parametric bootstrap, for a few seeds of a few sizes are too few to be drawn from with replacement.
Runs of one size deviate from the law together (the law is not quite true) and each alone (its seed):

    log L_ij = log f(x_i) + u_i + e_ij,    u_i ~ N(0, tau^2),    e_ij ~ N(0, sigma_i^2).

Seeds tell small runs apart more than large ones, so sigma_i is a power of the size (`seed_noise`), and the fit weighs
residuals by its inverse. tau is estimated from the residuals of the means of sizes with G - p degrees of freedom (G
sizes, p parameters). Each replicate first draws deviations that might be behind such estimates (scaled inverse
chi-squared, which makes the intervals those of Student's t where the law is linear), then losses, and fits anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp, softmax

from tools.study.analyses.seed_noise import SeedNoise, seed_noise

# Starts: exponents, and the floor as a share of the lowest loss.
_EXPONENTS = (0.1, 0.3, 0.6, 1.0)
_FLOORS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class PowerLaw:
    """L = E + sum_k A_k x_k^-a_k.

    Args:
        floor: E, the irreducible loss.
        factors: A, (K,).
        exponents: a, (K,).
    """

    floor: float
    factors: np.ndarray
    exponents: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Losses (n,) at x (n, K)."""
        return self.floor + (self.factors * x**-self.exponents).sum(1)


@dataclass(frozen=True)
class Fit:
    """A law and the losses that it was fitted to.

    Args:
        law: the best of all starts.
        x: (n, K), positive.
        losses: (n,), positive.
        sizes: (n,) int, equal for runs that differ in their seed alone.
        noise: between seeds.
        huber: see `fit`.
    """

    law: PowerLaw
    x: np.ndarray
    losses: np.ndarray
    sizes: np.ndarray
    noise: SeedNoise
    huber: float

    @property
    def residuals(self) -> np.ndarray:
        """(n,), of the logarithms."""
        return np.log(self.losses) - np.log(self.law(self.x))

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
    middle = np.log(x).mean(0)
    z, y = np.log(x) - middle, np.log(losses)
    noise = seed_noise(y, _size(x), sizes)
    scale = noise.shape(_size(x))
    starts = []
    for share, *exponents in product(_FLOORS, *[_EXPONENTS] * x.shape[1]):
        floor = share * losses.min()
        factors = np.full(x.shape[1], np.log((np.exp(y.mean()) - floor) / x.shape[1]))
        starts.append(np.concatenate([[np.log(floor)], factors, exponents]))
    best = min((_minimise(start, z, y, scale, huber) for start in starts), key=lambda found: found.cost)
    return Fit(_law(best.x, middle), x, losses, sizes, noise, huber)


@dataclass(frozen=True)
class Replicates:
    """Laws that the data might have given, and how far a single run might be from them.

    Args:
        laws: one for each replicate.
        noises: between seeds, likewise.
        taus: (replicates,), standard deviations of sizes about the law.
        units: (replicates,) standard normal, how far a new run is off in its own deviations.
        tau: the estimate, beside the noise of seeds.
    """

    laws: list[PowerLaw]
    noises: list[SeedNoise]
    taus: np.ndarray
    units: np.ndarray
    tau: float

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
    x, noise = fitted.x, fitted.noise
    groups, index, per_group = np.unique(fitted.sizes, return_inverse=True, return_counts=True)
    n, p = len(index), 1 + 2 * x.shape[1]
    scale = noise.shape(_size(x))
    # How well each size's mean is known, in units of sigma^-2.
    known = np.bincount(index, scale**-2)
    means = np.bincount(index, fitted.residuals) / per_group
    # With as many sizes as parameters nothing tells how true the law is: one degree is the least to go on with.
    degrees = max(1, len(groups) - p)
    between = (known * means**2).sum() / degrees  # estimates sigma^2 + tau^2 mean(known)

    def tau(between: float, sigma: float) -> float:
        return float(np.sqrt(max(0.0, between - sigma**2) / known.mean()))

    middle = np.log(x).mean(0)
    start, z, law = _parameters(fitted.law, middle), np.log(x) - middle, np.log(fitted.law(x))
    laws, noises, taus = [], [], np.empty(count)
    for i in range(count):
        drawn = noise.draw(rng)
        taus[i] = tau(between * degrees / rng.chisquare(degrees), drawn.sigma)
        seeds = drawn.sigma * drawn.shape(_size(x)) * rng.standard_normal(n)
        y = law + taus[i] * rng.standard_normal(len(groups))[index] + seeds
        laws.append(_law(_minimise(start, z, y, scale, fitted.huber).x, middle))
        noises.append(drawn)
    return Replicates(laws, noises, taus, rng.standard_normal(count), tau(between, noise.sigma))


def _size(x: np.ndarray) -> np.ndarray:
    """Log sizes (n,) of x (n, K): what the noise of seeds depends on."""
    return np.log(x).mean(1)


def _minimise(start: np.ndarray, z: np.ndarray, y: np.ndarray, scale: np.ndarray, huber: float):
    """theta = (log E, log A, a) of least Huber loss of residuals over `scale`, from one start; A is that at z = 0."""
    k = z.shape[1]

    def terms(theta: np.ndarray) -> np.ndarray:
        return np.column_stack([np.full(len(z), theta[0]), theta[1 : 1 + k] - theta[1 + k :] * z])

    def residuals(theta: np.ndarray) -> np.ndarray:
        return (logsumexp(terms(theta), axis=1) - y) / scale

    def jacobian(theta: np.ndarray) -> np.ndarray:
        shares = softmax(terms(theta), axis=1)
        return np.column_stack([shares, -shares[:, 1:] * z]) / scale[:, None]

    tolerances = {"ftol": 1e-10, "xtol": 1e-10, "gtol": 1e-14}
    return least_squares(
        residuals, start, jacobian, loss="huber", f_scale=huber, x_scale="jac", max_nfev=500, **tolerances
    )


def _law(theta: np.ndarray, middle: np.ndarray) -> PowerLaw:
    k = len(middle)
    exponents = theta[1 + k :]
    return PowerLaw(float(np.exp(theta[0])), np.exp(theta[1 : 1 + k] + exponents * middle), exponents)


def _parameters(law: PowerLaw, middle: np.ndarray) -> np.ndarray:
    return np.concatenate([[np.log(law.floor)], np.log(law.factors) - law.exponents * middle, law.exponents])


def _interval(values: np.ndarray, level: float) -> np.ndarray:
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
