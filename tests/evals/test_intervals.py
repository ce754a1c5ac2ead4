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
    assert 0.89 < np.mean(shares) < 0.99 and 0.9 < np.mean(differences) < 0.99  # of few contexts a little too narrow
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


def test_clusters_that_agree_wholly_still_bound_something() -> None:
    clusters = [i // 16 for i in range(128)]
    found = intervals.clustered_share([1.0] * 128, clusters)
    assert (found.value, found.high) == (1.0, 1.0) and found.low == pytest.approx(intervals.share(8, 8).low)
    same = intervals.clustered_difference([1.0] * 128, [1.0] * 128, clusters)
    assert same.value == 0 and same.low == pytest.approx(-same.high) and 0.1 < same.high < 0.3
    assert intervals.clustered_share([1.0, 0.0], ["a", "a"]) == intervals.Estimate(0.5, None, None, 2, 1)
    assert intervals.clustered_difference([1.0], [0.0], ["a"]) == intervals.Estimate(1.0, None, None, 1, 1)
