"""Registers every op with PyTorch: forward, fake implementation (shapes for torch.compile), backward.

The bodies only pick a backend and call it; the mathematics is in `reference/` and its faster siblings, the public signatures and their
meaning in `__init__.py`. Each backward is an op of its own, so that torch.compile sees through it as well.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.library import custom_op

from tokensieve.ops.dispatch import pick
from tokensieve.ops.reference.blocks import compute_dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For `with`: autocast off on the device of `x`. Where it is off already nothing is entered, which is what decode can afford."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def full_precision(body):
    """Inside an op the reference computes in float32, whatever autocast the model runs under."""

    @functools.wraps(body)
    def run(*args, **kwargs):
        x = args[0]
        if x.is_cuda:  # a Triton kernel is launched on the current device, wherever its tensors are
            with torch.cuda.device_of(x), without_autocast(x):
                return body(*args, **kwargs)
        with without_autocast(x):
            return body(*args, **kwargs)

    return run


def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(shape, dtype=dtype or x.dtype)


# index_scores


@custom_op("tokensieve::index_scores", mutates_args=())
@full_precision
def index_scores(
    q: Tensor, k: Tensor, w: Tensor, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> Tensor:
    return pick("index_scores", q, backend, k=k).index_scores(q, k, w, starts, ends, k_scale)


@index_scores.register_fake
def _(q, k, w, starts, ends, k_scale, backend):
    return empty(q, q.shape[0], k.shape[0], dtype=compute_dtype(q))


@custom_op("tokensieve::index_scores_backward", mutates_args=())
@full_precision
def index_scores_backward(
    dscores: Tensor, q: Tensor, k: Tensor, w: Tensor, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return pick("index_scores", q, backend, k=k).index_scores_backward(dscores, q, k, w, starts, ends, k_scale)


@index_scores_backward.register_fake
def _(dscores, q, k, w, starts, ends, k_scale, backend):
    return empty(q, *q.shape), empty(k, *k.shape), empty(w, *w.shape)


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
    return empty(scores, scores.shape[0], k, dtype=torch.int32)


@custom_op("tokensieve::index_topk", mutates_args=())
@full_precision
def index_topk(
    q: Tensor, k_I: Tensor, w: Tensor, k: int, starts: Tensor, ends: Tensor, k_scale: Tensor | None, backend: str
) -> Tensor:
    return pick("index_topk", q, backend, k=k_I).index_topk(q, k_I, w, k, starts, ends, k_scale)


@index_topk.register_fake
def _(q, k_I, w, k, starts, ends, k_scale, backend):
    return empty(q, q.shape[0], k, dtype=torch.int32)


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
    module = pick("dense_attention", q, backend, k=k, v=v, bounds=bounds)
    return module.dense_attention(q, k, v, starts, ends, bounds, longest, scale)


@dense_attention.register_fake
def _(q, k, v, starts, ends, bounds, longest, scale, backend):
    S, H = q.shape[:2]
    return empty(q, S, H, v.shape[2]), empty(q, S, H, dtype=compute_dtype(q))


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
    module = pick("dense_attention", q, backend, k=k, v=v, bounds=bounds)
    return module.dense_attention_backward(dout, dlse, q, k, v, out, lse, starts, ends, bounds, longest, scale)


@dense_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, starts, ends, bounds, longest, scale, backend):
    return empty(q, *q.shape), empty(k, *k.shape), empty(v, *v.shape)


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
    return pick("masked_attention", q, backend, k=k, v=v).masked_attention(q, k, v, indices, scale)


@masked_attention.register_fake
def _(q, k, v, indices, scale, backend):
    S, H = q.shape[:2]
    return empty(q, S, H, v.shape[2]), empty(q, S, H, dtype=compute_dtype(q))


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
    module = pick("masked_attention", q, backend, k=k, v=v)
    return module.masked_attention_backward(dout, dlse, q, k, v, out, lse, indices, scale)


@masked_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, indices, scale, backend):
    return empty(q, *q.shape), empty(k, *k.shape), empty(v, *v.shape)


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
    module = pick("sparse_attention", q, backend, kv=kv, v_start=v_start, d_v=d_v)
    return module.sparse_attention(q, kv, indices, scale, d_k, v_start, d_v)


@sparse_attention.register_fake
def _(q, kv, indices, scale, d_k, v_start, d_v, backend):
    S, H = q.shape[:2]
    return empty(q, S, H, d_v), empty(q, S, H, dtype=compute_dtype(q))


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
    module = pick("sparse_attention", q, backend, kv=kv, v_start=v_start, d_v=d_v)
    return module.sparse_attention_backward(dout, dlse, q, kv, indices, out, lse, scale, d_k, v_start, d_v)


@sparse_attention_backward.register_fake
def _(dout, dlse, q, kv, indices, out, lse, scale, d_k, v_start, d_v, backend):
    return empty(q, *q.shape), empty(kv, *kv.shape)


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
