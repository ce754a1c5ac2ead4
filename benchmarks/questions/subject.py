"""The models and texts that every question is asked of, and tables in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokensieve import evals
from tokensieve.evals import Arm
from tokensieve.evals.intervals import Estimate
from tokensieve.evals.suites import asking
from tokensieve.model import DecoderForCausalLM
from tokensieve.tasks import PlainEncoder

SMALL_K = 128  # keys of a selection that is tighter than the bundled model's own 512


@dataclass(frozen=True)
class Sizes:
    context: int = 2048  # tokens of a text
    texts: int = 16  # of each experiment
    few: int = 8  # texts of each kind of input, and where a text is read many times
    asked: int = 100  # short questions of each task
    haystack: int = 4096  # tokens of a context with needles
    haystacks: int = 6  # contexts with needles
    needles: int = 16  # of a context, each asked for
    queries: int = 64  # of a text whose selections are looked at


QUICK = Sizes(context=576, texts=2, few=1, asked=1, haystack=1024, haystacks=2, needles=2, queries=4)


@dataclass(frozen=True)
class Subject:
    """The models that are asked, and texts of equal length, int64 (S) each."""

    dense: DecoderForCausalLM
    sparse: DecoderForCausalLM
    encode: PlainEncoder
    tokenizer: Any
    texts: list[Tensor]
    sizes: Sizes


def percent(e: Estimate) -> str:
    interval = "" if e.low is None else f" ({100 * e.low:.0f} to {100 * e.high:.0f})"
    return f"{100 * e.value:.1f}%{interval}"


def points(e: Estimate | None) -> str:
    """A difference of shares in points; an empty text for None."""
    if e is None:
        return ""
    interval = "" if e.low is None else f" ({100 * e.low:+.1f} to {100 * e.high:+.1f})"
    return f"{100 * e.value:+.1f}{interval}"


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    print("\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)), flush=True)


def losses(model: DecoderForCausalLM, selection: Any, k: int, texts: Sequence[Tensor]) -> Tensor:
    """(texts, S - 1) losses in nats, float64."""
    with asking(Arm(model, selection, k)):
        return torch.stack([evals.token_losses(model, text) for text in texts]).double()
