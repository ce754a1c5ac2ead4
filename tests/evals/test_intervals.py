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
