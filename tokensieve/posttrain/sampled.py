"""Answers that a model samples to problems, and what they are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.engine import Sampling
from tokensieve.evals import intervals
from tokensieve.evals.progress import OnProgress
from tokensieve.model import DecoderForCausalLM
from tokensieve.posttrain.groups import Group
from tokensieve.posttrain.language import LanguageShare
from tokensieve.posttrain.outcomes import answer_to, in_threads, prompts_of, prose, respond_of
from tokensieve.posttrain.rollouts import Rollout, Rollouts
from tokensieve.tasks import Answer, PlainEncoder
from tokensieve.tasks.problems import Agent, Problem


@dataclass(frozen=True)
class Sampled:
    """One answer to a problem. score: of the task, in [0, 1]."""

    group: str
    example: Problem
    rollout: Rollout
    answer: Answer
    score: float


def sample(
    model: DecoderForCausalLM,
    tokenizer: Any,
    encode: PlainEncoder,
    asked: Sequence[tuple[Group, Sequence[Problem]]],
    samples: int,
    new_tokens: int,
    *,
    result_tokens: int,
    selector: str,
    at_once: int,
    temperature: float = 1.0,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[list[Sampled]]:
    """`samples` answers to each problem of each group, in order; at temperature 0 the likeliest.

    result_tokens: of the results of an agent's tools in one answer, at most.
    """
    problems = [(group, example) for group, examples in asked for example in examples]
    prompts = prompts_of([example for _, example in problems], encode)["prompt"]
    longest = max(map(len, prompts)) + new_tokens + room(asked, result_tokens)
    respond = respond_of([(group.task, examples) for group, examples in asked], encode)
    rollouts = Rollouts(
        model, tokenizer, longest, at_once=at_once, selector=selector, keep_selection=False, result_tokens=result_tokens
    )
    sampling = Sampling(max_tokens=new_tokens, temperature=temperature)
    answers = rollouts.sample(prompts, samples, sampling, seed, on_progress, respond)
    each = [(g, example, rollout) for (g, example), found in zip(problems, answers, strict=True) for rollout in found]
    graded = in_threads(lambda row: scored(*row, encode), each)
    return [graded[place * samples : (place + 1) * samples] for place in range(len(problems))]


def room(asked: Sequence[tuple[Group, Sequence[Problem]]], result_tokens: int) -> int:
    """Tokens that results of tools may take: none unless an agent is asked."""
    return result_tokens if any(isinstance(group.task.domain, Agent) for group, _ in asked) else 0


def scored(group: Group, example: Problem, rollout: Rollout, encode: PlainEncoder) -> Sampled:
    answer = answer_to(encode, example, rollout.answer, rollout.mask, rollout.ended)
    return Sampled(group.name, example, rollout, answer, group.task.score(example, answer).value)


def pass_rate(found: Sequence[Sequence[Sampled]]) -> float:
    """The share of the answers whose score is 1."""
    scores = [sampled.score for answers in found for sampled in answers]
    return sum(score == 1 for score in scores) / len(scores)


def figures(
    found: Sequence[Sequence[Sampled]], top_k: int | None, language: LanguageShare | None = None
) -> dict[str, Any]:
    """{"scores": of each; "accuracy": `Estimate` of their mean; "tokens": mean of an answer, without results of tools;
    "ended": share of the answers that did; "past_k": share of the queries, in prompt and answer, that see more than
    `top_k` keys, None for a dense model; "language": `Estimate` of the mean share of an answer's letters that are in
    its prompt's language, over the answers with prose, None without these or without `language`}. One answer to each
    problem.

    Scores that are shares, as of writing, vary less than those of 0 or 1, so Wilson's interval is on the safe side.
    """
    each = [answers[0] for answers in found]
    lengths = [len(sampled.rollout.prompt) + len(sampled.rollout.answer) for sampled in each]
    shares = [] if language is None else [language.of_prose(prose(s.answer), s.example.language) for s in each]
    known = [share for share in shares if share is not None]
    return {
        "scores": [sampled.score for sampled in each],
        "accuracy": intervals.share(sum(sampled.score for sampled in each), len(each)).to_dict(),
        "tokens": sum(sum(sampled.rollout.mask) for sampled in each) / len(each),
        "ended": sum(sampled.answer.ended for sampled in each) / len(each),
        "past_k": None if top_k is None else sum(max(0, length - top_k) for length in lengths) / sum(lengths),
        "language": intervals.share(sum(known), len(known)).to_dict() if known else None,
    }


def gain(scores: Sequence[float], before: Sequence[float]) -> intervals.Estimate:
    """The mean score less that of another model on the same problems, with the interval of a paired difference."""
    return intervals.clustered_difference(scores, before, range(len(scores)))
