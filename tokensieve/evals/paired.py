"""Estimates of two runs that read the same prompts, and their paired difference.

Such an estimate, as JSON has it, keeps what it was made of: "prompts", a digest of what was read, and either
"by_context", the values of each context's questions, or "nats", a number for each text, whose mean's exponential it is,
with "documents", the number of each text's document (without it, every text is of its own).

Legend: S tokens of a text.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from tokensieve.evals import intervals
from tokensieve.evals.intervals import Estimate


def digest(prompts: Iterable[Any]) -> str:
    """The same for the same prompts only: token ids or texts, in lists and tuples."""
    found = hashlib.blake2b(digest_size=8)
    for prompt in prompts:
        found.update(f"{prompt!r}\n".encode())
    return found.hexdigest()


def texts_digest(sequences: Iterable[Tensor], measured: Sequence[int]) -> str:
    """The digest of texts (S) each, and of the places between which their tokens are measured."""
    return digest([list(measured), *(ids.tolist() for ids in sequences)])


def share_of(by_context: Sequence[Sequence[float]], prompts: str) -> dict[str, Any]:
    """The mean of values in [0, 1], by `intervals.clustered_share`; values of one context may err together."""
    estimate = intervals.clustered_share([*chain(*by_context)], _contexts(by_context))
    return estimate.to_dict() | {"prompts": prompts, "by_context": [list(values) for values in by_context]}


def ratio_of(nats: Sequence[float], prompts: str, documents: Sequence[int] | None = None) -> dict[str, Any]:
    """exp of the mean over texts, by `intervals.ratio`: of losses a perplexity, of differences of losses a ratio.

    documents: of the texts, at least as many; texts of one document may err together.
    """
    of = None if documents is None else list(documents[: len(nats)])
    found = intervals.ratio(nats, of).to_dict() | {"prompts": prompts, "nats": list(nats)}
    return found if of is None else found | {"documents": of}


def compared(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[str, Estimate] | None:
    """("difference", b - a) of shares or ("ratio", b / a) of perplexities, paired; None of different prompts."""
    if a.get("prompts") is None or a["prompts"] != b.get("prompts"):
        return None
    if "nats" in a:
        less = [y - x for x, y in zip(a["nats"], b["nats"], strict=True)]
        return "ratio", intervals.ratio(less, a.get("documents") or b.get("documents"))
    values = [*chain(*b["by_context"])], [*chain(*a["by_context"])]
    return "difference", intervals.clustered_difference(*values, _contexts(a["by_context"]))


def _contexts(by_context: Sequence[Sequence[float]]) -> list[int]:
    return [number for number, values in enumerate(by_context) for _ in values]
