"""The Triton backend: the function of each op."""

from tokensieve.ops.triton.index import index_scores, index_scores_backward
from tokensieve.ops.triton.linear import block_linear
from tokensieve.ops.triton.loss import indexer_kl_dense, indexer_kl_dense_backward, indexer_kl_dense_step
from tokensieve.ops.triton.masked import masked_attention, masked_attention_backward
from tokensieve.ops.triton.paged_attention import sparse_attention_paged
from tokensieve.ops.triton.paged_index import index_scores_paged
from tokensieve.ops.triton.paged_write import write_caches
from tokensieve.ops.triton.queries import quantize_queries
from tokensieve.ops.triton.selected import (
    sparse_attention,
    sparse_attention_backward,
    sparse_attention_kl,
    sparse_attention_kl_backward,
)
from tokensieve.ops.triton.topk import index_topk, select_topk
from tokensieve.ops.triton.two_level import index_topk_blocks

__all__ = [
    "block_linear",
    "index_scores",
    "index_scores_backward",
    "index_scores_paged",
    "index_topk",
    "index_topk_blocks",
    "indexer_kl_dense",
    "indexer_kl_dense_backward",
    "indexer_kl_dense_step",
    "masked_attention",
    "masked_attention_backward",
    "quantize_queries",
    "select_topk",
    "sparse_attention",
    "sparse_attention_backward",
    "sparse_attention_kl",
    "sparse_attention_kl_backward",
    "sparse_attention_paged",
    "write_caches",
]
