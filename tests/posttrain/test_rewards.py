"""The terms of a reward and their sum."""

import math
from typing import Any

import pytest

from tokensieve.config import UserError
from tokensieve.posttrain import LanguageShare, Terms, Weights, length_penalty, reward

WEIGHTS = Weights(outcome=1.0, rubric=0.5, language=0.25, length=0.125)


def test_the_sum_is_the_definition() -> None:
    everything = Terms(outcome=1.0, rubric=0.5, language=0.8, length=0.4)
    rule = ("outcome",)
    assert reward(everything, WEIGHTS, rule) == pytest.approx(1 + 0.25 + 0.2 - 0.05)
    assert reward(Terms(outcome=0.5), WEIGHTS, rule) == 0.5
    assert reward(Terms(outcome=0.0, length=1.0), WEIGHTS, rule) == -0.125
    assert reward(everything, Weights(outcome=1, rubric=0, language=0, length=0), rule) == 1.0


def test_a_missing_judge_is_no_reward_and_not_zero() -> None:
    """With a judge as the only source an unread reply gives nothing; a rule may still stand alone."""
    assert reward(Terms(language=1.0), WEIGHTS, needed=("rubric",)) is None
    assert reward(Terms(rubric=0.0), WEIGHTS, needed=("rubric",)) == 0.0
    assert reward(Terms(outcome=1.0), WEIGHTS, needed=("outcome",)) == 1.0
    assert reward(Terms(outcome=1.0), WEIGHTS, needed=("outcome", "rubric")) is None
    assert reward(Terms(outcome=1.0), Weights(rubric=0), needed=("outcome", "rubric")) == 1.0


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (100, 0), (150, 0.5), (200, 1), (10_000, 1)])
def test_the_length_penalty_is_linear_between_its_bounds(tokens: int, penalty: float) -> None:
    assert length_penalty(tokens, 100, 200) == penalty


ENGLISH = "The river was wide and slow, and nobody had crossed it for years."
CHINESE = "这条河又宽又慢，多年来没有人渡过它。"


def test_language_is_counted_by_letters() -> None:
    share = LanguageShare()
    assert share(ENGLISH, "en") == 1 and share(ENGLISH, "zh") == 0 and share(CHINESE, "zh") == 1
    mixed = share(f"{ENGLISH}\n{CHINESE}", "en")
    letters = sum(c.isalpha() for c in ENGLISH), sum(c.isalpha() for c in CHINESE)
    assert mixed == pytest.approx(letters[0] / sum(letters))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "$x^2 + y^2$",
        "```python\nfor line in lines:\n    print(line)\n```",
        "https://example.com/a/b/c",
        "ok.",
    ],
)
def test_what_has_no_language_is_consistent(text: str) -> None:
    share = LanguageShare()
    assert share(text, "zh") == 1 and share(f"{CHINESE}\n{text}", "zh") == 1
    assert share.of_prose(text, "zh") is None and share.of_prose(f"{CHINESE}\n{text}", "zh") == 1


WRONG: list[tuple[Any, str]] = [
    (lambda: Terms(outcome=math.nan), "outcome is nan"),
    (lambda: Terms(rubric=1.5), "rubric is 1.5"),
    (lambda: Weights(language=-1), "weight of language is -1"),
    (lambda: Weights(length=math.nan), "weight of length is nan"),
    (lambda: Weights(length=math.inf), "weight of length is inf"),
    (lambda: length_penalty(1, 5, 5), "0 <= free < limit"),
    (lambda: LanguageShare(("en", "xx")), "ISO 639-1"),
    (lambda: LanguageShare()("text", "de"), "not among en, zh"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
