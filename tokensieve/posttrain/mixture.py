"""Prompts of several groups in one stage of reinforcement learning, each with the reward of its own task."""

from collections.abc import Mapping, Sequence

from datasets import Dataset, concatenate_datasets

from tokensieve.config import UserError
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain.judge import Judge
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.outcomes import RewardFunction, prompts_of, reward_of
from tokensieve.posttrain.rewards import Weights
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks import PlainEncoder
from tokensieve.tasks.problems import Problem

Asked = Sequence[tuple[Group, Sequence[Problem]]]


def shares(total: int, ratios: Mapping[str, float]) -> dict[str, int]:
    """`total` things in these ratios, by the largest remainders. UserError if all ratios are 0."""
    whole = sum(ratios.values())
    if not whole:
        raise UserError("rl.ratios leaves no domain; give one of them a ratio above 0")
    exact = {name: total * ratio / whole for name, ratio in ratios.items()}
    counts = {name: int(share) for name, share in exact.items()}
    left = sorted(exact, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]
    return {name: count + (name in left) for name, count in counts.items()}


def prompts(asked: Asked, encode: PlainEncoder) -> Dataset:
    """The columns of `prompts_of`, and "task": the group, which the rewards go by."""
    parts = []
    for group, examples in asked:
        part = prompts_of(examples, encode)
        parts.append(part.add_column("task", [group.name] * len(part)))
    return concatenate_datasets(parts)


def rewards(
    asked: Asked, encode: PlainEncoder, config: PosttrainConfig, judge: Judge | None = None
) -> list[RewardFunction]:
    """A reward function for each group, which TRL logs apart. It has no opinion on the rows of the others."""
    given = config.reward
    weights = Weights(outcome=given.outcome, rubric=given.rubric, language=given.language, length=given.length)
    languages = {example.language for _, examples in asked for example in examples}
    language = LanguageShare(sorted(languages | {"en", "zh"})) if given.language else None
    free, limit = (int(given.free * config.new_tokens), config.new_tokens) if given.length else (None, None)
    return [
        _only(group.name, reward_of(group.task, examples, encode, weights, language, judge, free, limit))
        for group, examples in asked
    ]


def _only(name: str, reward: RewardFunction) -> RewardFunction:
    """The reward of the rows whose task has this name; None for all others."""

    def chosen(task: Sequence[str], **columns: object) -> list[float | None]:
        places = [place for place, other in enumerate(task) if other == name]
        own = {key: _rows(column, places, len(task)) for key, column in columns.items()}
        found = dict(zip(places, reward(task=[name] * len(places), **own), strict=True)) if places else {}
        return [found.get(place) for place in range(len(task))]

    chosen.__name__ = name
    return chosen


def _rows(value: object, places: Sequence[int], rows: int) -> object:
    """Those rows of a column; whatever is no column as it is."""
    return [value[place] for place in places] if isinstance(value, list) and len(value) == rows else value
