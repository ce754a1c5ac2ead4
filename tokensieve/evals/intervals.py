"""95% intervals of figures that stand on a sample of texts or prompts.

Legend: n texts or prompts, drawn independently.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A figure from `n` texts or prompts, and its 95% interval. low, high: None if n is 1, which bounds nothing."""

    value: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Sequence[float]) -> Estimate:
    """Mean of the values, by Student's t: mean +- t(n - 1) * s / sqrt(n)."""
    value, n = fmean(values), len(values)
    if n < 2:
        return Estimate(value, None, None, n)
    half = student(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(value, value - half, value + half, n)


def ratio(logarithms: Sequence[float]) -> Estimate:
    """exp of the mean of the logarithms. Of differences of two models' losses on the same texts: their perplexities'
    ratio, without what makes one text harder than another.
    """
    found = mean(logarithms)
    low, high = (None if x is None else math.exp(x) for x in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high, found.n)


def share(successes: float, n: int) -> Estimate:
    """successes / n, by Wilson's score interval. Source: Wilson 1927."""
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), n)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """share(a) - share(b) of the same prompts, each 0 or 1, by Wald's interval with half a prompt added to each cell.

    Only the prompts on which both differ count. Source: Agresti and Min, Statistics in Medicine 24 (2005) 729.
    """
    n = len(a)
    gained = sum(x > y for x, y in zip(a, b, strict=True)) + 0.5
    lost = sum(x < y for x, y in zip(a, b, strict=True)) + 0.5
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return Estimate(fmean(a) - fmean(b), max(-1.0, middle - half), min(1.0, middle + half), n)


def student(freedom: int) -> float:
    """The 97.5% point of Student's t: exact for 1 and 2 degrees of freedom, within 1% beyond.

    Source: the expansion around the normal distribution's point, Abramowitz and Stegun 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    z = Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
