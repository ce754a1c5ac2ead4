"""Attention over selected entries: one query a program (`attention`, `attention_kl`), or blocks of queries if a group
has few heads (`union_attention`, `union_kl`).
"""

from typing import Any

from torch import Tensor

from tokensieve.ops.triton import attention, attention_kl, union_attention, union_kl


def _in_blocks(q: Tensor, kv: Tensor, indices: Tensor, scale: float, *parts: int) -> bool:
    return q.shape[0] > 0 and union_attention.pays(q, kv, *parts[:3])


def sparse_attention(*operands: Any) -> tuple[Tensor, Tensor]:
    return (union_attention if _in_blocks(*operands) else attention).sparse_attention(*operands)


def sparse_attention_backward(*operands: Any) -> tuple[Tensor, Tensor]:
    return (union_attention if _in_blocks(*operands[4:]) else attention).sparse_attention_backward(*operands)


def sparse_attention_kl(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (union_kl if _in_blocks(*operands) else attention_kl).sparse_attention_kl(*operands)


def sparse_attention_kl_backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (union_kl if _in_blocks(*operands[5:]) else attention_kl).sparse_attention_kl_backward(*operands)
