"""How much the losses of runs that differ in their seed alone differ, and how that changes with their size."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

# Factors of at most e^2 in the noise for each e-fold of size: far beyond what is seen, but finite.
_STEEPEST = 2.0


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a logarithm of a loss between seeds, sigma exp(-slope (z - middle)) at log size z.

    Args:
        sigma: at `middle`.
        slope: how fast it falls as runs grow.
        middle: log size of the runs that it was estimated from, on average.
        degrees: of freedom of `sigma`.
        error: standard error of `slope`.
    """

    sigma: float
    slope: float
    middle: float
    degrees: int
    error: float

    def shape(self, z: np.ndarray) -> np.ndarray:
        """The deviation at log sizes z, as a multiple of `sigma`."""
        return np.exp(-self.slope * (z - self.middle))

    def draw(self, rng: np.random.Generator) -> "SeedNoise":
        """A noise that might be behind such an estimate: scaled inverse chi-squared, and a normal slope."""
        if not self.degrees:
            return self
        sigma = self.sigma * np.sqrt(self.degrees / rng.chisquare(self.degrees))
        slope = self.slope + self.error * rng.standard_normal()
        return SeedNoise(float(sigma), float(slope), self.middle, self.degrees, self.error)


def seed_noise(y: np.ndarray, z: np.ndarray, sizes: np.ndarray) -> SeedNoise:
    """Maximum likelihood of y's deviations from their sizes' means.

    The squares of a size with d degrees of freedom sum to sigma^2 exp(-2 slope (z - middle)) chi^2_d. With `middle`
    weighed by d, the estimates of sigma and slope do not depend on each other, and the slope's information is
    2 sum d (z - middle)^2.

    Args:
        y: (n,), logarithms of losses.
        z: (n,), log sizes.
        sizes: (n,), equal for runs that differ in their seed alone.
    """
    _, index, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    means = np.bincount(index, y) / counts
    squares = np.bincount(index, (y - means[index]) ** 2)
    of_groups = np.bincount(index, z) / counts
    degrees = counts - 1
    total = int(degrees.sum())
    middle = float((degrees * of_groups).sum() / total) if total else float(of_groups.mean())
    away = of_groups - middle
    information = 2 * (degrees * away**2).sum()

    def variance(slope: float) -> float:
        return (squares * np.exp(2 * slope * away)).sum() / total

    if not total or not information or not squares.sum():
        return SeedNoise(float(np.sqrt(variance(0.0))) if total else 0.0, 0.0, middle, total, 0.0)
    # At its best sigma the likelihood of a slope is that of the variance alone, for sum d (z - middle) = 0.
    slope = float(minimize_scalar(variance, bounds=(-_STEEPEST, _STEEPEST), method="bounded").x)
    return SeedNoise(float(np.sqrt(variance(slope))), slope, middle, total, float(information**-0.5))
