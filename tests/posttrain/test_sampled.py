"""Sampled answers: their scores and figures, and an agent's episode on its way to a row of training data."""

from dataclasses import replace

import pytest

import tokensieve
from tests.support.models import config, ours
from tokensieve.posttrain import LanguageShare, distillation
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain.outcomes import demonstrations_of, reward_of
from tokensieve.posttrain.rewards import Weights
from tokensieve.posttrain.rollouts import Rollout
from tokensieve.posttrain.sampled import Sampled, figures, pass_rate, room, sample, scored
from tokensieve.report.posttrain import accuracy_cells
from tokensieve.tasks import Answer, encoder
from tokensieve.tasks.problems import Mode, Problems, domain

K = 16


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


def group(encode, name: str, mode: Mode, tokens: int = 60) -> Group:
    asked = domain(name)
    return Group(name, mode, (Problems(asked, encode, mode, "en", tokens),), asked.difficulty[1])


@pytest.mark.parametrize("mode", ["think", "direct"])
def test_an_episode_becomes_a_row(mode: Mode, encode) -> None:
    """The right episode of an agent passes, only the model's own tokens count, and distillation learns these alone."""
    agent = group(encode, "search", mode)
    examples = agent.examples("train", 1, 0)
    (shown,) = demonstrations_of(examples, encode).to_list()
    own = shown["completion_mask"].index(1)
    prompt, answer = tuple(shown["input_ids"][:own]), tuple(shown["input_ids"][own:])
    written = tuple(map(bool, shown["completion_mask"][own:]))
    assert not all(written)
    rollout = Rollout(prompt, answer, (0.0,) * sum(written), True, (), written)
    found = [[scored(agent, examples[0], rollout, encode)]]
    assert found[0][0].score == pass_rate(found) == 1 and figures(found, K)["tokens"] == sum(written) < len(answer)
    (line,) = distillation.lines_of(found, "specialist-search")
    assert distillation.row_of(line) == shown and all(turn in line["text"] for turn, _ in examples[0].steps)


def test_an_episode_that_is_cut_before_a_result_has_not_ended(encode) -> None:
    """Its last token ends a turn; neither the figures nor a reward take that for the end."""
    agent = group(encode, "search", "direct")
    (example,) = agent.examples("train", 1, 0)
    (shown,) = demonstrations_of([example], encode).to_list()
    own = shown["completion_mask"].index(1)
    call = tuple(shown["input_ids"][own : shown["completion_mask"].index(0, own)])
    while call[-1] not in encode.ends:
        call = call[:-1]
    rollout = Rollout(tuple(shown["input_ids"][:own]), call, (0.0,) * len(call), False)
    cut = scored(agent, example, rollout, encode)
    assert figures([[cut]], K)["ended"] == 0 and not cut.answer.ended and cut.score == 0
    judge = type("Kind", (), {"scores": lambda self, asked: [1.0 for _ in asked]})()
    judged = replace(example, item=replace(example.item, data=(), rubric=("It is kind.",)))
    given = reward_of(agent.task, [judged], encode, Weights(language=0, length=0), judge=judge)
    row = {"completion_ids": [call], "number": [0], "written": [[True] * len(call)]}
    assert given(**row, ended=[True]) == [2.0] and given(**row, ended=[False]) == [1.0]


def test_agents_get_room_for_results(encode) -> None:
    """Answers of an agent and of another domain in one batch, by a model that calls nothing."""
    tokenizer, model = tokensieve.load_tokenizer("base"), ours(config("v32", index_topk=K, vocab_size=4096))
    groups = [group(encode, "search", "direct"), group(encode, "logic", "direct")]
    asked = [(each, each.examples("test", 1, 0)) for each in groups]
    assert room(asked, 64) == 64 and room(asked[1:], 64) == 0
    found = sample(
        model, tokenizer, encode, asked, 2, 4, result_tokens=64, selector="indexer", at_once=4, temperature=0.0
    )  # fmt: skip
    assert [[sampled.group for sampled in answers] for answers in found] == [
        ["search-direct"] * 2,
        ["logic-direct"] * 2,
    ]
    assert all(len(sampled.rollout.answer) <= 4 and sampled.score == 0 for answers in found for sampled in answers)


def test_figures(encode) -> None:
    (example,) = group(encode, "logic", "direct").examples("test", 1, 0)

    def answer(tokens: int, score: float, ended: bool) -> list[Sampled]:
        rollout = Rollout(tuple(range(30)), tuple(range(tokens)), (0.0,) * tokens, ended)
        return [Sampled("logic-direct", example, rollout, Answer("x", ended), score)]

    found = [answer(10, 1.0, True), answer(20, 0.5, False)]
    shown = figures(found, 20)
    assert shown["tokens"] == 15 and shown["ended"] == 0.5 and shown["past_k"] == (20 + 30) / (40 + 50)
    assert shown["accuracy"]["value"] == 0.75 and shown["accuracy"]["n"] == 2
    assert figures(found, None)["past_k"] is None and pass_rate(found) == 0.5


def test_the_language_of_answers_is_measured(encode) -> None:
    """Thoughts count, numbers have none, and figures without it, as of earlier versions, can still be shown."""
    (example,) = group(encode, "logic", "think").examples("test", 1, 0)

    def answer(text: str) -> list[Sampled]:
        return [Sampled("logic-think", example, Rollout((1,) * 8, (2,), (0.0,), True), Answer(text, True), 1.0)]

    english, chinese = "The river was wide, and nobody had crossed it.", "这条河又宽又慢，多年来没有人渡过它。"
    found = [answer(f"<think>{english}</think>42"), answer(f"<think>{chinese}</think>42"), answer("42")]
    shown = figures(found, K, LanguageShare())
    assert shown["language"]["value"] == 0.5 and shown["language"]["n"] == 2
    assert figures(found[2:], K, LanguageShare())["language"] is None
    place = accuracy_cells(shown).index("50%")
    for without in (figures(found, K), {key: value for key, value in shown.items() if key != "language"}):
        assert accuracy_cells(without)[place] == "" and len(accuracy_cells(without)) == len(accuracy_cells(shown))


def test_an_episode_is_cut_off_where_it_would_be_alone(encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another group, whose longer prompts need more room: figures of a group do not depend on what is asked."""
    tokenizer, model = tokensieve.load_tokenizer("base"), ours(config("v32", index_topk=K, vocab_size=4096))
    model.generation_config.eos_token_id = [*range(0, 4096, 8)]  # so many that an episode has several turns
    monkeypatch.setattr(Problems, "respond", lambda *_: "some words of a result")
    agent, other = group(encode, "search", "direct", 60), group(encode, "logic", "direct", 700)
    asked = [(each, each.examples("test", 2, 0)) for each in (agent, other)]
    alone, beside = (
        sample(
            model, tokenizer, encode, given, 1, 40, result_tokens=40, selector="indexer", at_once=4, temperature=0.0
        )
        for given in (asked[:1], asked)
    )  # fmt: skip
    assert [found.rollout.answer for (found,) in alone] == [found.rollout.answer for (found,) in beside[:2]]
    assert all(0 < found.rollout.mask.count(False) <= 40 and not found.rollout.ended for (found,) in alone)
