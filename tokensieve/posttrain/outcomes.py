"""Problems as TRL takes them: a dataset of prompts, and the reward of each answer to them."""

from collections.abc import Callable, Sequence

from datasets import Dataset

from tokensieve.evals.evaluation import answer_of
from tokensieve.posttrain.judge import Criterion, Judge, Question
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.rewards import Terms, Weights, length_penalty, reward
from tokensieve.tasks import THINK, Answer, PlainEncoder
from tokensieve.tasks.problems import Problem, Problems, split_thinking

RewardFunction = Callable[..., list[float | None]]


def prompts_of(examples: Sequence[Problem], encode: PlainEncoder) -> Dataset:
    """Columns "prompt" (token ids) and "number" (of the example): what TRL trains on, and what a reward finds it by."""
    prompts = [encode.prompt(example.prompt, think=example.mode == "think") for example in examples]
    return Dataset.from_dict({"prompt": prompts, "number": [*range(len(examples))]})


def demonstrations_of(examples: Sequence[Problem], encode: PlainEncoder) -> Dataset:
    """Columns "input_ids" and "completion_mask" for a cold start under TRL's SFTTrainer: answers alone are learnt."""
    rows = []
    for example in examples:
        prompt = encode.prompt(example.prompt, think=example.mode == "think")
        text = example.demonstration
        if example.mode == "think" and encode.markers:  # the prompt has opened the thoughts
            text = text.removeprefix(THINK)
        answer = [*encode.solution(text), *encode.chat().close]
        rows.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": [mask for _, mask in rows]})


def reward_of(
    task: Problems,
    examples: Sequence[Problem],
    encode: PlainEncoder,
    weights: Weights | None = None,
    language: LanguageShare | None = None,
    judge: Judge | None = None,
    free_tokens: int | None = None,
    limit_tokens: int | None = None,
) -> RewardFunction:
    """The reward function that TRL calls with the answers to `prompts_of(examples)`.

    outcome: the task's reward. rubric: what `judge` says, if one is given, of answers whose problems have a rubric; one
    that it could not score has no reward. language: of thoughts and answer, in the prompt's language, if a
    `LanguageShare` is given. length: the penalty from `free_tokens` to `limit_tokens` of an answer, if both are given.
    The text is decoded here, since TRL's own text has lost the marker that ends the thoughts.
    """
    weighed, both = weights or Weights(), free_tokens is not None and limit_tokens is not None

    def rewards(completion_ids: Sequence[Sequence[int]], number: Sequence[int], **_: object) -> list[float | None]:
        answers = [answer_to(encode, examples[place], ids) for ids, place in zip(completion_ids, number, strict=True)]
        judged = _judged(judge, [examples[place] for place in number], answers)
        found = []
        for ids, place, answer in zip(completion_ids, number, answers, strict=True):
            example, (thoughts, text) = examples[place], split_thinking(answer.text)
            prose, by_judge = f"{thoughts or ''}\n{text}", judge is not None and bool(example.item.rubric)
            terms = Terms(
                outcome=task.reward(example, answer),
                rubric=judged.pop(0) if by_judge else None,
                language=None if language is None else language(prose, example.language),
                length=length_penalty(len(ids), free_tokens or 0, limit_tokens or 1) if both else None,
            )
            found.append(reward(terms, weighed, needed=("outcome", "rubric") if by_judge else ("outcome",)))
        return found

    rewards.__name__ = task.name
    return rewards


def answer_to(encode: PlainEncoder, example: Problem, ids: Sequence[int]) -> Answer:
    """The text of sampled ids, with the marker that its prompt wrote for it."""
    ended = bool(ids) and ids[-1] in encode.ends
    answer = answer_of(encode, list(ids[:-1] if ended else ids), ended)
    opened = example.mode == "think" and encode.markers
    return Answer(f"{THINK}{answer.text}", answer.ended) if opened else answer


def _judged(judge: Judge | None, examples: Sequence[Problem], answers: Sequence[Answer]) -> list[float | None]:
    """The judge's scores of the answers whose problems have a rubric, in their order. It reads no thoughts."""
    if judge is None:
        return []
    asked = [
        Question(example.item.question, split_thinking(answer.text)[1], tuple(map(Criterion, example.item.rubric)))
        for example, answer in zip(examples, answers, strict=True)
        if example.item.rubric
    ]
    return judge.scores(asked) if asked else []
