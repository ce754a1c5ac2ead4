"""The Hopper backend: the function of each op."""

from tokensieve.ops.hopper.decode import sparse_attention_paged
from tokensieve.ops.hopper.index import index_scores, index_topk
from tokensieve.ops.hopper.selected import (
    sparse_attention,
    sparse_attention_backward,
    sparse_attention_kl,
    sparse_attention_kl_backward,
)
from tokensieve.ops.triton.index import index_scores_backward

__all__ = [
    "index_scores",
    "index_scores_backward",
    "index_topk",
    "sparse_attention",
    "sparse_attention_backward",
    "sparse_attention_kl",
    "sparse_attention_kl_backward",
    "sparse_attention_paged",
]
