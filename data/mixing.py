"""Which source serves each slice: weighted, deterministic, and known at any step without counting up to it."""

from collections.abc import Iterator, Sequence
from math import gcd

import numpy as np

from data.hashing import mix64, text64

_TURN = text64("plan/turn")
_AHEAD = 1024  # steps whose turns are computed together


class Mixture:
    """Every lane goes through rounds of R steps in which each source has a fixed number of turns, in shuffled order.

    A source's proportion is thus exact over every round of every lane, not only on average.

    Args:
        weights: one positive number per source, in any unit.
        seed: of the run.
        resolution: the quotas are counted in so many turns, and then reduced by their greatest common divisor: weights
            of 0.7 and 0.3 make rounds of ten steps.
    """

    def __init__(self, weights: Sequence[float], seed: int, resolution: int = 1000) -> None:
        if not weights:
            raise ValueError("a mixture needs at least one source")
        for i, weight in enumerate(weights):
            if not 0 < weight < float("inf"):
                raise ValueError(f"weight {weight} of source {i} must be positive and finite: leave it out instead")
        total = sum(weights)
        for i, weight in enumerate(weights):
            if weight / total * resolution < 0.5:
                raise ValueError(
                    f"weight {weight} of source {i} is {weight / total:.2g} of the whole: less than one turn in"
                    f" {resolution} steps; raise the weight, or leave the source out"
                )
        self.seed = seed
        self.quotas = _quotas([weight / total for weight in weights], resolution)
        self.round = sum(self.quotas)
        self._turns = np.repeat(np.arange(len(weights), dtype=np.int64), self.quotas)

    def at(self, step: int, lane: int) -> tuple[int, int]:
        """The source that serves (step, lane), and how many turns it had on this lane before."""
        number, position = divmod(step, self.round)
        source = int(self._rounds(number, 1, lane)[position])
        return source, self.turns_before(step, lane)[source]

    def turns_before(self, step: int, lane: int) -> list[int]:
        """Turns that each source had on the lane in the steps before this one."""
        number, position = divmod(step, self.round)
        begun = np.bincount(self._rounds(number, 1, lane)[:position], minlength=len(self.quotas))
        return [number * quota + int(more) for quota, more in zip(self.quotas, begun, strict=True)]

    def walk(self, step: int, lane: int) -> Iterator[int]:
        """The sources of (step, lane), (step + 1, lane), ... without end."""
        number, position = divmod(step, self.round)
        count = -(-_AHEAD // self.round)
        while True:
            yield from self._rounds(number, count, lane)[position:].tolist()
            number, position = number + count, 0

    def _rounds(self, number: int, count: int, lane: int) -> np.ndarray:
        """(count * R,) sources of so many rounds from the given one on."""
        keys = mix64(self.seed, _TURN, lane, np.arange(number, number + count)[:, None], np.arange(self.round))
        return self._turns[np.argsort(keys, axis=1, kind="stable")].ravel()


def _quotas(shares: Sequence[float], turns: int) -> list[int]:
    """Whole turns in proportion to the shares, at least one each: largest remainders first, reduced to lowest terms."""
    exact = [share * turns for share in shares]
    quotas = [max(1, int(turn)) for turn in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: max(0, turns - sum(quotas))]:
        quotas[i] += 1
    divisor = gcd(*quotas)
    return [quota // divisor for quota in quotas]
