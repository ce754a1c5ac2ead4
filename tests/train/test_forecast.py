"""What is left of a run, on a clock that the test sets."""

import pytest

from tokensieve import cost
from tokensieve.train import forecast
from tokensieve.train.forecast import Forecast


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now[0])
    return now


def test_work_that_is_left_counts_by_its_flops(clock):
    left = Forecast([1.0, 1.0, 4.0, 4.0], (1.0, 2.0))
    assert left.seconds == 20.0  # ten of work, two seconds each
    for seconds in (2.0, 2.0):
        clock[0] += seconds
        left.advance()
    assert left.seconds == 16.0 and left.news() is None


def test_another_load_is_seen_within_thirty_seconds(clock):
    left = Forecast([1.0] * 1000, (1.0, 1.0))
    for _ in range(100):
        clock[0] += 1.0
        left.advance()
    assert left.seconds == 900.0 and left.news() is None
    changed, told = clock[0], None
    while told is None:
        clock[0] += 3.0
        left.advance()
        told = left.news()
    assert clock[0] - changed <= forecast.WINDOW
    while clock[0] - changed < forecast.WINDOW:
        clock[0] += 3.0
        left.advance()
    assert left.seconds == pytest.approx(3.0 * (1000 - 110))
    assert cost.LONGER <= 3 * cost.SHORTER


def test_news_are_told_once(clock):
    left = Forecast([1.0] * 10, (1.0, 1.0))
    clock[0] += 60.0
    left.advance()
    assert left.news() == "4 min 8 s to 12 min 25 s" and left.news() is None
    clock[0] += 1.0  # a step that fast would end the run soon, but it is too early to say so again
    left.advance()
    assert left.news() is None


def test_the_last_step_leaves_nothing(clock):
    left = Forecast([1.0], (1.0, 1.0))
    clock[0] += 1.0
    left.advance()
    assert left.seconds == 0.0


def test_without_a_rehearsal_the_first_step_tells_what_is_left(clock):
    left = Forecast([1.0] * 10, None)
    clock[0] += 60.0
    left.advance()
    assert left.seconds == 540.0 and left.news() is None  # no time was said, so none is revised
