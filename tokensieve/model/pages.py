"""A batch of sequences that each get one token, on caches in pages: what attention needs of it.

Legend: B sequences, P pages that a row of the page table names, D index width, E entry width.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokensieve import ops
from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS


@dataclass(frozen=True)
class PagedStep:
    """`latent` and `index`: per layer the pages, as `tokensieve.ops.paged` describes them; index pages of a dense model have no width.

    lens counts the new token too. slots: where its entries go, page * 64 + place; negative for a row that is padding, of which lens is 0.
    groups: rows whose sequences have up to so many pages, for dense attention: a sum has the same bits only over as many places.
    None: all rows at once, where bits depend on the batch anyway.
    """

    latent: tuple[Tensor, ...]
    index: tuple[Tensor, ...]
    page_table: Tensor  # (B, P) int32
    lens: Tensor  # (B) int32
    slots: Tensor  # (B) int32 or int64
    groups: tuple[tuple[Tensor, int], ...] | None
    real: int | None = None  # so many rows are tokens, the others padding; None where nobody can say

    @property
    def quantized_index(self) -> bool:
        return self.index[0].dtype == torch.uint8

    def write(self, layer: int, entries_BE: Tensor, k_BD: Tensor | None) -> None:
        some = slice(self.real)
        keys = None if k_BD is None else k_BD[some]
        write_pages(self.latent[layer], self.index[layer], entries_BE[some], keys, self.slots[some])

    @cached_property
    def everything(self) -> Tensor:
        """(B, T) int32: every position that a sequence has, then -1."""
        place = torch.arange(self.page_table.shape[1] * PAGE_TOKENS, dtype=torch.int32, device=self.lens.device)
        return torch.where(place < self.lens[:, None], place, -1)

    def attend(
        self, layer: int, q_BHE: Tensor, indices_BK: Tensor | None, scale: float, d_v: int, backend: str
    ) -> Tensor:
        """(B, H, d_v): attention to what is selected; to everything where nothing is, those of a group by themselves."""

        def of(q: Tensor, indices: Tensor, table: Tensor, lens: Tensor) -> Tensor:
            latent = self.latent[layer]
            return ops.sparse_attention_paged(q, latent, indices, table, lens, scale, d_v=d_v, backend=backend)[0]

        if indices_BK is None and self.groups is None:
            indices_BK = self.everything
        if indices_BK is not None and self.real is None:
            return of(q_BHE, indices_BK, self.page_table, self.lens)
        if indices_BK is not None:
            some = slice(self.real)
            out = of(q_BHE[some], indices_BK[some], self.page_table[some], self.lens[some])
            return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, len(q_BHE) - len(out)))
        assert self.groups is not None
        out = q_BHE.new_empty(*q_BHE.shape[:2], d_v)
        for rows, pages in self.groups:
            everything = self.everything[rows, : pages * PAGE_TOKENS]
            out[rows] = of(q_BHE[rows], everything, self.page_table[rows, :pages], self.lens[rows])
        return out


def write_pages(latent: Tensor, index: Tensor, entries_NE: Tensor, k_ND: Tensor | None, slots_N: Tensor) -> None:
    """Stores the new tokens of one layer. On quantized pages the keys are given as they are before their rotation."""
    # plain pages hold the two parts of an entry beside each other
    split = quant.LATENT_WIDTH if latent.dtype == torch.uint8 else latent.shape[2] // 2
    keys = entries_NE[:, :0] if k_ND is None else k_ND
    ops.write_caches(entries_NE[:, :split], entries_NE[:, split:], keys, latent, index, slots_N)
