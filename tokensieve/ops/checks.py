"""What the public ops demand of their arguments. Every check raises ValueError with the op, the argument and the rule.

Legend: S query tokens, T key tokens, H heads, G key-value groups, K places for selected keys, D key width, E entry
width, V value width, N rows. `paged_checks.py` has those of the ops on pages.

Messages are built only if a check fails: torch.compile cannot format symbolic sizes, and decode checks every call of
every layer. Values are looked at on the CPU only: on a GPU that would stop its queue, and a tracer has none.
"""

import torch
from torch import Tensor

from tokensieve.ops.quant import SCALE_BLOCK

INDEX_DTYPES = (torch.int32, torch.int64)


def has_values(x: Tensor) -> bool:
    return x.is_cpu and x.numel() > 0 and not torch.compiler.is_compiling()


def ranges(op: str, S: int, T: int, starts_S: Tensor, ends_S: Tensor) -> None:
    if starts_S.shape != (S,) or ends_S.shape != (S,):
        raise ValueError(f"{op}: starts and ends must have shape ({S},), one range per query")
    if has_values(starts_S):
        low, high = min(starts_S.tolist()), max(ends_S.tolist())  # for one query faster than reductions, never slow
        if low < 0 or high > T:
            raise ValueError(f"{op}: key ranges must lie in [0, {T}], got starts from {low} and ends to {high}")


def selected_count(op: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")


def two_levels(op: str, k: int, block: int, blocks: int) -> None:
    if block < 16 or block & (block - 1):
        raise ValueError(f"{op}: block must be a power of two of at least 16 keys, got {block}")
    if blocks < 2:
        raise ValueError(f"{op}: blocks must be at least 2, a range's first and its last block, got {blocks}")
    if k > (blocks - 2) * block + 2:  # of its first and its last block a range may hold one key each
        raise ValueError(
            f"{op}: {blocks} blocks of {block} keys may hold fewer than k = {k} keys of a range; "
            f"take at least {2 - (2 - k) // block} blocks"
        )


def indices(op: str, S: int, T: int, indices_SK: Tensor) -> None:
    indices_shape(op, S, indices_SK)
    if has_values(indices_SK):
        low, high = indices_SK.aminmax()
        if int(low) < -1 or int(high) >= T:
            raise ValueError(f"{op}: indices must lie in [-1, {T}), got {int(low)} to {int(high)}")


def indices_shape(op: str, S: int, indices_SK: Tensor) -> None:
    if indices_SK.dim() != 2 or indices_SK.shape[0] != S:
        raise ValueError(f"{op}: indices must be ({S}, K), got {tuple(indices_SK.shape)}")
    if indices_SK.dtype not in INDEX_DTYPES:
        raise ValueError(f"{op}: indices must be int32 or int64, got {indices_SK.dtype}")


# The indexer


def scoring(op: str, q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k_scale_T: Tensor | None = None) -> None:
    """The operands of equation (1)."""
    if q_SHD.dim() != 3 or k_TD.dim() != 2:
        raise ValueError(f"{op}: q must be (S, H_I, d_I) and k (T, d_I), got {tuple(q_SHD.shape)}, {tuple(k_TD.shape)}")
    if q_SHD.shape[2] != k_TD.shape[1]:
        raise ValueError(f"{op}: q is {q_SHD.shape[2]} wide but k {k_TD.shape[1]}")
    if w_SH.shape != q_SHD.shape[:2]:
        raise ValueError(f"{op}: w must be (S, H_I) = {tuple(q_SHD.shape[:2])}, got {tuple(w_SH.shape)}")
    if k_scale_T is not None and k_scale_T.shape != k_TD.shape[:1]:
        raise ValueError(f"{op}: k_scale must be (T) = {tuple(k_TD.shape[:1])}, got {tuple(k_scale_T.shape)}")


def scoring_beside(op: str, q_SHD: Tensor, k_TGD: Tensor, q_I: Tensor, k_I: Tensor, w: Tensor) -> None:
    """The operands of equation (1) for the queries and keys of an attention."""
    scoring(op, q_I, k_I, w)
    if q_I.shape[0] != q_SHD.shape[0] or k_I.shape[0] != k_TGD.shape[0]:
        raise ValueError(
            f"{op}: q_I and k_I have {q_I.shape[0]} queries and {k_I.shape[0]} keys, "
            f"the attention {q_SHD.shape[0]} and {k_TGD.shape[0]}"
        )


def warmup(
    op: str,
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> None:
    """The operands of equation (3)."""
    queries_and_keys(op, q_SHD, k_TGD)
    scoring_beside(op, q_SHD, k_TGD, q_I, k_I, w)
    if lse_SH.shape != q_SHD.shape[:2]:
        raise ValueError(f"{op}: lse must be (S, H) = {tuple(q_SHD.shape[:2])}, got {tuple(lse_SH.shape)}")
    ranges(op, q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)


# Attention


def groups(op: str, q_SHD: Tensor, k_TGD: Tensor) -> None:
    if q_SHD.dim() != 3 or k_TGD.dim() != 3:
        raise ValueError(
            f"{op}: q must be (S, H, D) and keys (kv) (T, G, D), got {tuple(q_SHD.shape)}, {tuple(k_TGD.shape)}"
        )
    shared_heads(op, q_SHD, k_TGD.shape[1])


def shared_heads(op: str, q_SHD: Tensor, G: int) -> None:
    if q_SHD.shape[1] % G:
        raise ValueError(f"{op}: {q_SHD.shape[1]} heads cannot share {G} key-value groups")


def queries_and_keys(op: str, q_SHD: Tensor, k_TGD: Tensor) -> None:
    groups(op, q_SHD, k_TGD)
    if q_SHD.shape[2] != k_TGD.shape[2]:
        raise ValueError(f"{op}: q is {q_SHD.shape[2]} wide but k {k_TGD.shape[2]}")


def dense(op: str, q_SHD: Tensor, k_TGD: Tensor, v_TGV: Tensor, starts_S: Tensor, ends_S: Tensor) -> None:
    if k_TGD.shape[:2] != v_TGV.shape[:2]:
        raise ValueError(f"{op}: k {tuple(k_TGD.shape)} and v {tuple(v_TGV.shape)} differ in (T, G)")
    queries_and_keys(op, q_SHD, k_TGD)
    ranges(op, q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)


def masked(op: str, q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor) -> None:
    if k_THD.shape[:2] != v_THV.shape[:2]:
        raise ValueError(f"{op}: k {tuple(k_THD.shape)} and v {tuple(v_THV.shape)} differ in (T, H)")
    if q_SHD.shape[1:] != k_THD.shape[1:]:
        raise ValueError(f"{op}: q {tuple(q_SHD.shape)} and k {tuple(k_THD.shape)} differ in (H, D)")
    indices(op, q_SHD.shape[0], k_THD.shape[0], indices_SK)


def entries(op: str, q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, d_k: int, v_start: int, d_v: int) -> None:
    groups(op, q_SHD, kv_TGE)
    entry_parts(op, q_SHD, kv_TGE.shape[2], d_k, v_start, d_v)
    indices(op, q_SHD.shape[0], kv_TGE.shape[0], indices_SK)


def entry_parts(op: str, q_SHD: Tensor, E: int, d_k: int, v_start: int, d_v: int) -> None:
    D = q_SHD.shape[2]
    if d_k != D or d_k > E:
        raise ValueError(
            f"{op}: q is {D} wide, d_k is {d_k}, an entry is {E} wide; d_k must equal q's width and fit in the entry"
        )
    if v_start < 0 or d_v < 1 or v_start + d_v > E:
        raise ValueError(
            f"{op}: the value [{v_start}, {v_start + d_v}) (d_v {d_v}) is empty or outside an entry of width {E}"
        )


# Products with FP8 weights


def block_linear(op: str, x_NK: Tensor, weight_EMK: Tensor, scale: Tensor, ends_E: Tensor | None, gated: bool) -> None:
    if weight_EMK.dim() != 3 or weight_EMK.dtype != torch.float8_e4m3fn or weight_EMK.shape[2] % SCALE_BLOCK:
        raise ValueError(
            f"{op}: weight must be (E, M, K) float8_e4m3fn, K a multiple of {SCALE_BLOCK}, "
            f"got {tuple(weight_EMK.shape)} {weight_EMK.dtype}"
        )
    E, M, K = weight_EMK.shape
    if scale.shape != (E, -(-M // SCALE_BLOCK), K // SCALE_BLOCK) or scale.dtype != torch.float32:
        raise ValueError(
            f"{op}: scale {tuple(scale.shape)} {scale.dtype} does not fit weight {tuple(weight_EMK.shape)}"
        )
    width = 2 * K if gated else K
    if x_NK.dim() != 2 or x_NK.shape[1] != width or not x_NK.is_floating_point():
        raise ValueError(f"{op}: x must be (N, {width}) floating, got {tuple(x_NK.shape)} {x_NK.dtype}")
    if E == 1:
        fits = ends_E is None
    else:
        fits = ends_E is not None and ends_E.shape == (E,) and ends_E.dtype == torch.int32
    if not fits:
        raise ValueError(f"{op}: ends must be ({E},) int32, or None for one weight")
