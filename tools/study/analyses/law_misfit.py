"""How far the mean losses of sizes lie from a law that was fitted to them, beyond the noise of seeds.

This deviation, tau of `power_law`, is told from few sizes, and where noise falls with size from fewer still: the law
then passes through the largest runs, which alone are exact, and leaves residuals only where noise hides them. Hence a
distribution, and no estimate. It is the restricted likelihood of the residuals, which looks only at what the law's
parameters do not take up (Patterson and Thompson, Biometrika 58, 1971), times the prior that Jeffreys' rule gives for
it, the root of its information: where seeds make no noise, that makes intervals those of Student's t.
"""

from dataclasses import dataclass

import numpy as np

_STEPS = 200


@dataclass(frozen=True)
class LawMisfit:
    """What tau may be, given the noise of seeds.

    Args:
        rest: (G, G - p), orthonormal directions of the sizes' losses in which no parameter moves the law.
        residuals: (G - p,), of the logarithm of the sizes' mean losses, in these directions.
        most: the largest tau.
    """

    rest: np.ndarray
    residuals: np.ndarray
    most: float

    def likely(self, variances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (T,) of tau and their probabilities (T,), given the variances (G,) of means by the noise of seeds."""
        # Dense near 0, where it matters.
        edges = self.most * np.linspace(0, 1, _STEPS + 1) ** 3
        taus = (edges[1:] + edges[:-1]) / 2
        noise = (self.rest.T * variances) @ self.rest
        values, vectors = np.linalg.eigh(noise)
        covariance = values + taus[:, None] ** 2  # (T, G - p), in the directions of `vectors`
        squares = (self.residuals @ vectors) ** 2
        log = -(np.log(covariance) + squares / covariance).sum(1) / 2
        # With as many parameters as sizes nothing tells one tau from another.
        information = taus * np.sqrt((covariance**-2).sum(1)) if len(squares) else np.ones_like(taus)
        density = np.exp(log - log.max()) * information * np.diff(edges)
        return taus, density / density.sum()

    def quantile(self, variances: np.ndarray, share: float) -> float:
        """The tau that is this likely not to be exceeded."""
        taus, probabilities = self.likely(variances)
        return float(np.interp(share, probabilities.cumsum(), taus))

    def draw(self, variances: np.ndarray, rng: np.random.Generator) -> float:
        """A tau that might be behind the residuals."""
        taus, probabilities = self.likely(variances)
        return float(rng.choice(taus, p=probabilities))


def law_misfit(residuals: np.ndarray, jacobian: np.ndarray, most: float) -> LawMisfit:
    """See `LawMisfit`.

    Args:
        residuals: (G,), of the logarithm of the sizes' mean losses.
        jacobian: (G, p), of the logarithm of the law in its parameters.
        most: the largest tau: that of a law that tells nothing.

    Raises:
        ValueError: `most` is 0: the sizes do not differ.
    """
    if most <= 0:
        raise ValueError("all sizes have the same mean loss: there is no law to fit")
    u, s, _ = np.linalg.svd(jacobian)
    rest = u[:, (s > 1e-10 * s.max()).sum() :]
    return LawMisfit(rest, rest.T @ residuals, most)
