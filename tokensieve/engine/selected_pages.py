"""The keys that each token's attention read, kept on pages beside its entries, so that training can read them again.

Legend: N tokens of a pass, K keys of a query.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.context import LayerResult
from tokensieve.ops.quant import PAGE_TOKENS


class SelectedPages:
    """One page of indices, (64, K) int32, for every page of the cache and every layer; -1 where a query has fewer keys.

    A page that requests share has the indices of its tokens once, as it has their entries once. Memory: 4 K bytes for
    each token and layer.
    """

    def __init__(self, layers: int, pages: int, k: int, device: torch.device):
        rows = pages * PAGE_TOKENS + 1  # the last one is for padding, whose slot is -1
        self._pools = tuple(torch.full((rows, k), -1, dtype=torch.int32, device=device) for _ in range(layers))

    def write(self, results: Sequence[LayerResult], slots_N: Tensor, firsts_N: Tensor | None = None) -> None:
        """Keeps what every layer selected for the tokens whose entries lie in these slots; negative slots are padding.

        firsts: first key of each token's sequence in the pass, which is its position 0; None if all are 0. UserError
        for a layer that attends to every key, or selects more than K: neither can be kept here.
        """
        for layer, (pool, result) in enumerate(zip(self._pools, results, strict=True)):
            indices = result.indices
            if indices is None or indices.shape[1] > pool.shape[1]:
                found = "attends to every key" if indices is None else f"selects {indices.shape[1]} keys"
                raise UserError(
                    f"layer {layer} {found}, and keep_selection keeps {pool.shape[1]} of a query; use the indexer"
                )
            if firsts_N is not None:
                indices = torch.where(indices < 0, -1, indices - firsts_N[:, None])
            pool[slots_N.long()] = F.pad(indices, (0, pool.shape[1] - indices.shape[1]), value=-1).to(pool.dtype)

    def copy(self, page: int, others: Sequence[int]) -> None:
        """Copies a page to others, in every layer."""
        for pool in self._pools:
            pages = pool[:-1].view(-1, PAGE_TOKENS, pool.shape[1])
            pages[list(others)] = pages[page].clone()

    def read(self, pages: Sequence[int], tokens: int, past: int = 0) -> Tensor:
        """The indices (layers, tokens - past, K) of a sequence on these pages, from its token `past` on, on the CPU.

        From a GPU they come to pinned memory, from where they go back fast.
        """
        device = self._pools[0].device
        table = torch.tensor(pages[: -(-tokens // PAGE_TOKENS)], device=device)
        slots = (table[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=device)).flatten()[past:tokens]
        found = torch.stack([pool[slots] for pool in self._pools])
        if found.is_cpu:
            return found
        return torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found)
