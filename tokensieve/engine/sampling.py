"""From logits to tokens: a row per request, each with its own rules and its own draws.

Legend: B rows, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokensieve.engine.request import Sampling, TokenLogprob


@dataclass(frozen=True)
class SamplingRow:
    """What one row's choice depends on besides its logits."""

    sampling: Sampling
    seed: int
    position: int  # tokens of the answer before this one
    seen: Sequence[int]  # tokens of prompt and answer
    allowed_V: Tensor | None = None  # bool: what a grammar lets through; at least one token


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) of a request's token at `position`: of a counter-based generator, so it depends on nothing else."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())


def choose(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The next token of each row. A draw is the first token, in order of probability, whose cumulative one passes the row's number."""
    x_BV = logits_BV.float()
    bent = [b for b, row in enumerate(rows) if _bends(row)]
    if bent and x_BV is logits_BV:
        x_BV = logits_BV.clone()
    for b in bent:
        _bend(x_BV[b], rows[b])
    chosen_B = x_BV.argmax(-1)
    drawn = [b for b, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        chosen_B[drawn] = _draw(x_BV[drawn], [rows[b] for b in drawn])
    return chosen_B.tolist()


def _bends(row: SamplingRow) -> bool:
    s = row.sampling
    penalized = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    return bool(penalized or s.logit_bias or row.allowed_V is not None)


def _bend(x_V: Tensor, row: SamplingRow) -> None:
    """Penalties, biases and the grammar, in place."""
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.seen)), device=x_V.device)
        held = x_V[seen]
        x_V[seen] = torch.where(held > 0, held / s.repetition_penalty, held * s.repetition_penalty)
    change: defaultdict[int, float] = defaultdict(float)
    if s.presence_penalty or s.frequency_penalty:
        for token, count in Counter(row.seen[len(row.seen) - row.position :]).items():
            change[token] -= s.presence_penalty + count * s.frequency_penalty
    for token, bias in s.logit_bias:
        change[token] += bias
    if change:
        x_V[torch.tensor([*change], device=x_V.device)] += torch.tensor([*change.values()], device=x_V.device)
    if row.allowed_V is not None:
        x_V.masked_fill_(~row.allowed_V.to(x_V.device), float("-inf"))


def _draw(x_BV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=x_BV.device)[:, None]

    V = x_BV.shape[1]
    temperature = column([row.sampling.temperature for row in rows])
    sorted_BV, order_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    # in float64: a cumulative sum of a hundred thousand probabilities loses what lies at its end
    p_BV = (sorted_BV.double() / temperature).softmax(-1)
    rank = torch.arange(V, device=x_BV.device)
    p_BV = p_BV.masked_fill(rank >= column([row.sampling.top_k or V for row in rows]), 0)
    p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    before_BV = p_BV.cumsum(-1) - p_BV
    p_BV = p_BV.masked_fill(before_BV >= column([row.sampling.top_p for row in rows]), 0)
    p_BV = p_BV.masked_fill(p_BV < p_BV[:, :1] * column([row.sampling.min_p for row in rows]), 0)
    sums_BV = p_BV.cumsum(-1)
    u_B1 = column([uniform(row.seed, row.position) for row in rows])
    place_B1 = torch.searchsorted(sums_BV, u_B1 * sums_BV[:, -1:], right=True)
    last_B1 = (p_BV > 0).sum(-1, keepdim=True).clamp_min(1) - 1  # the rounded number may be the whole sum
    return order_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]


def logprobs_of(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """`token`'s natural log probability and those of the likeliest `alternatives` tokens."""
    logprobs_V = logits_V.float().log_softmax(-1)
    top = logprobs_V.topk(min(alternatives, logprobs_V.shape[0]))
    return TokenLogprob(
        token, float(logprobs_V[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
