"""A trial of a selector of one's own on a few tokens: before a long evaluation, and before a server answers.

Legend: N queries, K selected keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.evaluation import evaluating
from tokensieve.model import DecoderForCausalLM, join, selecting
from tokensieve.model.selection import SelectionContext, Selector, check_indices, is_own, name_of, resolve

TRIED = 64  # tokens past k
ROUNDED = 0.05  # share of the keys that may differ if queries are scored in other company


def try_selection(
    model: DecoderForCausalLM, selection: str | Selector, top_k: int | None = None, ids: Tensor | None = None
) -> None:
    """UserError if a selector breaks its contract on the first tokens of a text: none of `SELECTORS` is tried.

    Besides what `check_indices` looks at, a query's keys must not depend on the other queries of the call. ids (tokens)
    int64, of which a little more than k are read; unless given, arbitrary ones.
    """
    selector, config = resolve(selection), model.config
    if is_own(selector):
        return
    k = (top_k or model.top_k) if model.is_sparse else 0
    tokens = min(k + TRIED, config.max_position_embeddings)
    few = torch.arange(tokens) % config.vocab_size if ids is None else ids[:tokens]
    with evaluating(model), selecting(model, _Tried(selector), top_k, check=False):
        model.model(input_ids=few[None].to(model.device))


@dataclass(frozen=True)
class _Tried:
    """A selector that is asked twice, for all queries and for the second half of them."""

    selector: Selector

    def __call__(self, c: SelectionContext) -> Tensor | None:
        indices = self.selector(c)
        if indices is not None:
            check_indices(self.selector, c, indices)
        half = slice(len(c) // 2, None)
        alone = self.selector(c.rows(half))
        if alone is not None:
            check_indices(self.selector, c.rows(half), alone)
        if _differing(c.rows(half), None if indices is None else indices[half], alone) > ROUNDED:
            raise UserError(
                f"selection {name_of(self.selector)} gave queries of layer {c.layer} other keys when it was asked "
                "for half of them; let them depend on the query's own scores and range, c.starts_N and c.ends_N"
            )
        return indices


def _differing(c: SelectionContext, a_NK: Tensor | None, b_NK: Tensor | None) -> float:
    """The keys that are in one of two index sets alone, over the keys of the first. None is every key."""
    union_NK = None if a_NK is None or b_NK is None else join(a_NK, b_NK)
    every = int((c.ends_N - c.starts_N).sum())
    first, second, union = (every if x is None else int((x >= 0).sum()) for x in (a_NK, b_NK, union_NK))
    return (2 * union - first - second) / max(1, first)
