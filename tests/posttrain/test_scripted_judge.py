"""The scripted judge behind the endpoint of any other, and the criteria that rules can check."""

import json
import urllib.error
import urllib.request

import pytest

from tokensieve.config import UserError
from tokensieve.posttrain import Criterion, Judge, JudgeSettings, Question, scripted_judge
from tokensieve.tasks.problems.checks import CHECKS, met

TEXT = "Stone is cold. The river is wide, and nobody crosses it! Is it deep?"
MEETS = {
    "sentences": (3, 2), "most words": (14, 13), "least words": (14, 15), "names": ("River", "lake"),
    "avoids": ("lake", "River"), "begins": ("stone", "river"), "ends": ("?", "."),
    "states": ("river is", "ver is"), "omits": ("ton", "stone"), "most characters": (68, 67),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKS)
def test_each_rule_is_met_and_not(kind: str) -> None:
    yes, no = MEETS[kind]
    assert met(CHECKS[kind].criterion(yes), TEXT) and not met(CHECKS[kind].criterion(no), TEXT)
    assert not met(CHECKS[kind].criterion(yes), " ")


def test_a_value_is_stated_by_itself_and_in_chinese_anywhere() -> None:
    states = CHECKS["states"].criterion
    assert met(states("1820"), "in 1820.") and not met(states("1820"), "in 18201 or a1820")
    assert met(states("1820"), "建于1820年") and met(states("天鹅"), "一只白天鹅。") and met(states("a+b"), "(A+B)")


def test_it_scores_as_the_rules_do() -> None:
    rubric = tuple(Criterion(CHECKS[kind].criterion(MEETS[kind][place])) for place in (0, 1) for kind in CHECKS)
    questions = [
        Question("Write.", TEXT, rubric),
        Question("Write.", "", rubric),
        Question("?", TEXT, rubric[: len(CHECKS)]),
    ]
    with scripted_judge() as url, Judge(JudgeSettings(url, "scripted")) as judge:
        assert judge.scores(questions) == [0.5, 0.0, 1.0]
        with pytest.raises(UserError, match="no rule checks the criterion 'It is beautiful.'"):
            judge.scores([Question("?", TEXT, (Criterion("It is beautiful."),))])
    with Judge(JudgeSettings(url, "scripted", retries=0)) as judge, pytest.raises(UserError, match="no reply"):
        judge.scores(questions)  # it ended with its block


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"messages": []}', b'{"messages": [{"content": "hello"}]}'])
def test_what_is_no_request_of_ours_is_refused(body: bytes) -> None:
    with scripted_judge() as url:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/chat/completions", data=body, timeout=5)
        assert refused.value.code == 400 and json.loads(refused.value.read())["error"]["message"]
