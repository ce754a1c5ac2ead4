"""Limits of the Hopper backend: the 671B model's shapes, and grouped queries. The portable one takes the rest. Imports
no Triton.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokensieve.ops.quant import LATENT_TOKEN_BYTES
from tokensieve.ops.triton import limits as portable
from tokensieve.ops.triton.limits import is_hopper

OPS = ("index_scores", "index_topk", "sparse_attention", "sparse_attention_kl", "sparse_attention_paged")


def limits(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take this call, in one clause, or None if they can."""
    if not is_hopper(q.device):
        return "it is for Hopper GPUs"
    if op in ("index_scores", "index_topk"):
        if q.dtype != torch.float8_e4m3fn or q.shape[2] != 128 or q.shape[1] not in (16, 32, 64, 128):
            return "its index scores are of E4M3 queries with 16, 32, 64 or 128 heads of 128"
    elif op == "sparse_attention_paged":
        pages = operands["entry_pages"]
        if q.dtype != torch.bfloat16 or q.shape[-1] != 576 or pages.dtype != torch.uint8:
            return "it decodes from quantized pages: one group, MLA's widths, and bfloat16 queries of 576"
        if not in_lines(pages, LATENT_TOKEN_BYTES):
            return "it reads pages whose bytes lie together, at multiples of 16"
    elif not (is_latent(q, operands) or is_grouped(q, operands)):
        return (
            "its entries are 576 wide, one a token, and their value is the first 512; or 3 to 32 heads share keys and "
            "values that are 64 or 128 wide, one behind the other at multiples of 8 numbers"
        )
    return portable.limits(op, q, operands)


def is_latent(q: Tensor, operands: Mapping[str, Any]) -> bool:
    """Whether entries are MLA's."""
    parts = (q.shape[-1], operands["v_start"], operands["d_v"])
    return operands["kv"].shape[1:] == (1, 576) and parts == (576, 0, 512)


def is_grouped(q: Tensor, operands: Mapping[str, Any]) -> bool:
    """Whether the kernels of wide blocks take the entries, by their widths and lines, and fill 128 rows."""
    (_, H, D), (_, G, E), v_start = q.shape, operands["kv"].shape, operands["v_start"]
    widths = D in (64, 128) and operands["d_v"] in (64, 128)
    return widths and v_start >= D and E % 8 == v_start % 8 == 0 and 3 <= H // G <= 32


def slower(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why `auto` prefers the portable kernel for a call that both can run, in one clause, or None."""
    if op != "sparse_attention_paged":
        return None
    from tokensieve.ops.hopper.decode import beats_pieces

    S, H, _ = q.shape
    return None if beats_pieces(S, H, operands["indices"].shape[1]) else "it does not share out so few queries"


def whole(x: Tensor) -> Tensor:
    """Whether all numbers along the last axis are finite (bool), without a copy of `x`."""
    return torch.linalg.vector_norm(x, torch.inf, -1).isfinite()


def aligned(x: Tensor) -> Tensor:
    """`x`, any shape and dtype, contiguous and at an address that is a multiple of 16 bytes; a copy if it was not."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def in_lines(pages: Tensor, token_bytes: int) -> bool:
    """Whether pages of bytes can be read in place, 16 bytes at a time.

    Tokens lie one after the other then, and pages anywhere at multiples of 16 bytes.
    """
    return pages.stride()[1:] == (token_bytes, 1) and pages.stride(0) % 16 == 0 and pages.data_ptr() % 16 == 0
