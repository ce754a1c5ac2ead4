"""A number of keys that differs between queries or layers, under one budget.

Legend: N queries, K selected keys.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext
from tokensieve.selectors.shares import keep, stacked


@dataclass(frozen=True)
class PerQuery:
    """A query's best keys, as long as each holds `share` or more of the softmax over it and the better ones.

    Key j, in order of the index scores, is read if p_j / (p_1 + ... + p_j) >= share: at least one, and at most
    1 / share and `most` * k of them. Each key then adds -log(1 - share) or more to the log of the mass that is read.
    Among all selections with as many keys in the mean, this one has the smallest KL(p_S || p) = -log p(S) in the mean,
    if p is attention's. `tokensieve.evals.fitted_query_share` finds the share with which k keys are read in the mean.
    """

    share: float
    most: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.most < 1:
            raise UserError(f"PerQuery(share={self.share}, most={self.most}): 0 < share <= 1, and most is at least 1")

    def __call__(self, c: SelectionContext) -> Tensor:
        return stacked([self._of_block(block) for block in c.blocks()])

    def _of_block(self, c: SelectionContext) -> Tensor:
        scores = c.scores()
        indices = c.select(scores, self.most * c.k)
        chosen = scores.gather(1, indices.clamp_min(0).long()).masked_fill(indices < 0, -torch.inf)
        best, order = chosen.sort(dim=1, descending=True, stable=True)
        read = best - best.logcumsumexp(1) >= math.log(self.share)
        return keep(indices, torch.zeros_like(read).scatter(1, order, read))


@dataclass(frozen=True)
class PerLayer:
    """The top k with a k of its own in each layer. `tokensieve.evals.budget.fitted_k` learns them from attention.

    A checkpoint may hold such numbers itself: `index_topk_by_layer` of its config, which every selector's k follows.
    """

    k: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise UserError(f"PerLayer(k={list(self.k)}): give each layer at least 1 key")

    def __call__(self, c: SelectionContext) -> Tensor:
        if len(self.k) != c.layers:
            raise UserError(f"PerLayer has k for {len(self.k)} layers, and the model has {c.layers}; give one for each")
        return c.topk(self.k[c.layer])
