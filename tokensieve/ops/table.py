"""The ops that are registered, a row each. `registry.Op` says what a row means, `__init__.py` and `paged.py` what an op
computes.

Legend: S query tokens, T key tokens, H heads, K places for selected keys, V value width, P pages that a row of the page
table names.
"""

from typing import Any

import torch
from torch import Tensor

from tokensieve.ops.dispatch import pick
from tokensieve.ops.quant import PAGE_TOKENS
from tokensieve.ops.reference.blocks import compute_dtype
from tokensieve.ops.registry import Op


def _scores(q: Tensor, T: int) -> Tensor:
    """(S, T) of index scores."""
    return q.new_empty((q.shape[0], T), dtype=compute_dtype(q))


def _indices(x: Tensor, K: int) -> Tensor:
    """(S, K) of selected keys."""
    return x.new_empty((x.shape[0], K), dtype=torch.int32)


def _attention(q: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """out (S, H, V) and lse (S, H)."""
    return q.new_empty((*q.shape[:2], V)), q.new_empty(q.shape[:2], dtype=compute_dtype(q))


def _kl(q: Tensor) -> Tensor:
    """(S) of KL."""
    return q.new_empty(q.shape[:1], dtype=compute_dtype(q))


class _SummedKL(Op):
    """The forward pass computes the gradients of q_I, k_I and w as further results. The backward pass scales them."""

    def compute(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        backend = pick("indexer_kl_dense", inputs[0], inputs[-1], dict(zip(self.names, inputs)))
        kl, *gradients = backend.indexer_kl_dense_step(*inputs[:-1])
        weight = inputs[-2]
        return (kl * weight.to(kl.dtype)).sum(), *gradients

    def register_backward(self, arguments: str) -> None:
        """There is nothing left to compute."""

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if getattr(ctx, "spent", False):
            raise RuntimeError(
                f"{self.name}: its gradient can be taken once; call it again, or sum indexer_kl_dense, for another"
            )
        d_sum = gradients[0]  # nobody differentiates the other results
        ctx.spent = d_sum is not None
        returned: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if d_sum is not None:
            for i, gradient in zip(self.gradients, ctx.saved_tensors, strict=True):
                # As large as q_I and needed once, it is scaled in place: at 128K tokens a copy would be 2 GiB.
                returned[i] = gradient.mul_(d_sum.to(gradient.dtype))
        return tuple(returned)


index_scores = Op(
    "index_scores(Tensor q, Tensor k, Tensor w, Tensor starts, Tensor ends, Tensor? k_scale) -> Tensor scores",
    lambda q, k, *_: _scores(q, k.shape[0]),
    gradients="q k w",
)

select_topk = Op(
    "select_topk(Tensor scores, SymInt k, Tensor starts, Tensor ends) -> Tensor indices",
    lambda scores, k, *_: _indices(scores, k),
)

index_topk = Op(
    "index_topk(Tensor q, Tensor k, Tensor w, SymInt K, Tensor starts, Tensor ends, Tensor? k_scale) -> Tensor indices",
    lambda q, k, w, K, *_: _indices(q, K),
)

index_topk_blocks = Op(
    "index_topk_blocks(Tensor q, Tensor k, Tensor w, SymInt K, Tensor starts, Tensor ends, Tensor? k_scale,"
    " SymInt block, SymInt blocks) -> Tensor indices",
    lambda q, k, w, K, *_: _indices(q, K),
)

dense_attention = Op(
    "dense_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, Tensor? bounds, SymInt longest,"
    " float scale) -> (Tensor out, Tensor lse)",
    lambda q, k, v, *_: _attention(q, v.shape[2]),
    gradients="q k v",
    saved="out lse",
    optional="lse",
)

masked_attention = Op(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor indices, float scale) -> (Tensor out, Tensor lse)",
    lambda q, k, v, *_: _attention(q, v.shape[2]),
    gradients="q k v",
    saved="out lse",
    optional="lse",
)

ENTRIES = "Tensor q, Tensor kv, Tensor indices, float scale, SymInt d_k, SymInt v_start, SymInt d_v"

sparse_attention = Op(
    f"sparse_attention({ENTRIES}) -> (Tensor out, Tensor lse)",
    lambda q, kv, indices, scale, d_k, v_start, d_v: _attention(q, d_v),
    gradients="q kv",
    saved="out lse",
    optional="lse",
)

sparse_attention_kl = Op(
    f"sparse_attention_kl({ENTRIES}, Tensor q_I, Tensor k_I, Tensor w) -> (Tensor out, Tensor lse, Tensor kl)",
    lambda q, kv, indices, scale, d_k, v_start, d_v, *_: (*_attention(q, d_v), _kl(q)),
    gradients="q kv q_I k_I w",
    saved="out lse",
    optional="lse",
)

WARMUP = "Tensor q, Tensor k, Tensor lse, float scale, Tensor q_I, Tensor k_I, Tensor w, Tensor starts, Tensor ends"

indexer_kl_dense = Op(
    f"indexer_kl_dense({WARMUP}) -> Tensor kl",
    lambda q, k, lse, scale, q_I, *_: _kl(q_I),
    gradients="q_I k_I w",
)

indexer_kl_dense_sum = _SummedKL(
    f"indexer_kl_dense_sum({WARMUP}, Tensor weight) -> (Tensor sum, Tensor d_q_I, Tensor d_k_I, Tensor d_w)",
    lambda q, k, lse, scale, q_I, k_I, w, *_: (
        q_I.new_empty((), dtype=compute_dtype(q_I)),
        *(x.new_empty(x.shape) for x in (q_I, k_I, w)),
    ),
    gradients="q_I k_I w",
)

block_linear = Op(
    "block_linear(Tensor x, Tensor weight, Tensor scale, Tensor? ends, bool gated) -> Tensor y",
    lambda x, weight, *_: x.new_empty((x.shape[0], weight.shape[1])),
)

quantize_queries = Op(
    "quantize_queries(Tensor q, Tensor w, Tensor? cos, Tensor? sin) -> (Tensor values, Tensor weights)",
    lambda q, w, *_: (q.new_empty(q.shape, dtype=torch.float8_e4m3fn), q.new_empty(w.shape, dtype=torch.float32)),
)

index_scores_paged = Op(
    "index_scores_paged(Tensor q, Tensor index_pages, Tensor w, Tensor page_table, Tensor lengths) -> Tensor scores",
    lambda q, index_pages, w, page_table, *_: _scores(q, page_table.shape[1] * PAGE_TOKENS),
)

sparse_attention_paged = Op(
    "sparse_attention_paged(Tensor q, Tensor entry_pages, Tensor indices, Tensor page_table, Tensor lengths,"
    " float scale, SymInt d_k, SymInt v_start, SymInt d_v) -> (Tensor out, Tensor lse)",
    lambda q, entry_pages, indices, page_table, lengths, scale, d_k, v_start, d_v: _attention(q, d_v),
)

write_caches = Op(
    "write_caches(Tensor first, Tensor second, Tensor k_I, Tensor(a!) entry_pages, Tensor(b!) index_pages,"
    " Tensor slots) -> ()",
    lambda *_: None,
)
