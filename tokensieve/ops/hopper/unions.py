"""Attention over unions of selections on Hopper: the kernels of `union_attention` for its wide blocks.

Narrow blocks, and blocks with broken numbers, are left to the portable kernels, whose second walk is guarded: zero
times NaN is NaN. The device decides, and the host never waits. If gradients are added in order, the portable kernels
take the whole backward.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokensieve.ops.hopper.attention import delta_of
from tokensieve.ops.hopper.limits import whole
from tokensieve.ops.hopper.union_backward import union_backward_kernel
from tokensieve.ops.hopper.union_forward import union_forward_kernel
from tokensieve.ops.triton import union_attention
from tokensieve.ops.triton.in_order import wanted_in_order
from tokensieve.ops.triton.unions import Unions

STEP = {"N": 128, "BUFFERS": 2}  # keys of a step of the forward, and steps in shared memory


def takes(u: Unions, kv: Tensor, shape: dict[str, Any]) -> bool:
    """Whether there is a kernel for these blocks: of 128 rows, and with a key at least. `limits` says the rest."""
    return len(kv) > 0 and u.B * shape["MP"] == union_attention.ROWS


def _parts(u: Unions, shape: dict[str, Any]) -> dict[str, Any]:
    return {name: shape[name] for name in ("H", "G", "E", "MP", "D", "V", "v_start")} | {"C": u.C, "B": u.B}


def _only(u: Unions, blocks: Tensor) -> Unions:
    return dataclasses.replace(u, counts=torch.where(blocks, u.counts, -1))


def forward(
    levels: list[Unions], q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float, shape: dict[str, Any]
) -> None:
    """Writes out and lse of the queries of these blocks. Everything contiguous."""
    for u in levels:
        if takes(u, kv, shape):
            broken = torch.zeros_like(u.counts)
            union_forward_kernel[(len(u) * shape["G"],)](
                q, kv, out, lse, u.keys, u.marks, u.counts, broken, q.shape[0], scale=scale,
                **_parts(u, shape), **STEP, num_warps=4,
            )  # fmt: skip
            u = _only(u, broken > 0)
        union_attention.forward([u], q, kv, out, lse, scale, shape)


def _blocks_with(rows: Tensor, u: Unions) -> Tensor:
    """Whether any of a block's queries is marked in `rows` (S,)."""
    padded = torch.nn.functional.pad(rows, (0, len(u) * u.B - len(rows)))
    return padded.view(len(u), u.B).any(1)


def _broken(u: Unions, q: Tensor, kv: Tensor, delta: Tensor, lse: Tensor) -> Tensor:
    """Blocks of which a query or a key of the list is broken, or a gradient or an output (then delta is)."""
    queries = ~(whole(q) & delta.isfinite() & (lse < torch.inf)).all(1)
    keys = ~whole(kv).all(1)
    places = torch.arange(u.C, device=u.keys.device) < u.counts[:, None]
    listed = (keys[torch.where(places, u.keys, 0)] & places).any(1)
    return _blocks_with(queries, u) | listed


def backward(
    levels: list[Unions],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    kv: Tensor,
    dq: Tensor,
    dkv: Tensor,
    scale: float,
    shape: dict[str, Any],
) -> None:
    """Writes dq of the queries of these blocks, and adds to dkv (T, G, E) float32. Everything contiguous."""
    for u in levels:
        if takes(u, kv, shape) and not wanted_in_order():
            delta = delta_of(dout, out.contiguous(), dlse)
            broken = _broken(u, q, kv, delta, lse)
            mine = _only(u, ~broken)
            union_backward_kernel[(len(u) * shape["G"],)](
                dout, q, kv, lse, delta, dq, dkv, u.keys, u.marks, mine.counts, q.shape[0], scale=scale,
                **_parts(u, shape), num_warps=4,
            )  # fmt: skip
            u = _only(u, broken)
        union_attention.backward([u], dout, dlse, out, lse, q, kv, dq, dkv, scale, shape)


KERNELS = union_attention.Kernels(forward, backward)
