"""The reference backend: plain PyTorch, forward and backward, the definition of every op, on any device and dtype."""

from tokensieve.ops.reference.dense import (
    dense_attention,
    dense_attention_backward,
    head_mass,
    masked_attention,
    masked_attention_backward,
)
from tokensieve.ops.reference.index import index_scores, index_scores_backward, index_topk, select_topk
from tokensieve.ops.reference.kl import indexer_kl_dense, indexer_kl_dense_backward, indexer_kl_dense_step
from tokensieve.ops.reference.linear import block_linear
from tokensieve.ops.reference.paged import (
    index_scores_paged,
    quantize_queries,
    sparse_attention_paged,
    write_caches,
)
from tokensieve.ops.reference.sparse import (
    sparse_attention,
    sparse_attention_backward,
    sparse_attention_kl,
    sparse_attention_kl_backward,
)
from tokensieve.ops.reference.two_level import index_topk_blocks

PAGED_OPS = ("quantize_queries", "index_scores_paged", "sparse_attention_paged", "write_caches")
OPS = (
    "index_scores",
    "select_topk",
    "index_topk",
    "index_topk_blocks",
    "dense_attention",
    "masked_attention",
    "sparse_attention",
    "sparse_attention_kl",
    "indexer_kl_dense",
    "block_linear",
    *PAGED_OPS,
)

__all__ = [
    "OPS",
    "PAGED_OPS",
    "block_linear",
    "dense_attention",
    "dense_attention_backward",
    "head_mass",
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
