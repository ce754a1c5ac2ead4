"""The agreement of judges with the rules: perfect, constant and inverted ones, and those below what is wanted."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

import tokensieve
from tests.support.endpoints import answering, said
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import Judge, JudgeSettings
from tokensieve.posttrain.agreement import check_agreement, figures_of, measure_agreement, ruled, sample
from tokensieve.posttrain.groups import Group, groups_of
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import Problems, domain
from tokensieve.tasks.problems.checks import met

CHANGES = ("tokens=60", 'modes=["direct"]', 'languages=["en", "zh"]')
Scores = Callable[[str, list[str]], Any]


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    config = load_config(PosttrainConfig, "posttrain-tiny", CHANGES)
    names = ("writing", "logic", "answering")
    return groups_of(config, [*map(domain, names)], encoder(tokensieve.load_tokenizer("base")), {})


@contextmanager
def judge(scores: Scores) -> Iterator[tuple[Judge, list[str]]]:
    """A judge on loopback, and the answers that it has been asked for. scores: from answer and criteria to the list."""
    asked: list[str] = []

    def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        question = json.loads(body["messages"][-1]["content"])
        asked.append(question["answer"])
        return 200, said(json.dumps({"scores": scores(question["answer"], question["criteria"])}))

    with answering(reply) as url, Judge(JudgeSettings(url, "fake", retries=0)) as made:
        yield made, asked


def by_rules(answer: str, criteria: list[str]) -> list[float]:
    return [float(met(criterion, answer)) for criterion in criteria]


def constant(answer: str, criteria: list[str]) -> list[float]:
    return [0.5] * len(criteria)


def inverted(answer: str, criteria: list[str]) -> list[float]:
    return [1 - score for score in by_rules(answer, criteria)]


@pytest.mark.parametrize(("scores", "agreement"), [(by_rules, 1.0), (constant, 0.0), (inverted, -1.0)])
def test_perfect_constant_and_inverted(groups: list[Group], scores: Scores, agreement: float) -> None:
    with judge(scores) as (fake, asked):
        found = measure_agreement(fake, groups, {})
        assert measure_agreement(fake, groups, found) == found and len(asked) == 24
    assert found["judge"] == "fake" and found["left_out"] == []
    assert found["groups"].keys() == {"writing-direct", "answering-direct"}  # logic has no rubric
    for figures in (found["all"], *found["groups"].values()):
        measured = figures["agreement"]
        assert measured["value"] == agreement and figures["missing"] == 0
        assert measured["low"] <= agreement <= measured["high"] and measured["n"] > 6
    assert found["all"]["answers"] == 24 and found["all"]["agreement"]["clusters"] == 8
    rules = [score for figures in found["groups"].values() for score in figures["rules"]]
    apart = {by_rules: 0.0, constant: sum(abs(x - 0.5) for x in rules), inverted: sum(abs(2 * x - 1) for x in rules)}
    assert found["all"]["difference"] == pytest.approx(apart[scores] / 24, abs=1e-6)
    assert rules[::3] == [1.0] * 8  # the right answers


def test_the_sample(groups: list[Group]) -> None:
    """The right answer, that of another problem in the same language, and the first half, all by the same rubric."""
    for group in (groups[0], groups[2]):
        questions = sample(group)
        assert questions is not None and questions == sample(group) and len(questions) == 12
        items = [example.item for example in group.examples("train", 4, 0)]
        for place, item in enumerate(items):
            right, other, half = questions[3 * place : 3 * place + 3]
            assert (right.answer, other.answer) == (item.answer, items[(place + 2) % 4].answer)
            assert item.answer.startswith(half.answer) and len(half.answer) == (len(item.answer) + 1) // 2
            assert {q.prompt for q in (right, other, half)} == {item.question}
            assert [c.text for c in right.rubric] == list(item.rubric) and ruled(right) == 1 > ruled(other)


def test_scores_that_are_missing_or_tied() -> None:
    """By hand: the first problem has a pair in order and a missing score, the second a pair in order and one not."""
    found = figures_of([1.0, 0.0, 0.5, 1.0, 0.0, 1.0], [0.9, 0.4, None, 0.5, 0.2, 0.1])
    assert (found["answers"], found["missing"], found["agreement"]["n"]) == (5, 1, 3)
    assert found["agreement"]["value"] == pytest.approx(1 / 3)  # (2 - 1) / 3; 1.0 and 1.0 are no pair
    assert found["difference"] == pytest.approx((0.1 + 0.4 + 0.5 + 0.2 + 0.9) / 5)
    silent = figures_of([1.0, 0.0, 0.5], [None] * 3)
    assert silent == {"answers": 0, "missing": 3, "difference": None, "agreement": None}


def test_what_rules_cannot_check_is_left_out(groups: list[Group], caplog: pytest.LogCaptureFixture) -> None:
    class Felt:
        name, languages, difficulty = "felt", ("en",), (1, 1, 1)

        def draw(self, *how: Any) -> Any:
            item = domain("writing").draw(*how)
            return replace(item, rubric=(*item.rubric, "It is moving."))

        def grade(self, item: Any, answer: str) -> float:
            return 1.0

    felt = Group("felt", "direct", (Problems(Felt(), groups[0].task.encode),), 1)
    with judge(by_rules) as (fake, asked), caplog.at_level(logging.INFO, "tokensieve"):
        found = measure_agreement(fake, [felt], {})
        assert found["left_out"] == ["felt-direct"] and found["all"]["answers"] == 0 and not asked
        assert "no agreement measured, 0 answers; left out, as rules cannot check it: felt-direct" in caplog.text
        with pytest.raises(UserError, match="judge fake cannot be compared with the rules.*set judge.agreement to 0"):
            check_agreement(found, 0.1)
        found = measure_agreement(fake, [felt, groups[0]], found)
        assert len(asked) == 12 and found["groups"].keys() == {"writing-direct"}
        assert "judge fake beside the rules: Somers' d 1.00 (" in caplog.text
        whole = measure_agreement(fake, groups, found)  # another command of the same run
        assert len(asked) == 24 and whole["all"]["answers"] == 24 and whole["left_out"] == ["felt-direct"]
        assert measure_agreement(fake, groups, found | {"judge": "another"})["left_out"] == []
    assert whole["groups"]["writing-direct"] == found["groups"]["writing-direct"]


def test_a_judge_below_the_threshold_is_refused(groups: list[Group]) -> None:
    with judge(constant) as (fake, _):
        found = measure_agreement(fake, groups, {})
    check_agreement(found, 0.0)
    message = r"judge fake agrees too little with the rules: Somers' d 0.00 \(-.* to 0.*\).* judge.agreement is 0.3"
    with pytest.raises(UserError, match=message) as raised:
        check_agreement(found, 0.3)
    assert "\n" not in str(raised.value)
    with judge(by_rules) as (fake, _):
        check_agreement(measure_agreement(fake, groups, {}), 0.9)
