"""How to spend a budget of k keys a query: a share for `AtLeast`, a k for each layer for `PerLayer`.

Legend: R measured queries, T keys, M = `most` * k keys tried of each query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.evaluation import evaluating
from tokensieve.model import DecoderForCausalLM, SelectionContext, selecting
from tokensieve.selectors.shares import best_shares

ROWS = 128  # queries whose scores and probabilities over all keys are held at a time
STEP = 8  # keys that change layers at once


@dataclass
class Recorder:
    """A selection that only watches, and leaves attention dense: what the best keys of the index scores hold."""

    k: int
    most: int  # times k: the keys that are tried
    queries: int  # measured in each sequence and layer, evenly spaced among those that see more than k keys
    shares: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> (R, M): of the index scores' softmax
    mass: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> (R, M): of attention, the best score first

    def __call__(self, c: SelectionContext) -> None:
        rows = torch.nonzero(c.ends_N - c.starts_N > self.k).flatten()
        if not len(rows):
            return
        if len(rows) > self.queries:
            rows = rows[torch.linspace(0, len(rows) - 1, self.queries, device=rows.device).round().long()]
        for r in rows.split(ROWS):
            block = c.rows(r)
            indices_RM, shares_RM = best_shares(block, self.most * self.k)
            order = shares_RM.argsort(dim=1, descending=True, stable=True)
            held_RM = block.head_mass().gather(1, indices_RM.clamp_min(0).long()).masked_fill(indices_RM < 0, 0.0)
            pad = (0, self.most * self.k - indices_RM.shape[1])
            for kept, values in ((self.shares, shares_RM), (self.mass, held_RM)):
                ordered = torch.nn.functional.pad(values.gather(1, order), pad)
                kept.setdefault(c.layer, []).append(ordered.cpu())


def _recorded(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], k: int | None, most: int, queries: int
) -> Recorder:
    recorder = Recorder(k or model.top_k, most, queries)
    with evaluating(model), selecting(model, recorder, k):
        for ids in sequences:
            model.model(input_ids=ids[None].to(model.device))
    if not recorder.shares:
        raise UserError(
            f"no sequence is longer than k = {k or model.top_k} tokens: nothing is selected; use longer ones"
        )
    return recorder


def fitted_share(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], k: int | None = None, most: int = 4, queries: int = 128
) -> float:
    """The `share` with which `AtLeast(share, most)` selects k keys in the mean over the sequences' queries and layers.

    Measured on the hidden states of dense attention, at queries that see more than k keys. k: the model's unless given.

    Raises:
        UserError: no sequence is longer than k tokens.
    """
    recorder = _recorded(model, sequences, k, most, queries)
    shares = torch.cat([block.flatten() for blocks in recorder.shares.values() for block in blocks])
    asked = sum(len(block) for blocks in recorder.shares.values() for block in blocks)
    return float(shares.kthvalue(len(shares) - asked * (k or model.top_k) + 1).values)


def check_budget(model: DecoderForCausalLM, k: int) -> None:
    """UserError if `fitted_k` cannot share k keys out among the layers of the model, whatever the text."""
    if k % STEP:
        raise UserError(f"k is {k}, and keys are given out {STEP} at a time; give a multiple of {STEP}")
    if model.model.indexers < len(model.model.layers):
        raise UserError("layers of this model share indexers, and so the number of keys; give a model whose do not")


def fitted_k(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], k: int | None = None, most: int = 4, queries: int = 128
) -> tuple[int, ...]:
    """Numbers of keys, one for each layer and k in the mean, that hold the most of attention's mass together:

        max over (k_0, ..., k_L-1) of  sum_l m_l(k_l),   sum_l k_l = L k,   STEP <= k_l <= most * k

    m_l(j) is the mass, in layer l, of the j keys with the best index scores, in the mean over the sequences' queries.
    Keys go to the layers STEP at a time, each to the layer that gains most by them.

    Raises:
        UserError: no sequence is longer than k tokens, layers share indexers, or k is not a multiple of STEP.
    """
    k = k or model.top_k
    check_budget(model, k)
    recorder = _recorded(model, sequences, k, most, queries)
    means = torch.stack([torch.cat(recorder.mass[layer]).mean(0) for layer in sorted(recorder.mass)])
    gains = means.double().unflatten(1, (-1, STEP)).sum(2).cummin(1).values  # the mean curve is concave but for noise
    first, rest = gains[:, :1], gains[:, 1:]
    spare = len(gains) * k // STEP - len(first)
    chosen = torch.zeros(rest.numel(), dtype=torch.bool)
    chosen[rest.flatten().argsort(descending=True, stable=True)[:spare]] = True
    return tuple(STEP * (1 + int(n)) for n in chosen.view_as(rest).sum(1))
