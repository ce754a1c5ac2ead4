"""How to spend a budget of k keys a query: a share for `PerQuery`, a k for each layer for `PerLayer`.

Legend: R measured queries, T keys, M = `most` * k keys tried of each query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.mass import record, selecting_queries
from tokensieve.model import DecoderForCausalLM, SelectionContext
from tokensieve.model.selection import Selector, dense
from tokensieve.selectors.budget import PerQuery
from tokensieve.selectors.shares import best_shares

STEP = 8  # keys that change layers at once
LEAST_MASS = 0.01  # less counts as so much: an indexer that finds next to nothing shall not draw all keys to its layer


@dataclass
class Recorder:
    """Selects as `selector` does, and records what the best keys of the index scores hold."""

    k: int
    most: int  # times k: the keys that are tried
    queries: int  # measured in each sequence and layer, evenly spaced among those that see more than k keys
    selector: Selector = dense
    shares: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> (R, M): of the index scores' softmax
    mass: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> (R, M): of attention, the best score first

    def __call__(self, c: SelectionContext) -> Tensor | None:
        for block in selecting_queries(c, self.k, self.queries):
            indices_RM, shares_RM = best_shares(block, self.most * self.k)
            order = shares_RM.argsort(dim=1, descending=True, stable=True)
            held_RM = block.head_mass().gather(1, indices_RM.clamp_min(0).long()).masked_fill(indices_RM < 0, 0.0)
            pad = (0, self.most * self.k - indices_RM.shape[1])
            for kept, values in ((self.shares, shares_RM), (self.mass, held_RM)):
                ordered = torch.nn.functional.pad(values.gather(1, order), pad)
                kept.setdefault(c.layer, []).append(ordered.cpu())
        return self.selector(c)


def _recorded(
    model: DecoderForCausalLM,
    sequences: Sequence[Tensor],
    k: int | None,
    most: int,
    queries: int,
    selector: Selector = dense,
) -> Recorder:
    recorder = Recorder(k or model.top_k, most, queries, selector)
    record(model, sequences, recorder, recorder.shares, k)
    return recorder


def _threshold(values_RM: Tensor, k: int) -> float:
    """The value that k of a row's values reach, in the mean over the rows."""
    return float(values_RM.flatten().kthvalue(values_RM.numel() - len(values_RM) * k + 1).values)


def fitted_query_share(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], k: int | None = None, most: int = 4, queries: int = 128
) -> float:
    """The `share` with which `PerQuery(share, most)` selects k keys in the mean over the sequences' queries and layers.

    Measured at queries that see more than k keys: on the hidden states of dense attention, and with that share once
    more on those of its own selection, which differ. k: the model's unless given.

    Raises:
        UserError: no sequence is longer than k tokens.
    """
    selector: Selector = dense
    for _ in range(2):
        recorder = _recorded(model, sequences, k, most, queries, selector)
        shares = torch.cat([block for blocks in recorder.shares.values() for block in blocks])
        share = max(_threshold(shares / shares.cumsum(1), recorder.k), torch.finfo(torch.float32).tiny)
        selector = PerQuery(share, most)
    return share


def check_budget(model: DecoderForCausalLM, k: int) -> None:
    """UserError if `fitted_k` cannot share k keys out among the layers of the model, whatever the text."""
    if k % STEP:
        raise UserError(f"k is {k}, and keys are given out {STEP} at a time; give a multiple of {STEP}")
    if model.model.indexers < len(model.model.layers):
        raise UserError("layers of this model share indexers, and so the number of keys; give a model whose do not")


def fitted_k(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], k: int | None = None, most: int = 4, queries: int = 128
) -> tuple[int, ...]:
    """Numbers of keys, one for each layer and k in the mean, with which attention to the keys that are read is nearest
    to attention to all of them:

        min over (k_0, ..., k_L-1) of  sum_l mean_t KL(p_S || p),   sum_l k_l = L k,   STEP <= k_l <= most * k

    p is attention's mean over heads, S the k_l keys of query t with the best index scores, and p_S is p on S,
    normalised: KL(p_S || p) = -log p(S), where p(S) counts as at least LEAST_MASS. The mean is over the sequences'
    queries. Keys go to the layers STEP at a time, each to the layer that gains most by them.

    Raises:
        UserError: no sequence is longer than k tokens, layers share indexers, or k is not a multiple of STEP.
    """
    k = k or model.top_k
    check_budget(model, k)
    recorder = _recorded(model, sequences, k, most, queries)
    held = (torch.cat(recorder.mass[layer]).double().cumsum(1)[:, STEP - 1 :: STEP] for layer in sorted(recorder.mass))
    means = torch.stack([mass.clamp_min(LEAST_MASS).log().mean(0) for mass in held])
    gains = means.diff(dim=1).cummin(1).values  # the mean curve is concave but for noise
    spare = len(gains) * (k // STEP - 1)
    chosen = torch.zeros(gains.numel(), dtype=torch.bool)
    chosen[gains.flatten().argsort(descending=True, stable=True)[:spare]] = True
    return tuple(STEP * (1 + int(n)) for n in chosen.view_as(gains).sum(1))
