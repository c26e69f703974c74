"""Trials over rates and seeds: the search for a rate, means, and paired differences with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

STEPS = 2  # of a grid of rates per factor of ten
_T = (12.706, 4.303, 3.182, 2.776)  # the 97.5% quantiles of Student's t for 1 to 4 degrees of freedom
_Z = 1.959964


class Difference(NamedTuple):
    """The mean of paired differences, and its 95% confidence interval; None where one pair alone leaves it open."""

    mean: float
    low: float | None
    high: float | None


def rate_at(middle: float, step: int, steps: int = STEPS) -> float:
    """The rate `step` places from `middle` on a grid of `steps` per factor of ten, to two digits."""
    return float(f"{middle * 10 ** (step / steps):.1e}")


def climb(middle: float, score: Callable[[float], float], reach: int = 4, steps: int = STEPS) -> float:
    """The rate of the grid around `middle` with the highest score, walking until both neighbours are no better.

    Args:
        middle: where the walk begins.
        score: of a rate, the higher the better; nan counts as the lowest. Called once per rate.
        reach: how many places from `middle` the walk may go.
        steps: of the grid per factor of ten.
    """
    scores: dict[int, float] = {}

    def of(step: int) -> float:
        if step not in scores:
            value = score(rate_at(middle, step, steps))
            scores[step] = value if value == value else float("-inf")
        return scores[step]

    here = 0
    for way in (1, -1):
        while abs(here + way) <= reach and of(here + way) > of(here):
            here += way
        if here > 0:  # what lies below was passed on the way
            break
    return rate_at(middle, here, steps)


def difference(of: Mapping[int, float], to: Mapping[int, float]) -> Difference:
    """Student's interval of `of - to` over the seeds that both have.

    Raises:
        ValueError: no seed in common.
    """
    pairs = [of[seed] - to[seed] for seed in of if seed in to]
    if not pairs:
        raise ValueError(f"no seed in common: {sorted(of)} and {sorted(to)}")
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return Difference(mean, None, None)
    half = student(len(pairs) - 1) * statistics.stdev(pairs) / sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half)


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t with `freedom` degrees of freedom, within 0.2%.

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
