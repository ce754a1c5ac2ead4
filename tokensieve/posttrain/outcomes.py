"""Problems as rollouts and TRL take them: prompts, demonstrations, results of tools, and the reward of each answer."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from statistics import fmean
from typing import TypeVar, cast

from datasets import Dataset

from tokensieve.config import UserError
from tokensieve.evals.evaluation import answer_of
from tokensieve.machine import usable_cores
from tokensieve.posttrain.judge import Criterion, Judge, Question
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.rewards import Terms, Weights, length_penalty, reward
from tokensieve.posttrain.rollouts import Respond
from tokensieve.tasks import THINK, Answer, PlainEncoder
from tokensieve.tasks.problems import Agent, Problem, Problems, split_thinking
from tokensieve.tasks.turns import Message

RewardFunction = Callable[..., list[float | None]]
Given = TypeVar("Given")
Found = TypeVar("Found")


def prompts_of(examples: Sequence[Problem], encode: PlainEncoder) -> Dataset:
    """Columns "prompt" (token ids) and "number" (of the example): what TRL trains on, and what a reward finds it by."""
    return Dataset.from_dict({"prompt": [_prompt(e, encode) for e in examples], "number": [*range(len(examples))]})


def demonstrations_of(examples: Sequence[Problem], encode: PlainEncoder) -> Dataset:
    """Columns "input_ids" and "completion_mask" for a cold start under TRL's SFTTrainer: answers alone are learnt.

    The answers of the worked examples, which are earlier turns of the prompt, are learnt too: a row of 1.6K tokens has
    dozens. An agent's is a whole episode, of which the model's turns are learnt, and the results of tools are not.
    Examples without a known answer are left out. UserError if no other is there.
    """
    rows = [
        _conversation(example, encode, [*_earlier(example), *example.steps, (example.demonstration, None)])
        for example in examples
        if example.item.answer
    ]
    if not rows:
        raise UserError("no example has a right answer to show, so there is no cold start; begin with GRPO")
    return Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": [mask for _, mask in rows]})


def respond_of(asked: Sequence[tuple[Problems, Sequence[Problem]]], encode: PlainEncoder) -> Respond:
    """The results of the tools of these problems, for `Rollouts.sample` and `SparseGRPOTrainer`.

    Problems without tools may be among them. UserError for two of an agent that have one prompt: nobody could know
    whose tools are called. The function that is returned raises it for a prompt that is none of theirs.
    """
    known: dict[tuple[int, ...], tuple[Problems, Problem]] = {}
    for task, examples in asked:
        for example in examples:
            _, other = known.setdefault(tuple(_prompt(example, encode)), (task, example))
            if isinstance(task.domain, Agent) and other.item != example.item:
                raise UserError(
                    f"two problems of {task.name} have the same prompt; give them worked examples: tokens=..."
                )

    def respond(prompt: tuple[int, ...], turns: Sequence[Sequence[int]]) -> list[int] | None:
        if prompt not in known:
            raise UserError(f"a prompt of {len(prompt)} tokens is none of the problems whose tools are known")
        task, example = known[prompt]
        result = task.respond(example, [_text(encode, example, turn) for turn in turns])
        return None if result is None else encode.next_turn(result, think=example.mode == "think")

    return respond


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

    outcome: the task's reward; if a judge alone can tell, whether the answer ends and keeps to its mode. rubric: what
    `judge` says, if one is given, of answers whose problems have a rubric; one that it could not score has no reward.
    language: of thoughts and answer, in the prompt's language, if a `LanguageShare` is given. length: the penalty from
    `free_tokens` to `limit_tokens` of an answer, if both are given.
    The text is decoded here, since TRL's own text has lost the marker that ends the thoughts. An agent's answers need
    the column "written", a rollout's `mask`, to know its turns from the results of tools: UserError without it.
    The column "ended", a rollout's too, may say which answers did. `log_metric`, as TRL gives it, gets the mean outcome
    by the name outcome/TASK.
    """
    weighed, both = weights or Weights(), free_tokens is not None and limit_tokens is not None

    def rewards(
        completion_ids: Sequence[Sequence[int]],
        number: Sequence[int],
        written: Sequence[Sequence[bool]] | None = None,
        ended: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: object,
    ) -> list[float | None]:
        if written is None and isinstance(task.domain, Agent):
            raise UserError(f"the answers of {task.name} come without the masks of their rollouts; give written=...")
        masks = [[True] * len(ids) for ids in completion_ids] if written is None else written
        asked = [examples[place] for place in number]
        ends = [None] * len(masks) if ended is None else ended
        answers = [answer_to(encode, *row) for row in zip(asked, completion_ids, masks, ends, strict=True)]
        judged = _judged(judge, asked, answers)
        outcomes = in_threads(lambda row: _outcome(task, *row, judge is not None), zip(asked, answers, strict=True))
        if log_metric is not None and outcomes:
            log_metric(f"outcome/{task.name}", fmean(outcomes))
        found = []
        for example, mask, answer, outcome in zip(asked, masks, answers, outcomes, strict=True):
            by_judge = judge is not None and bool(example.item.rubric)
            terms = Terms(
                outcome=outcome,
                rubric=judged.pop(0) if by_judge else None,
                language=None if language is None else language(prose(answer), example.language),
                length=length_penalty(sum(mask), free_tokens or 0, limit_tokens or 1) if both else None,
            )
            found.append(reward(terms, weighed, needed=("outcome", "rubric") if by_judge else ("outcome",)))
        return found

    rewards.__name__ = task.name
    return rewards


def in_threads(do: Callable[[Given], Found], each: Iterable[Given]) -> list[Found]:
    """`do` of each, in order: grading may run programs, which threads wait for side by side."""
    with ThreadPoolExecutor(usable_cores() or 1) as pool:
        return [*pool.map(do, each)]


def _outcome(task: Problems, example: Problem, answer: Answer, judging: bool) -> float:
    ruled = bool(example.item.data) or not (judging and bool(example.item.rubric))
    return task.reward(example, answer) if ruled else float(answer.ended and task.kept(example, answer))


def turns_of(ids: Sequence[int], written: Sequence[bool]) -> list[list[int]]:
    """The stretches of an answer that the model wrote."""
    stretches = groupby(zip(ids, written, strict=True), key=lambda pair: pair[1])
    return [[token for token, _ in stretch] for wrote, stretch in stretches if wrote]


def _prompt(example: Problem, encode: PlainEncoder) -> list[int]:
    return _conversation(example, encode, _earlier(example))[0]


def _earlier(example: Problem) -> list[tuple[str, str | None]]:
    """The assistant's turns in the prompt, each with the user's that follows."""
    texts = [message["content"] for message in cast("Sequence[Message]", example.prompt)[1:]]
    return [*zip(texts[::2], texts[1::2], strict=True)]


def _conversation(
    example: Problem, encode: PlainEncoder, turns: Sequence[tuple[str, str | None]]
) -> tuple[list[int], list[int]]:
    """Ids of the prompt's first message and of these turns, and for each id 1 if it is the assistant's, else 0.

    Each turn of the assistant is followed by one of the user, or by None at the end. Thoughts are in all of them.
    """
    think, close = example.mode == "think", encode.chat().close
    ids = encode.prompt(cast("Sequence[Message]", example.prompt)[:1], think)
    mask = [0] * len(ids)
    for text, following in turns:
        turn = [*encode.solution(text.removeprefix(THINK) if _opens_thoughts(example, encode) else text), *close]
        after = [] if following is None else encode.next_turn(following, think)
        ids, mask = [*ids, *turn, *after], [*mask, *[1] * len(turn), *[0] * len(after)]
    return ids, mask


def _opens_thoughts(example: Problem, encode: PlainEncoder) -> bool:
    """Whether what stands before a turn has opened its thoughts."""
    return example.mode == "think" and bool(encode.markers)


def answer_to(
    encode: PlainEncoder,
    example: Problem,
    ids: Sequence[int],
    written: Sequence[bool] | None = None,
    ended: bool | None = None,
) -> Answer:
    """The text of sampled ids, with the marker that its prompt wrote for it.

    written: a rollout's `mask`, without which an agent's turns cannot be told from the results of tools; None: all.
    ended: the rollout's; None: if the last token is one that ends turns, as is that of a call without its result.
    """
    turns = turns_of(ids, [True] * len(ids) if written is None else written)
    *earlier, last = [_text(encode, example, turn) for turn in turns or [[]]]
    if ended is None:
        ended = bool(turns) and turns[-1][-1] in encode.ends
    return Answer(last, ended, tuple(earlier))


def _text(encode: PlainEncoder, example: Problem, turn: Sequence[int]) -> str:
    ended = bool(turn) and turn[-1] in encode.ends
    text = answer_of(encode, list(turn[:-1] if ended else turn), ended).text
    return f"{THINK}{text}" if _opens_thoughts(example, encode) else text


def prose(answer: Answer) -> str:
    """Thoughts and answer, without an agent's calls, which are in no language."""
    thoughts, text = split_thinking(answer.text)
    return "\n".join([*(split_thinking(turn)[0] or "" for turn in answer.earlier), thoughts or "", text])


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
