"""What the index scores say of attention's probabilities: the share of each key that a query may select.

Legend: N queries, T keys, K selected keys.
"""

import torch
from torch import Tensor

from tokensieve.model.selection import SelectionContext

_LAST = torch.iinfo(torch.int32).max


def best_shares(c: SelectionContext, k: int) -> tuple[Tensor, Tensor]:
    """The k keys with the largest index scores (N, K), as `select` returns them, and the share of each (N, K) float32.

    The share of key s is softmax(I[t, .])[s] over all keys that query t may see; the indexer is trained so that it
    equals the mean probability of attention's heads, by equation (3). 0 where the index is -1. Holds (N, T) scores:
    long prompts go through `c.blocks()`.
    """
    scores = c.scores()
    place = torch.arange(scores.shape[1], device=scores.device)
    unseen = (place < c.starts_N[:, None]) | (place >= c.ends_N[:, None])
    indices = c.select(scores, k)
    total = scores.masked_fill(unseen, -torch.inf).logsumexp(1, keepdim=True)
    chosen = scores.gather(1, indices.clamp_min(0).long())
    return indices, torch.where(indices < 0, 0.0, (chosen - total).exp())


def keep(indices_NK: Tensor, kept_NK: Tensor) -> Tensor:
    """The indices where `kept` holds: (N, K) int32, ascending, then -1."""
    indices = indices_NK.masked_fill(~kept_NK | (indices_NK < 0), _LAST).sort(dim=1).values
    return indices.masked_fill(indices == _LAST, -1)


def stacked(blocks: list[Tensor]) -> Tensor:
    """The index sets of all blocks of queries, filled up with -1 to the widest."""
    width = max(block.shape[1] for block in blocks)
    return torch.cat([torch.nn.functional.pad(block, (0, width - block.shape[1]), value=-1) for block in blocks])


def stacked_pair(a_NK: Tensor, b_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Two index sets of the same queries, filled up with -1 to the wider one's width."""
    both = stacked([a_NK, b_NK])
    return both[: len(a_NK)], both[len(a_NK) :]
