"""Registers every op with PyTorch: forward, fake implementation (shapes for torch.compile), backward.

The bodies only pick a backend and call it; the mathematics is in `reference/` and its faster siblings, the public signatures and their
meaning in `__init__.py`. Each backward is an op of its own, so that torch.compile sees through it as well.
"""

import functools

import torch
from torch import Tensor
from torch.library import custom_op

from tokensieve.ops.dispatch import pick
from tokensieve.ops.reference.blocks import compute_dtype


def full_precision(body):
    """Inside an op the reference computes in float32, whatever autocast the model runs under."""

    @functools.wraps(body)
    def run(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return body(*args, **kwargs)

    return run


def _empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


# index_scores


@custom_op("tokensieve::index_scores", mutates_args=())
@full_precision
def index_scores(
    q: Tensor, k: Tensor, w: Tensor, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> Tensor:
    return pick("index_scores", q, backend).index_scores(q, k, w, starts, ends, k_scale)


@index_scores.register_fake
def _(q, k, w, starts, ends, k_scale, backend):
    return _empty(q, q.shape[0], k.shape[0], dtype=compute_dtype(q))


@custom_op("tokensieve::index_scores_backward", mutates_args=())
@full_precision
def index_scores_backward(
    dscores: Tensor, q: Tensor, k: Tensor, w: Tensor, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return pick("index_scores", q, backend).index_scores_backward(dscores, q, k, w, starts, ends, k_scale)


@index_scores_backward.register_fake
def _(dscores, q, k, w, starts, ends, k_scale, backend):
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(w, *w.shape)


def _index_scores_setup(ctx, inputs, output):
    q, k, w, starts, ends, k_scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, w, starts, ends, k_scale)


def _index_scores_backward(ctx, dscores):
    return *index_scores_backward(dscores, *ctx.saved_tensors, ctx.backend), None, None, None, None


index_scores.register_autograd(_index_scores_backward, setup_context=_index_scores_setup)


# selection (no gradient)


@custom_op("tokensieve::select_topk", mutates_args=())
@full_precision
def select_topk(scores: Tensor, k: int, starts: Tensor, ends: Tensor, backend: str) -> Tensor:
    return pick("select_topk", scores, backend).select_topk(scores, k, starts, ends)


@select_topk.register_fake
def _(scores, k, starts, ends, backend):
    return _empty(scores, scores.shape[0], k, dtype=torch.int32)


@custom_op("tokensieve::index_topk", mutates_args=())
@full_precision
def index_topk(
    q: Tensor, k_I: Tensor, w: Tensor, k: int, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> Tensor:
    return pick("index_topk", q, backend).index_topk(q, k_I, w, k, starts, ends, k_scale)


@index_topk.register_fake
def _(q, k_I, w, k, starts, ends, k_scale, backend):
    return _empty(q, q.shape[0], k, dtype=torch.int32)


# dense attention


@custom_op("tokensieve::dense_attention", mutates_args=())
@full_precision
def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    ends: Tensor,
    bounds: Tensor | None,
    longest: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = pick("dense_attention", q, backend, causal_documents=bounds is not None)
    return module.dense_attention(q, k, v, starts, ends, bounds, longest, scale)


@dense_attention.register_fake
def _(q, k, v, starts, ends, bounds, longest, scale, backend):
    S, H = q.shape[:2]
    return _empty(q, S, H, v.shape[2]), _empty(q, S, H, dtype=compute_dtype(q))


@custom_op("tokensieve::dense_attention_backward", mutates_args=())
@full_precision
def dense_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    ends: Tensor,
    bounds: Tensor | None,
    longest: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = pick("dense_attention", q, backend, causal_documents=bounds is not None)
    return module.dense_attention_backward(dout, dlse, q, k, v, out, lse, starts, ends, bounds, longest, scale)


@dense_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, starts, ends, bounds, longest, scale, backend):
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(v, *v.shape)


def _dense_setup(ctx, inputs, output):
    q, k, v, starts, ends, bounds, ctx.longest, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, starts, ends, bounds)


def _dense_backward(ctx, dout, dlse):
    q, k, v, out, lse, starts, ends, bounds = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = dense_attention_backward(
        dout, dlse, q, k, v, out, lse, starts, ends, bounds, ctx.longest, ctx.scale, ctx.backend
    )
    return dq, dk, dv, None, None, None, None, None, None


dense_attention.register_autograd(_dense_backward, setup_context=_dense_setup)


# masked attention


@custom_op("tokensieve::masked_attention", mutates_args=())
@full_precision
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return pick("masked_attention", q, backend).masked_attention(q, k, v, indices, scale)


@masked_attention.register_fake
def _(q, k, v, indices, scale, backend):
    S, H = q.shape[:2]
    return _empty(q, S, H, v.shape[2]), _empty(q, S, H, dtype=compute_dtype(q))


@custom_op("tokensieve::masked_attention_backward", mutates_args=())
@full_precision
def masked_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return pick("masked_attention", q, backend).masked_attention_backward(dout, dlse, q, k, v, out, lse, indices, scale)


@masked_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, indices, scale, backend):
    return _empty(q, *q.shape), _empty(k, *k.shape), _empty(v, *v.shape)


def _masked_setup(ctx, inputs, output):
    q, k, v, indices, ctx.scale, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, indices)


def _masked_backward(ctx, dout, dlse):
    q, k, v, out, lse, indices = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *masked_attention_backward(dout, dlse, q, k, v, out, lse, indices, ctx.scale, ctx.backend), None, None, None


masked_attention.register_autograd(_masked_backward, setup_context=_masked_setup)


# sparse attention, and with the KL of equation (4)


@custom_op("tokensieve::sparse_attention", mutates_args=())
@full_precision
def sparse_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, d_k: int, v_start: int, d_v: int, backend: str
) -> tuple[Tensor, Tensor]:
    return pick("sparse_attention", q, backend).sparse_attention(q, kv, indices, scale, d_k, v_start, d_v)


@sparse_attention.register_fake
def _(q, kv, indices, scale, d_k, v_start, d_v, backend):
    S, H = q.shape[:2]
    return _empty(q, S, H, d_v), _empty(q, S, H, dtype=compute_dtype(q))


@custom_op("tokensieve::sparse_attention_backward", mutates_args=())
@full_precision
def sparse_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = pick("sparse_attention", q, backend)
    return module.sparse_attention_backward(dout, dlse, q, kv, indices, out, lse, scale, d_k, v_start, d_v)


@sparse_attention_backward.register_fake
def _(dout, dlse, q, kv, indices, out, lse, scale, d_k, v_start, d_v, backend):
    return _empty(q, *q.shape), _empty(kv, *kv.shape)


def _sparse_setup(ctx, inputs, output):
    q, kv, indices, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, indices, *output)


def _sparse_backward(ctx, dout, dlse):
    q, kv, indices, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return (
        *sparse_attention_backward(dout, dlse, q, kv, indices, out, lse, *ctx.numbers),
        None,
        None,
        None,
        None,
        None,
        None,
    )


sparse_attention.register_autograd(_sparse_backward, setup_context=_sparse_setup)


@custom_op("tokensieve::sparse_attention_kl", mutates_args=())
@full_precision
def sparse_attention_kl(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return pick("sparse_attention_kl", q, backend).sparse_attention_kl(
        q, kv, indices, scale, d_k, v_start, d_v, q_I, k_I, w
    )


@sparse_attention_kl.register_fake
def _(q, kv, indices, scale, d_k, v_start, d_v, q_I, k_I, w, backend):
    S, H = q.shape[:2]
    dtype = compute_dtype(q)
    return _empty(q, S, H, d_v), _empty(q, S, H, dtype=dtype), _empty(q, S, dtype=dtype)


@custom_op("tokensieve::sparse_attention_kl_backward", mutates_args=())
@full_precision
def sparse_attention_kl_backward(
    dout: Tensor,
    dlse: Tensor | None,
    dkl: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = pick("sparse_attention_kl", q, backend)
    return module.sparse_attention_kl_backward(
        dout, dlse, dkl, q, kv, indices, out, lse, scale, d_k, v_start, d_v, q_I, k_I, w
    )


@sparse_attention_kl_backward.register_fake
def _(dout, dlse, dkl, q, kv, indices, out, lse, scale, d_k, v_start, d_v, q_I, k_I, w, backend):
    return (
        _empty(q, *q.shape),
        _empty(kv, *kv.shape),
        _empty(q_I, *q_I.shape),
        _empty(k_I, *k_I.shape),
        _empty(w, *w.shape),
    )


def _sparse_kl_setup(ctx, inputs, output):
    q, kv, indices, scale, d_k, v_start, d_v, q_I, k_I, w, ctx.backend = inputs
    ctx.numbers = (scale, d_k, v_start, d_v)
    ctx.set_materialize_grads(False)
    out, lse, _ = output
    ctx.save_for_backward(q, kv, indices, out, lse, q_I, k_I, w)


def _sparse_kl_backward(ctx, dout, dlse, dkl):
    q, kv, indices, out, lse, q_I, k_I, w = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dkl = lse.new_zeros(lse.shape[0]) if dkl is None else dkl
    dq, dkv, dq_I, dk_I, dw = sparse_attention_kl_backward(
        dout, dlse, dkl, q, kv, indices, out, lse, *ctx.numbers, q_I, k_I, w, ctx.backend
    )
    return dq, dkv, None, None, None, None, None, dq_I, dk_I, dw, None


sparse_attention_kl.register_autograd(_sparse_kl_backward, setup_context=_sparse_kl_setup)


# equation (3)


@custom_op("tokensieve::indexer_kl_dense", mutates_args=())
@full_precision
def indexer_kl_dense(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts: Tensor,
    ends: Tensor,
    backend: str,
) -> Tensor:
    return pick("indexer_kl_dense", q, backend).indexer_kl_dense(q, k, lse, scale, q_I, k_I, w, starts, ends)


@indexer_kl_dense.register_fake
def _(q, k, lse, scale, q_I, k_I, w, starts, ends, backend):
    return _empty(q, q.shape[0], dtype=compute_dtype(q_I))


@custom_op("tokensieve::indexer_kl_dense_backward", mutates_args=())
@full_precision
def indexer_kl_dense_backward(
    dkl: Tensor,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts: Tensor,
    ends: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return pick("indexer_kl_dense", q, backend).indexer_kl_dense_backward(
        dkl, q, k, lse, scale, q_I, k_I, w, starts, ends
    )


@indexer_kl_dense_backward.register_fake
def _(dkl, q, k, lse, scale, q_I, k_I, w, starts, ends, backend):
    return _empty(q_I, *q_I.shape), _empty(k_I, *k_I.shape), _empty(w, *w.shape)


def _kl_dense_setup(ctx, inputs, output):
    q, k, lse, ctx.scale, q_I, k_I, w, starts, ends, ctx.backend = inputs
    ctx.save_for_backward(q, k, lse, q_I, k_I, w, starts, ends)


def _kl_dense_backward(ctx, dkl):
    q, k, lse, q_I, k_I, w, starts, ends = ctx.saved_tensors
    dq_I, dk_I, dw = indexer_kl_dense_backward(dkl, q, k, lse, ctx.scale, q_I, k_I, w, starts, ends, ctx.backend)
    return None, None, None, None, dq_I, dk_I, dw, None, None, None


indexer_kl_dense.register_autograd(_kl_dense_backward, setup_context=_kl_dense_setup)


@custom_op("tokensieve::indexer_kl_dense_sum", mutates_args=())
@full_precision
def indexer_kl_dense_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts: Tensor,
    ends: Tensor,
    weight: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = pick("indexer_kl_dense", q, backend)
    kl, *gradients = module.indexer_kl_dense_step(q, k, lse, scale, q_I, k_I, w, starts, ends, weight)
    return (kl * weight.to(kl.dtype)).sum(), *gradients


@indexer_kl_dense_sum.register_fake
def _(q, k, lse, scale, q_I, k_I, w, starts, ends, weight, backend):
    return _empty(q, dtype=compute_dtype(q_I)), q_I.new_empty(q_I.shape), k_I.new_empty(k_I.shape), w.new_empty(w.shape)


def _kl_sum_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _kl_sum_backward(ctx, dsum, *unused):
    # The forward has the gradients already; the other outputs are those gradients, which nobody differentiates.
    gradients = [None if dsum is None else g * dsum.to(g.dtype) for g in ctx.saved_tensors]
    return None, None, None, None, *gradients, None, None, None, None


indexer_kl_dense_sum.register_autograd(_kl_sum_backward, setup_context=_kl_sum_setup)
