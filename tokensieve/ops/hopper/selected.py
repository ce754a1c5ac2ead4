"""Attention over selected entries: of grouped queries on the portable modules of unions, with kernels of ours for wide
blocks (`unions`); of MLA in blocks of queries if a query has few heads (`folded`), and else one query a program.
"""

from typing import Any

from torch import Tensor

from tokensieve.ops.hopper import attention, attention_kl, folded, unions
from tokensieve.ops.hopper.limits import aligned
from tokensieve.ops.triton import union_attention, union_kl

Operands = tuple[Any, ...]


def _grouped(q: Tensor, kv: Tensor, *_: Any) -> bool:
    return q.shape[-1] != kv.shape[-1]


def _aligned(operands: Operands, at: int) -> Operands:
    """The operands, with entries (the one at `at`) that kernels of ours read in lines."""
    return (*operands[:at], aligned(operands[at]), *operands[at + 1 :])


def sparse_attention(*operands: Any) -> tuple[Tensor, Tensor]:
    if _grouped(*operands):
        return union_attention.sparse_attention(*_aligned(operands, 1), kernels=unions.KERNELS)
    return (folded if folded.pays(*operands[:3]) else attention).sparse_attention(*operands)


def sparse_attention_backward(*operands: Any) -> tuple[Tensor, Tensor]:
    if _grouped(*operands[4:]):
        return union_attention.sparse_attention_backward(*_aligned(operands, 5), kernels=unions.KERNELS)
    return (folded if folded.pays(*operands[4:7]) else attention).sparse_attention_backward(*operands)


def sparse_attention_kl(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _grouped(*operands):
        return union_kl.sparse_attention_kl(*_aligned(operands, 1), kernels=unions.KERNELS)
    return (folded if folded.pays(*operands[:3]) else attention_kl).sparse_attention_kl(*operands)


def sparse_attention_kl_backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _grouped(*operands[5:]):
        return union_kl.sparse_attention_kl_backward(*_aligned(operands, 6), kernels=unions.KERNELS)
    return (folded if folded.pays(*operands[5:8]) else attention_kl).sparse_attention_kl_backward(*operands)
