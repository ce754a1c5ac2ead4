"""Prompts of several groups in one dataset: their counts, and their own rewards."""

import pytest

import tokensieve
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import mixture
from tokensieve.posttrain.groups import groups_of
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import domain


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


def settings(*changes: str) -> PosttrainConfig:
    return load_config(PosttrainConfig, "posttrain-tiny", ("tokens=60", "new_tokens=64", *changes))


def asked(config: PosttrainConfig, encode, *domains: str, count: int = 2):
    return [
        (group, group.examples("train", count, 0)) for group in groups_of(config, [*map(domain, domains)], encode, {})
    ]


def test_counts_follow_the_ratios() -> None:
    assert mixture.shares(7, {"a": 1, "b": 1, "c": 2}) == {"a": 2, "b": 2, "c": 3}
    assert mixture.shares(1, {"a": 1, "b": 1}) == {"a": 1, "b": 0}
    assert mixture.shares(4, {"a": 1, "b": 0}) == {"a": 4, "b": 0}
    with pytest.raises(UserError, match=r"rl.ratios leaves no domain"):
        mixture.shares(4, {"a": 0.0})


def test_each_prompt_has_the_reward_of_its_own_task(encode) -> None:
    """Right answers of both domains in one batch, out of order: each is scored by its own group alone."""
    config = settings("reward.language=0", "reward.length=0")
    groups = asked(config, encode, "mathematics", "logic")
    data = mixture.prompts(groups, encode)
    assert data["task"] == [name for group, _ in groups for name in [group.name] * 2]
    assert data["task"][::2] == ["mathematics-think", "mathematics-direct", "logic-think", "logic-direct"]
    rewards = mixture.rewards(groups, encode, config)
    assert [reward.__name__ for reward in rewards] == data["task"][::2]
    order = [5, 0, 7, 2, 4]
    rows = [(data[place]["task"], data[place]["number"]) for place in order]
    shown = {group.name: [example.demonstration for example in examples] for group, examples in groups}
    answers = [
        [*encode.solution(shown[task][number].removeprefix("<think>")), *encode.chat().close] for task, number in rows
    ]
    answers[-1] = answers[1]  # wrong, in the group of the first
    names, numbers = [task for task, _ in rows], [number for _, number in rows]
    given = [reward(completion_ids=answers, number=numbers, task=names, trainer_state=None) for reward in rewards]
    assert dict(zip(data["task"][::2], given, strict=True)) == {
        "mathematics-think": [None, 1.0, None, None, None],
        "mathematics-direct": [None, None, None, 1.0, None],
        "logic-think": [1.0, None, None, None, 0.0],
        "logic-direct": [None, None, 1.0, None, None],
    }


def test_languages_take_turns(encode) -> None:
    (group, _), *_ = groups = asked(settings('languages=["en", "zh"]'), encode, "logic", "writing", count=3)
    assert [example.language for example in group.examples("train", 3, 0)] == ["en", "zh", "en"]
    assert {example.language for example in groups[-1][1]} == {"en"}  # writing has no other
    with pytest.raises(UserError, match=r"writing has problems in en, none of them in languages"):
        asked(settings('languages=["zh"]'), encode, "writing")
