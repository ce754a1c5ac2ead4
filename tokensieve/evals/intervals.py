"""95% intervals of figures that stand on a sample of texts or prompts.

Legend: n texts or prompts, drawn independently unless they are in clusters; m clusters, which always are.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

Z = NormalDist().inv_cdf(0.975)
CORRELATION = 0.1  # of answers of one cluster, at least: an assumption, for samples that are too alike to show one


@dataclass(frozen=True)
class Estimate:
    """A figure from `n` texts or prompts, and its 95% interval.

    clusters: the contexts, documents or problems that the n are about, if some share one; None: all were drawn
    independently. low, high: None for one text or one cluster, which bounds nothing.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of the values, by Student's t: mean +- t(m - 1) * sqrt(variance of the mean).

    The variance is s^2 / n for independent values. For values of clusters, which may err together, it is the variance
    over clusters, and never less than that of independent ones.
    """
    value, n = fmean(values), len(values)
    sums = _sums(values, range(n) if clusters is None else clusters)
    m, of = len(sums), None if clusters is None else len(sums)
    if m < 2:
        return Estimate(value, None, None, n, of)
    independent = n / (n - 1) * sum((x - value) ** 2 for x in values)
    half = student(m - 1) * math.sqrt(max(_together(sums, n), independent)) / n
    return Estimate(value, value - half, value + half, n, of)


def ratio(logarithms: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """exp of the mean of the logarithms. Of differences of two models' losses on the same texts: their perplexities'
    ratio, without what makes one text harder than another. clusters: as of `mean`.
    """
    found = mean(logarithms, clusters)
    low, high = (None if x is None else math.exp(x) for x in (found.low, found.high))
    return Estimate(math.exp(found.value), low, high, found.n, found.clusters)


def share(successes: float, n: float) -> Estimate:
    """successes / n, by Wilson's score interval. Source: Wilson 1927."""
    p, z2 = successes / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), int(n))  # 0 and 1 to the bit


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


def clustered_share(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of values in [0, 1], of which those of one cluster (such as the questions of one context) may err together.

    Wilson's interval for the effective number of values. n: of values. low, high: None for one cluster.

    Source: Korn and Graubard, Survey Methodology 24 (1998) 193, with Wilson's interval in place of an exact one.
    """
    p, m, effective = fmean(values), len(set(clusters)), _effective(values, clusters)
    if effective is None:
        return Estimate(p, None, None, len(values), m)
    found = share(p * effective, effective)
    return Estimate(p, found.low, found.high, len(values), m)


def clustered_difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """mean(a) - mean(b) of the same prompts, of which those of one cluster may err together.

    The interval of `difference` for the effective number of prompts. n: of prompts. low, high: None for one cluster.
    """
    d = [x - y for x, y in zip(a, b, strict=True)]
    value, m, effective = fmean(d), len(set(clusters)), _effective(d, clusters)
    if effective is None:
        return Estimate(value, None, None, len(d), m)
    net, differing = value * effective, fmean([x * x for x in d]) * effective + 1
    middle = net / (effective + 2)
    half = Z * math.sqrt(differing - net**2 / (effective + 2)) / (effective + 2)
    return Estimate(value, max(-1.0, middle - half), min(1.0, middle + half), len(d), m)


def _effective(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The number of independent values whose mean is as uncertain; None for one cluster.

    It is n over the design effect: the variance of the mean over clusters, over that of n independent values, and never
    less than 1. It is corrected for few clusters. Values of which none or one differs show no design effect, whatever
    it is. So the number is never more than n over the effect of `CORRELATION` within clusters, 1 + CORRELATION (b - 1),
    where b is the size of the cluster that a value is in, in the mean.
    """
    n, middle, sums = len(values), fmean(values), _sums(values, clusters)
    m, size = len(sums), sum(size * size for _, size in sums) / len(values)
    if m < 2:
        return None
    alike = max(values) == min(values)
    effect = 1.0 if alike else max(1.0, _together(sums, n) / sum((value - middle) ** 2 for value in values))
    return min(n / effect * (Z / student(m - 1)) ** 2, n / (1 + CORRELATION * (size - 1)))


def _sums(values: Sequence[float], clusters: Sequence[Hashable]) -> list[tuple[float, int]]:
    """The sum of the deviations from the mean in each cluster, and its size."""
    middle, parts = fmean(values), dict[Hashable, list[float]]()
    for value, cluster in zip(values, clusters, strict=True):
        parts.setdefault(cluster, []).append(value - middle)
    return [(sum(part), len(part)) for part in parts.values()]


def _together(sums: Sequence[tuple[float, int]], n: int) -> float:
    """The variance of n times the mean over clusters, of two or more, by leaving out one at a time (jackknife).

    Of clusters of one size it is m / (m - 1) times the sum of squares. sums: as of `_sums`.
    """
    m = len(sums)
    return (m - 1) / m * sum((x / (1 - size / n)) ** 2 for x, size in sums)


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
