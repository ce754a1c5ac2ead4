"""Decoding from caches in pages, and writing them: equations (1) and (2) on keys that a page table finds.

Legend: S query tokens, B sequences, n queries of a sequence (S = B * n), P pages that a row of the page table names,
T = 64 * P tokens, H heads, G key-value groups, K selected, D index width, E entry width, V value width, N tokens to
write; b queries in a block.

The mathematics is that of `index.py` and `sparse.py`, on what was gathered: prefill and decode agree because they run
the same code. Pages are a pool that sequences share. Bytes that no sequence has written are garbage, possibly NaN,
which must not even be multiplied by zero.
"""

import torch
from torch import Tensor

from tokensieve.ops import quant
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.ops.reference.blocks import compute_dtype, row_blocks
from tokensieve.ops.reference.index import KEY_PAD, index_scores
from tokensieve.ops.reference.sparse import attend, by_group


def seen_tokens(lengths_B: Tensor, S: int) -> Tensor:
    """How many tokens each query sees (S): of n queries of a sequence, query j sees all but the last n - 1 - j."""
    n = S // max(lengths_B.shape[0], 1)
    if n == 1:
        return lengths_B
    behind = torch.arange(1 - n, 1, dtype=lengths_B.dtype, device=lengths_B.device)
    return (lengths_B[:, None] + behind).clamp_min_(0).flatten()


def index_keys(index_pages: Tensor, pages_p: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys (64p, D) of the named pages as they are stored, and their scales (64p) if they are quantized.

    Three pages follow them, whatever those hold: products of keys need room at their end.
    """
    room = KEY_PAD // PAGE_TOKENS
    pages = index_pages.index_select(0, torch.nn.functional.pad(pages_p, (0, room)))
    if pages.dtype != torch.uint8:
        return pages.flatten(0, 1), None
    keys, scales = quant.unpack_index_page(pages)
    return keys.flatten(0, 1), scales.flatten()


def index_scores_paged(q_SHD: Tensor, index_pages: Tensor, w_SH: Tensor, page_table: Tensor, lengths: Tensor) -> Tensor:
    S, (B, P) = q_SHD.shape[0], page_table.shape
    n = S // max(B, 1)
    scores_ST = torch.full((S, P * PAGE_TOKENS), float("-inf"), dtype=compute_dtype(q_SHD), device=q_SHD.device)
    ends_S = seen_tokens(lengths, S)
    starts_S = torch.zeros_like(ends_S)
    for sequence, length in enumerate(lengths.tolist()):
        if not length:
            continue
        keys, scales = index_keys(index_pages, page_table[sequence, : -(-length // PAGE_TOKENS)])
        rows = slice(sequence * n, (sequence + 1) * n)
        scores = index_scores(q_SHD[rows], keys, w_SH[rows], starts_S[rows], ends_S[rows], scales)
        scores_ST[rows, :length] = scores[:, :length]
    return scores_ST


def token_rows(pages: Tensor, page_bK: Tensor, offset_bK: Tensor) -> Tensor:
    """Rows (b, K, ...) of single tokens of pages (pages, 64, ...)."""
    if not pages.is_contiguous():  # say, one layer of a pool of all layers: flattening would copy it
        return pages[page_bK, offset_bK]
    # Copies whole rows, which is several times faster than indexing by two tensors.
    rows = pages.flatten(0, 1).index_select(0, (page_bK * PAGE_TOKENS + offset_bK).flatten())
    return rows.unflatten(0, page_bK.shape)


def sparse_attention_paged(
    q_SHD: Tensor,
    entry_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    (B, P), K = page_table.shape, indices_SK.shape[1]
    quantized, G = entry_pages.dtype == torch.uint8, entry_pages.shape[2] if entry_pages.dim() == 4 else 1
    numbers = d_k if quantized else G * entry_pages.shape[-1]  # of a token
    n = S // max(B, 1)
    dtype = compute_dtype(q_SHD)
    out_SHV = q_SHD.new_zeros(S, H, d_v)
    lse_SH = torch.full((S, H), float("-inf"), dtype=dtype, device=q_SHD.device)
    if 0 in (K, P, entry_pages.shape[0]):
        return out_SHV, lse_SH
    seen_S = seen_tokens(lengths, S)
    for a, b in row_blocks(S, K * max(numbers, H), q_SHD):
        indices = indices_SK[a:b].long()
        unused = (indices < 0) | (indices >= seen_S[a:b, None])
        position = indices.masked_fill(unused, 0)
        sequence = torch.arange(a, b, device=q_SHD.device)[:, None] // n
        # The table has nothing valid for a sequence without tokens: unused places read page 0 instead, as zeros.
        page = page_table[sequence, position // PAGE_TOKENS].long().masked_fill_(unused, 0)
        rows = token_rows(entry_pages, page, position % PAGE_TOKENS).flatten(2).masked_fill_(unused[..., None], 0)
        if quantized:
            rows = torch.cat(quant.unpack_latent_tokens(rows, torch.float32), -1)
        entries = rows.to(dtype) if G == 1 else by_group(rows.to(dtype), G)
        out_SHV[a:b], lse_SH[a:b], _ = attend(q_SHD[a:b].to(dtype) * scale, entries, unused, v_start, d_v)
    return out_SHV, lse_SH


def quantize_queries(q_SHD: Tensor, w_SH: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    x = q_SHD
    if cos is not None and sin is not None:
        R = cos.shape[-1]
        turned = x[..., :R].float()
        turned = torch.addcmul(turned * cos, turned.roll(R // 2, -1), sin).to(x.dtype)
        x = torch.cat((turned, x[..., R:]), -1)
    values, scales = quant.quantize_e4m3(quant.hadamard(x), scale_format="ue8m0")
    return values, w_SH.float() * scales.squeeze(-1)


def write_caches(
    first: Tensor, second: Tensor, k_I: Tensor, entry_pages: Tensor, index_pages: Tensor, slots: Tensor
) -> None:
    wanted = slots >= 0
    if not bool(wanted.all()):
        first, second, k_I, slots = first[wanted], second[wanted], k_I[wanted], slots[wanted]
    page, offset = slots.long() // PAGE_TOKENS, slots.long() % PAGE_TOKENS
    quantized_index = index_pages.dtype == torch.uint8
    # Quantizing refuses NaN: it comes before the first write, so that a refused call leaves both caches as they were.
    if quantized_index:
        values, scales = quant.quantize_e4m3(quant.hadamard(k_I), quant.INDEX_WIDTH, "ue8m0")
    if entry_pages.dtype == torch.uint8:
        entry_pages[page, offset] = quant.pack_latent_tokens(first, second)
    else:
        entry_pages[page, offset] = torch.cat([x.to(entry_pages.dtype) for x in (first, second)], -1)
    if quantized_index:
        value_bytes, scale_bytes = quant.index_page_tokens(index_pages)
        value_bytes[page, offset], scale_bytes[page, offset] = values.view(torch.uint8), scales.view(torch.uint8)
    else:
        index_pages[page, offset] = k_I.to(index_pages.dtype)
