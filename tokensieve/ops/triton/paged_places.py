"""Where selected entries lie in a pool of pages, in Triton: for kernels that know the pool but not the page table.

Legend: S queries (n of each sequence), P pages that a row of the page table names, K places for selected positions.
It is one launch: ten of PyTorch's operations would take longer than a small decode step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.paged_attention import entry_pages
from tokensieve.ops.triton.paged_index import PAGE

BLOCK = 512  # places of a program


@triton.jit
def _places_kernel(indices, page_table, lengths, out, K, width, n, P, pages, BLOCK: tl.constexpr):
    t, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b = t // n
    seen = tl.minimum(tl.load(lengths + b), P * PAGE) - n + 1 + (t - b * n)
    page, inside = entry_pages(indices + t * K, at, K, page_table + b * P, seen, pages)
    tl.store(out + t * width + at, tl.where(page >= 0, page * PAGE + inside, -1), mask=at < width)


def pool_places(indices_SK: Tensor, page_table: Tensor, lengths: Tensor, pages: int, multiple: int) -> Tensor:
    """page * 64 + place in the page of each index, in a pool of `pages` pages: (S, K rounded up to `multiple`) int32.

    -1 if there is no entry that may be read: past K, at an index that is below 0 or past what its query sees, on a page
    outside of the pool.
    """
    (S, K), (B, P) = indices_SK.shape, page_table.shape
    width = triton.cdiv(K, multiple) * multiple
    out = torch.empty(S, width, dtype=torch.int32, device=indices_SK.device)
    if out.numel():
        _places_kernel[(S, triton.cdiv(width, BLOCK))](
            indices_SK.contiguous(), page_table.contiguous(), lengths.contiguous(), out,
            K, width, S // B, P, pages, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
