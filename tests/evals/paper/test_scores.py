"""Shares, the rating of maximum likelihood beside a search on a grid, and pairs."""

import math

import pytest

from tokensieve.evals.paper.scores import Graded, compared, figures, rating, read_answers

SOLVED = [Graded(str(i), float(i < 6 or i == 8), 10 * i, 1000 + 200 * i) for i in range(12)]


def likelihood(r: float) -> float:
    """Naively."""
    total = 0.0
    for answer in SOLVED:
        p = 1 / (1 + 10 ** ((answer.level - r) / 400))
        total += math.log(p if answer.score else 1 - p)
    return total


def test_the_rating_is_the_best_on_a_grid() -> None:
    found = rating(SOLVED)
    grid = range(4000)
    best = max(grid, key=likelihood)
    inside = [r for r in grid if likelihood(r) > likelihood(best) - 3.841459 / 2]
    assert abs(found.value - best) <= 1 and abs(found.low - inside[0]) <= 1.5 and abs(found.high - inside[-1]) <= 1.5
    assert found.n == 12


def test_a_rating_without_bound_is_no_number() -> None:
    for score, side in ((0.0, "low"), (1.0, "high")):
        row = figures([Graded("a", score, 5, 1500.0), Graded("b", score, 6, 1700.0)], True)["score"]
        assert row["value"] is None and row[side] is None
        assert row["high" if side == "low" else "low"] is not None


def test_repeats_of_one_problem_count_once() -> None:
    """The rating is that of the mean scores; the interval of a share is that of its problems."""
    twice = [a for answer in SOLVED for a in (answer, answer)]
    assert rating(twice) == rating(SOLVED)
    once, many = (figures(rows, False)["score"] for rows in (SOLVED, twice))
    assert once["value"] == many["value"] == 7 / 12
    assert many["high"] - many["low"] > 0.9 * (once["high"] - once["low"])


def test_the_interval_of_output_tokens_is_that_of_problems() -> None:
    """Sixteen answers to each of five problems, whose lengths differ by problem, are five values."""
    rows = [Graded(str(i), 1.0, 1000 * i + j) for i in range(5) for j in range(16)]
    few = [Graded(str(i), 1.0, 1000 * i) for i in range(5)]
    found, expected = (figures(answers, False)["tokens"] for answers in (rows, few))
    assert found["n"] == 5 and found["value"] == expected["value"] + 7.5
    assert found["high"] - found["low"] == pytest.approx(expected["high"] - expected["low"])


def test_ungraded_answers_are_left_out_and_counted() -> None:
    rows = [Graded("a", 1.0, 4), Graded("b", None, 90), Graded("c", 0.0, None)]
    found = figures(rows, False)
    assert (found["score"]["value"], found["answers"], found["ungraded"], found["problems"]) == (0.5, 2, 1, 2)
    assert found["tokens"]["value"] == 4 and read_answers(found["graded"]) == rows
    assert figures([Graded("a", None)], False)["score"] is None


def test_pairs() -> None:
    a = [Graded(str(i), float(i < 30)) for i in range(40)]
    b = [Graded(str(i), float(i < 24)) for i in range(5, 45)]
    found = compared(a, b)
    assert found is not None and found.n == 35
    assert found.value == pytest.approx(6 / 35) and 0 < found.low < found.value < found.high
    halves = compared([Graded("x", 1.0), Graded("x", 0.0), Graded("y", 1.0)], [Graded("x", 0.0), Graded("y", 0.0)])
    assert halves is not None and halves.value == 0.75
    assert compared(a, [Graded("elsewhere", 1.0)]) is None
