"""The top k with attention sinks and a window kept free of the indexer's judgement."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext, join, window


@dataclass(frozen=True)
class Recent:
    """The `first` keys, the `last` ones, and the best of the index scores: at most k in all, as many as top k reads.

    UserError for k of `first` + `last` or less. Source of sinks and window: Xiao et al., arXiv 2309.17453.
    """

    last: int = 64
    first: int = 4

    def __post_init__(self) -> None:
        if self.last < 1 or self.first < 1:
            raise UserError(f"Recent keeps last = {self.last} and first = {self.first} keys; give at least 1 of each")

    def __call__(self, c: SelectionContext) -> Tensor:
        scored = c.k - self.first - self.last
        if scored < 1:
            raise UserError(
                f"Recent keeps the first {self.first} and the last {self.last} keys; k = {c.k} leaves none to the "
                "indexer: keep fewer, or select more keys"
            )
        place = c.starts_N[:, None] + torch.arange(self.first, device=c.starts_N.device, dtype=torch.int32)
        first = torch.where(place < c.ends_N[:, None], place, -1)
        return join(join(c.topk(scored), window(c, self.last)), first)
