"""The share of what dense attention looks at that would be selected.

Legend: N queries, T keys, r the measured queries among them, K selected keys.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.evaluation import evaluating
from tokensieve.model import DecoderForCausalLM, SelectionContext, selecting
from tokensieve.model.selection import Selector, indexer

ROWS = 128  # queries whose scores and probabilities over all keys are held at a time


def selecting_queries(c: SelectionContext, k: int, queries: int | None) -> Iterator[SelectionContext]:
    """The queries that see more than k keys, in blocks of at most `ROWS`; so many of them, evenly spaced, or all."""
    rows = torch.nonzero(c.ends_N - c.starts_N > k).flatten()
    if queries is not None and len(rows) > queries:
        rows = rows[torch.linspace(0, len(rows) - 1, queries, device=rows.device).round().long()]
    for r in rows.split(ROWS) if len(rows) else ():
        yield c.rows(r)


def record(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], recorder: Selector, found: Mapping[int, Any], k: int | None
) -> None:
    """One pass over each sequence, in which `recorder` selects and fills `found`. UserError if that stays empty."""
    with evaluating(model), selecting(model, recorder, k):
        for ids in sequences:
            model.model(input_ids=ids[None].to(model.device))
    if not found:
        raise UserError(
            f"no sequence is longer than k = {k or model.top_k} tokens: nothing is selected; use longer ones"
        )


@dataclass(frozen=True)
class Recall:
    """Means over queries that see more than k keys. `overall`: of held / best, layers averaged; `by_layer`: per layer
    with an indexer.

    `held`, `best`: share of the attention's head-summed mass in the selected set, and in the best set of the same
    size, per layer.
    """

    overall: float
    by_layer: tuple[float, ...]
    held: tuple[float, ...]
    best: tuple[float, ...]
    queries: int  # measured, per layer


@dataclass
class Recorder:
    """A selection that only watches: it measures what `selector` would select, and returns None, which leaves
    attention dense.

    So every layer sees the hidden states of the dense model, and the selector is judged on them.
    """

    queries: int | None  # measured per sequence and layer, evenly spaced; None: all
    selector: Selector = indexer
    sums: dict[int, Tensor] = field(default_factory=dict)  # layer -> sums of held / best, held, best, and the count

    def __call__(self, c: SelectionContext) -> None:
        for block in selecting_queries(c, c.k, self.queries):
            chosen_rK, mass_rT = self.selector(block), block.head_mass()
            assert chosen_rK is not None
            held = mass_rT.gather(1, chosen_rK.long()).double().sum(1)  # more than k keys are visible: there is no -1
            best = mass_rT.topk(c.k, dim=1).values.double().sum(1)
            parts = torch.stack((held / best, held, best, torch.ones_like(held))).sum(1)
            self.sums[c.layer] = self.sums.get(c.layer, 0) + parts


def recall(
    model: DecoderForCausalLM,
    sequences: Sequence[Tensor],
    top_k: int | None = None,
    queries: int | None = None,
    selector: Selector = indexer,
) -> Recall:
    """The attention's mass that the indexer's selection holds, as a share of what the best set of that size holds:

        sum_{s in S_t} p[t,s] / max_{|S| = k} sum_{s in S} p[t,s],   p = mean over heads of attention's probabilities

    S_t is what equation (2) selects and p is the target of equation (3), both on the hidden states of dense attention;
    averaged over queries t with more than k visible keys. `sequences`: int64 (S,) each; `top_k`: the model's unless
    given; `queries`: how many are measured per sequence and layer (None: all); `selector`: in the indexer's place, one
    of k keys per query. Memory: `ROWS` x T, whatever the sequence's length.

    Raises:
        UserError: a model without indexers, or sequences of at most k tokens.
    """
    recorder = Recorder(queries, selector)
    record(model, sequences, recorder, recorder.sums, top_k)
    means = torch.stack([recorder.sums[layer] for layer in sorted(recorder.sums)]).cpu()
    count = int(means[0, 3])
    ratio, held, best = (means[:, :3] / means[:, 3:]).T.tolist()
    return Recall(sum(ratio) / len(ratio), tuple(ratio), tuple(held), tuple(best), count)
