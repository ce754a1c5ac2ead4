"""Registers the ops that train indexers, equations (3) and (4), with PyTorch; as `custom.py` does the others."""

import torch
from torch import Tensor
from torch.library import custom_op

from tokensieve.ops.custom import empty, full_precision
from tokensieve.ops.dispatch import pick
from tokensieve.ops.reference.blocks import compute_dtype


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
    module = pick("sparse_attention_kl", q, backend, kv=kv, v_start=v_start, d_v=d_v, q_I=q_I, k_I=k_I)
    return module.sparse_attention_kl(q, kv, indices, scale, d_k, v_start, d_v, q_I, k_I, w)


@sparse_attention_kl.register_fake
def _(q, kv, indices, scale, d_k, v_start, d_v, q_I, k_I, w, backend):
    S, H = q.shape[:2]
    dtype = compute_dtype(q)
    return empty(q, S, H, d_v), empty(q, S, H, dtype=dtype), empty(q, S, dtype=dtype)


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
    module = pick("sparse_attention_kl", q, backend, kv=kv, v_start=v_start, d_v=d_v, q_I=q_I, k_I=k_I)
    return module.sparse_attention_kl_backward(
        dout, dlse, dkl, q, kv, indices, out, lse, scale, d_k, v_start, d_v, q_I, k_I, w
    )


@sparse_attention_kl_backward.register_fake
def _(dout, dlse, dkl, q, kv, indices, out, lse, scale, d_k, v_start, d_v, q_I, k_I, w, backend):
    return (
        empty(q, *q.shape),
        empty(kv, *kv.shape),
        empty(q_I, *q_I.shape),
        empty(k_I, *k_I.shape),
        empty(w, *w.shape),
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
    module = pick("indexer_kl_dense", q, backend, k=k, q_I=q_I, k_I=k_I)
    return module.indexer_kl_dense(q, k, lse, scale, q_I, k_I, w, starts, ends)


@indexer_kl_dense.register_fake
def _(q, k, lse, scale, q_I, k_I, w, starts, ends, backend):
    return empty(q, q.shape[0], dtype=compute_dtype(q_I))


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
    module = pick("indexer_kl_dense", q, backend, k=k, q_I=q_I, k_I=k_I)
    return module.indexer_kl_dense_backward(dkl, q, k, lse, scale, q_I, k_I, w, starts, ends)


@indexer_kl_dense_backward.register_fake
def _(dkl, q, k, lse, scale, q_I, k_I, w, starts, ends, backend):
    return empty(q_I, *q_I.shape), empty(k_I, *k_I.shape), empty(w, *w.shape)


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
    module = pick("indexer_kl_dense", q, backend, k=k, q_I=q_I, k_I=k_I)
    kl, *gradients = module.indexer_kl_dense_step(q, k, lse, scale, q_I, k_I, w, starts, ends, weight)
    return (kl * weight.to(kl.dtype)).sum(), *gradients


@indexer_kl_dense_sum.register_fake
def _(q, k, lse, scale, q_I, k_I, w, starts, ends, weight, backend):
    return empty(q, dtype=compute_dtype(q_I)), q_I.new_empty(q_I.shape), k_I.new_empty(k_I.shape), w.new_empty(w.shape)


def _kl_sum_setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _kl_sum_backward(ctx, dsum, *unused):
    # The forward has the gradients already; the other outputs are those gradients, which nobody differentiates. As large as q_I and
    # needed once, they are scaled in place: at 128K tokens a copy would be 2 GiB.
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            "indexer_kl_dense_sum: its gradient can be taken once; call it again, or sum indexer_kl_dense, for another"
        )
    ctx.spent = dsum is not None
    gradients = [None if dsum is None else g.mul_(dsum.to(g.dtype)) for g in ctx.saved_tensors]
    return None, None, None, None, *gradients, None, None, None, None


indexer_kl_dense_sum.register_autograd(_kl_sum_backward, setup_context=_kl_sum_setup)
