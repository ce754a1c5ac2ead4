"""The terms of a reward, and their sum: outcome, length, language, and a judge's opinion.

Pure functions: the same arguments give the same numbers, in TRL, in verl and in evaluation.
Source: DeepSeek-V3.2-Exp report, section 2.2 (rule-based outcome, length penalty and language consistency for reasoning
and agents; a generative reward model with a rubric for each prompt elsewhere).
"""

from dataclasses import dataclass, fields

from tokensieve.config import UserError


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is known of one answer. None: the term does not apply to it, or could not be had.

    outcome, rubric, language: in [0, 1], more is better. length: in [0, 1], the penalty for a long answer.
    """

    outcome: float | None = None
    rubric: float | None = None
    language: float | None = None
    length: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value <= 1:  # a NaN too
                raise UserError(f"the reward term {field.name} is {value}; a term is from 0 to 1, or missing")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much each term counts. 0 switches one off.

    The two trade-offs of the report are `length` against `outcome`, and `language` against `outcome`.
    """

    outcome: float = 1.0
    rubric: float = 1.0
    language: float = 0.1
    length: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise UserError(f"the weight of {field.name} is {value}; give a finite number of at least 0")


def reward(terms: Terms, weights: Weights, needed: tuple[str, ...]) -> float | None:
    """r = w_outcome outcome + w_rubric rubric + w_language language - w_length length, over the terms that are there.

    needed: the terms that an answer of this kind is judged by, such as ("outcome",) or ("outcome", "rubric"). None,
    which is no reward and not a reward of 0, if one of them is missing: a judge that did not answer must not look like
    an answer that was judged bad. TRL leaves such answers out of their group's mean.
    """
    if any(getattr(terms, name) is None for name in needed if getattr(weights, name) > 0):
        return None
    signs = {"outcome": 1, "rubric": 1, "language": 1, "length": -1}
    known = {name: getattr(terms, name) for name in signs if getattr(terms, name) is not None}
    return sum(sign * getattr(weights, name) * known[name] for name, sign in signs.items() if name in known)


def length_penalty(tokens: int, free: int, limit: int) -> float:
    """0 up to `free` tokens, 1 from `limit` tokens on, linear in between.

    Source: the soft overlong punishment of DAPO, arXiv 2503.14476, section 3.4. UserError unless 0 <= free < limit.
    """
    if not 0 <= free < limit:
        raise UserError(f"an answer is free up to {free} tokens and at its limit with {limit}; give 0 <= free < limit")
    return min(1.0, max(0.0, (tokens - free) / (limit - free)))
