"""Attention over selected entries: one query a program (`attention`, `attention_kl`), or tiles of queries if a
query has few heads (`tiles`).
"""

from typing import Any

from torch import Tensor

from tokensieve.ops.hopper import attention, attention_kl, tiles


def sparse_attention(*operands: Any) -> tuple[Tensor, Tensor]:
    return (tiles if tiles.pays(*operands[:3]) else attention).sparse_attention(*operands)


def sparse_attention_backward(*operands: Any) -> tuple[Tensor, Tensor]:
    return (tiles if tiles.pays(*operands[4:7]) else attention).sparse_attention_backward(*operands)


def sparse_attention_kl(*operands: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (tiles if tiles.pays(*operands[:3]) else attention_kl).sparse_attention_kl(*operands)


def sparse_attention_kl_backward(*operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (tiles if tiles.pays(*operands[5:8]) else attention_kl).sparse_attention_kl_backward(*operands)
