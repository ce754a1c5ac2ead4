"""From logits to tokens: one row per request, each with its own rules and draws.

Legend: B rows, V vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tokensieve.engine.request import Sampling, TokenLogprob

DRAWS = 64  # numbers of a request that are drawn together


@dataclass(frozen=True)
class SamplingRow:
    """Everything besides the logits that the choice of one row's token depends on.

    sampling: rules of the request.
    seed: seed of its draws.
    position: tokens of the answer before this one.
    seen: tokens of prompt and answer.
    allowed_V: bool, the tokens that a grammar allows, at least one. None allows all.
    banned: tokens that are not chosen.
    """

    sampling: Sampling
    seed: int
    position: int
    seen: Sequence[int]
    allowed_V: Tensor | None = None
    banned: Collection[int] = ()


def uniform(seed: int, position: int) -> float:
    """Number in [0, 1), drawn for a request's token at `position`.

    The generator is counter-based, so the number depends on `seed` and `position` alone.
    """
    return _uniforms(seed, position // DRAWS)[position % DRAWS]


@lru_cache(4096)
def _uniforms(seed: int, block: int) -> list[float]:
    """The numbers of DRAWS positions. A counter has four, of which the first is taken: making a generator is slow."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=block * DRAWS))
    return generator.random(4 * DRAWS)[::4].tolist()


def choose(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Next token of each row. logits_BV: floating, left unchanged.

    At temperature 0 it is the token with the largest logit. Otherwise it is drawn by inverse-CDF sampling over tokens
    sorted by probability: the first token whose cumulative probability exceeds the row's number from `uniform`.
    """
    x_BV = logits_BV.float()
    adjusted = [b for b, row in enumerate(rows) if _is_adjusted(row)]
    if adjusted and x_BV is logits_BV:
        x_BV = logits_BV.clone()
    for b in adjusted:
        _adjust(x_BV[b], rows[b])
    drawn = [b for b, row in enumerate(rows) if row.sampling.temperature > 0]
    if len(drawn) == len(rows):
        return _draw(x_BV, rows).tolist()
    tokens_B = x_BV.argmax(-1)
    if drawn:
        tokens_B[drawn] = _draw(x_BV[drawn], [rows[b] for b in drawn])
    return tokens_B.tolist()


def _is_adjusted(row: SamplingRow) -> bool:
    """Whether `_adjust` changes anything."""
    s = row.sampling
    penalized = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    return bool(penalized or s.logit_bias or row.allowed_V is not None or row.banned)


def _adjust(x_V: Tensor, row: SamplingRow) -> None:
    """Applies penalties, biases, the grammar and bans to a row of logits, in place."""
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.seen)), device=x_V.device)
        logits = x_V[seen]
        x_V[seen] = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
    changes: defaultdict[int, float] = defaultdict(float)
    if s.presence_penalty or s.frequency_penalty:
        for token, count in Counter(row.seen[len(row.seen) - row.position :]).items():
            changes[token] -= s.presence_penalty + count * s.frequency_penalty
    for token, bias in s.logit_bias:
        changes[token] += bias
    if changes:
        x_V[torch.tensor([*changes], device=x_V.device)] += torch.tensor([*changes.values()], device=x_V.device)
    if row.allowed_V is not None:
        x_V.masked_fill_(~row.allowed_V.to(x_V.device), float("-inf"))
    if row.banned:
        x_V[torch.tensor([*row.banned], device=x_V.device)] = float("-inf")


def _draw(x_BV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token drawn for each row, (B) int64."""
    V = x_BV.shape[1]
    sampling = [row.sampling for row in rows]
    columns = (
        [s.temperature for s in sampling],
        [s.top_k or V for s in sampling],
        [s.top_p for s in sampling],
        [s.min_p for s in sampling],
        [uniform(row.seed, row.position) for row in rows],
    )  # one copy brings all of them to a GPU
    temperature, top_k, top_p, min_p, u_B1 = torch.tensor(columns, dtype=torch.float64, device=x_BV.device)[..., None]
    sorted_BV, order_BV = x_BV.sort(dim=-1, descending=True, stable=True)
    # In float64: in float32 a cumulative sum of a hundred thousand probabilities would lose the small ones at its end.
    p_BV = (sorted_BV.double() / temperature).softmax(-1)
    index_V = torch.arange(V, device=x_BV.device)
    p_BV = p_BV.masked_fill(index_V >= top_k, 0)
    p_BV = p_BV / p_BV.sum(-1, keepdim=True)
    before_BV = p_BV.cumsum(-1) - p_BV
    p_BV = p_BV.masked_fill(before_BV >= top_p, 0)
    p_BV = p_BV.masked_fill(p_BV < p_BV[:, :1] * min_p, 0)
    sums_BV = p_BV.cumsum(-1)
    index_B1 = torch.searchsorted(sums_BV, u_B1 * sums_BV[:, -1:], right=True)
    # The last token with a probability: by rounding, the number times the sum may be the whole sum.
    last_B1 = (p_BV > 0).sum(-1, keepdim=True).clamp_min(1) - 1
    return order_BV.gather(1, torch.minimum(index_B1, last_B1))[:, 0]


def logprobs_of(logits_BV: Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprob]:
    """Natural log probabilities of a token per row, and those of the likeliest `alternatives`. logits_BV: floating."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    of_tokens = logprobs_BV.gather(1, torch.tensor(tokens, device=logits_BV.device)[:, None])[:, 0].tolist()
    if not alternatives:
        return [*map(TokenLogprob, tokens, of_tokens)]
    top = logprobs_BV.topk(min(alternatives, logprobs_BV.shape[1]))
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, of_tokens, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]
