"""95% intervals: against published values, and how often they hold the truth."""

import math

import numpy as np
import pytest

from tokensieve.evals import intervals


@pytest.mark.parametrize(
    ("freedom", "point"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (23, 2.069)]
)
def test_students_t(freedom: int, point: float) -> None:
    assert intervals.student(freedom) == pytest.approx(point, rel=0.01)


def test_a_share_near_one_stays_below_one() -> None:
    found = intervals.share(63, 64)
    assert found.value == 63 / 64 and found.n == 64
    assert found.low == pytest.approx(0.917, abs=1e-3) and found.high == pytest.approx(0.9972, abs=1e-4)  # Wilson's
    assert intervals.share(10, 10).high == 1.0 and intervals.share(10, 10).low < 0.75


def test_a_ratio_of_perplexities() -> None:
    found = intervals.ratio([math.log(1.01), math.log(1.03)] * 12)
    assert found.value == pytest.approx(1.01995, abs=1e-4) and found.n == 24
    assert 1.015 < found.low < found.value < found.high < 1.025
    assert intervals.ratio([0.1]) == intervals.Estimate(math.exp(0.1), None, None, 1)


def test_a_difference_counts_the_prompts_on_which_both_differ() -> None:
    a, b = [1.0] * 63 + [0.0], [1.0] * 64
    found = intervals.difference(a, b)
    assert found.value == pytest.approx(-1 / 64) and found.low < -1 / 64 < found.high
    same = intervals.difference(b, b)
    assert same.value == 0 and same.low == pytest.approx(-same.high) and 0.01 < same.high < 0.05


@pytest.mark.parametrize("n", [4, 24])
def test_nineteen_of_twenty_intervals_hold_the_truth(n: int) -> None:
    draw = np.random.default_rng(0)
    held = [(e := intervals.mean(draw.normal(0.3, 2.0, n).tolist())).low <= 0.3 <= e.high for _ in range(2000)]
    assert 0.935 < np.mean(held) < 0.965  # three standard errors of 2000 draws
    questions = draw.random((2000, 64)) < 0.8
    held = [(e := intervals.share(int(row.sum()), 64)).low <= 0.8 <= e.high for row in questions]
    assert 0.93 < np.mean(held) < 0.97


@pytest.mark.parametrize("together", [0.0, 0.7])
def test_intervals_of_clusters_hold_the_truth(together: float) -> None:
    """16 questions in each of 12 contexts; with the probability `together` a question goes as its context does."""
    draw = np.random.default_rng(1)
    clusters = [i // 16 for i in range(192)]

    def answers(p: float) -> list[float]:
        context = np.repeat(draw.random(12) < p, 16)
        return np.where(draw.random(192) < together, context, draw.random(192) < p).astype(float).tolist()

    shares, differences, naive = [], [], []
    for _ in range(500):
        a, b = answers(0.8), answers(0.6)
        found = intervals.clustered_share(a, clusters)
        assert (found.n, found.clusters) == (192, 12) and 0 <= found.low <= found.value <= found.high <= 1
        shares.append(found.low <= 0.8 <= found.high)
        other = intervals.clustered_difference(a, b, clusters)
        differences.append(other.low <= 0.2 <= other.high)
        naive.append((e := intervals.share(sum(a), 192)).low <= 0.8 <= e.high)
    # Of few contexts a little too narrow. Of independent questions too wide, by the correlation that is assumed.
    assert np.mean(shares) > 0.89 and np.mean(differences) > 0.9
    assert not together or max(np.mean(shares), np.mean(differences)) < 0.99
    assert np.mean(naive) > 0.93 if not together else np.mean(naive) < 0.7


@pytest.mark.parametrize("together", [0.0, 2.0])
def test_a_mean_over_documents_holds_the_truth(together: float) -> None:
    """4 texts of each of 8 documents, whose losses have the spread `together` beside that of the texts."""
    draw, documents = np.random.default_rng(2), [i // 4 for i in range(32)]
    held, naive = [], []
    for _ in range(1000):
        values = (np.repeat(draw.normal(0, together, 8), 4) + draw.normal(0.3, 1.0, 32)).tolist()
        found, alone = intervals.mean(values, documents), intervals.mean(values)
        assert (found.n, found.clusters, alone.clusters) == (32, 8, None)
        held.append(found.low <= 0.3 <= found.high)
        naive.append(alone.low <= 0.3 <= alone.high)
    assert 0.93 < np.mean(held) < 0.99  # it is never narrower than of independent texts, so a little too wide
    assert np.mean(naive) > 0.93 if not together else np.mean(naive) < 0.8


def test_a_mean_over_documents_of_one_text_is_that_over_texts() -> None:
    values = [0.1, 0.4, -0.2, 0.3]
    alone, documents = intervals.mean(values), intervals.mean(values, "abcd")
    assert (documents.low, documents.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    found = intervals.ratio([0.1, 0.2], ["a", "a"])
    assert (found.low, found.high, found.n, found.clusters) == (None, None, 2, 1)


def test_clusters_of_one_are_prompts() -> None:
    a, b = [1.0] * 40 + [0.0] * 24, [1.0] * 30 + [0.0] * 34
    alone = intervals.clustered_share(a, range(64))
    assert alone.low == pytest.approx(intervals.share(40, 64).low, abs=0.01)
    paired = intervals.clustered_difference(a, b, range(64))
    known = intervals.difference(a, b)
    assert (paired.low, paired.high) == (pytest.approx(known.low, abs=0.005), pytest.approx(known.high, abs=0.005))


def test_a_perfect_result_is_known_no_worse_than_one_with_a_mistake() -> None:
    """None and one of the answers differ: neither shows a design effect, so both get that of the assumption."""
    clusters, right = [i // 16 for i in range(160)], [1.0] * 160
    found = intervals.clustered_share(right, clusters)
    effective = 160 / (1 + 15 * intervals.CORRELATION)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(intervals.share(effective, effective).low)
    lows = [intervals.clustered_share([0.0] * wrong + right[wrong:], range(160)).low for wrong in range(20)]
    assert lows == sorted(lows, reverse=True)
    apart = [i * 16 for i in range(10)]  # one question of each context
    lows = [
        intervals.clustered_share([float(i not in apart[:wrong]) for i in range(160)], clusters).low
        for wrong in range(11)
    ]
    assert lows == sorted(lows, reverse=True)
    less, same, more = (
        intervals.clustered_difference(a, b, clusters)
        for a, b in (([*right[1:], 0.0], right), (right, right), (right, [*right[1:], 0.0]))
    )
    assert less.low < same.low < more.low and same.high == pytest.approx(-same.low)
    assert same.low > -0.03 >= less.low  # ten contexts are enough for the criterion of equal arms
    of_nine = right[: 9 * 16]
    assert intervals.clustered_difference(of_nine, of_nine, clusters[: 9 * 16]).low < -0.03


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_values_are_alike_whatever_their_mean_is_rounded_to(value: float) -> None:
    """Of 48 times 0.7 neither the mean nor the sum of its deviations is exact."""
    clusters = [i // 16 for i in range(48)]
    assert intervals._effective([value] * 48, clusters) == intervals._effective([1.0] * 48, clusters)


@pytest.mark.parametrize("sizes", [(12, 1, 1, 1), (8, 4, 2, 1, 1, 1, 1)])
def test_intervals_of_unequal_clusters_hold_the_truth(sizes: tuple[int, ...]) -> None:
    """Values go mostly as their cluster does. The sums' variance, as of equal clusters, holds it 2 times in 3."""
    draw, n = np.random.default_rng(3), sum(sizes)
    clusters = [cluster for cluster, size in enumerate(sizes) for _ in range(size)]
    held = []
    for _ in range(1000):
        values = (np.repeat(draw.normal(0.3, 1.0, len(sizes)), sizes) + draw.normal(0, 0.1, n)).tolist()
        found = intervals.mean(values, clusters)
        held.append(found.low <= 0.3 <= found.high)
    assert 0.86 < np.mean(held) < 0.98  # one cluster has most of the values, so a little too narrow
    equal = [i // 4 for i in range(16)]
    values = draw.normal(0, 1.0, 16).tolist()
    sums = intervals._sums(values, equal)
    assert intervals._together(sums, 16) == pytest.approx(4 / 3 * sum(x * x for x, _ in sums))


def test_one_cluster_bounds_nothing() -> None:
    assert intervals.clustered_share([1.0, 0.0], ["a", "a"]) == intervals.Estimate(0.5, None, None, 2, 1)
    assert intervals.clustered_difference([1.0], [0.0], ["a"]) == intervals.Estimate(1.0, None, None, 1, 1)
