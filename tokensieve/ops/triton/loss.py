"""The warm-up's KL over all visible keys, equation (3), in Triton: value and gradients in memory linear in T.

Legend: S queries, T keys, H heads, G key-value groups, D head width (main part DM, tail DT); HI index heads, DI index width (DIP padded); a
program holds a tile of BQ queries and walks over tiles of BK keys, a chunk of them.

Passes over the keys: the logsumexp of the scores; the heads' probabilities, summed on the chip; the KL and its derivative softmax(I) - p,
which takes the place of p; and from it dq_I and dw by queries and dk_I by keys, since adding dq_I up from programs that hold keys would
cost more than the products that it saves. One strip of queries x T is the only thing of that length; p and the scores are passes of
their own because the tiles that suit them differ, and together they do not fit into a program's registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.attention import LOG2E, key_parts, load_part
from tokensieve.ops.triton.index import (
    block_range,
    chunks,
    exact,
    gradients_of_scores,
    load_rows,
    padded,
    ranges,
    relu,
)

STRIP = 1 << 27  # entries of p held at a time: 512 MiB


@triton.jit
def score_tile(q, k_ND, w, t, S, HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, EXACT: tl.constexpr):
    """Equation (1) for a tile, (BQ, BK): one product a head."""
    d = tl.arange(0, DIP)
    score_QN = tl.zeros((t.shape[0], k_ND.shape[0]), tl.float32)
    for j in range(HI):
        q_QD = load_rows(q, t * HI + j, t < S, d, DI)
        w_Q = tl.load(w + t * HI + j, mask=t < S, other=0.0).to(tl.float32)
        dots_QN = tl.dot(q_QD, tl.trans(k_ND), input_precision=EXACT)
        score_QN += relu(dots_QN) * w_Q[:, None]
    return score_QN


@triton.jit
def _lse_kernel(
    q_I, k_I, w, starts, ends, lse, S, T, chunk,
    HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The logsumexp of one chunk's scores, -inf where a query sees none of its keys."""
    t, n, part = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BK), tl.program_id(1)
    start, end, lo, hi = block_range(starts, ends, t, S, T)
    largest, total = tl.zeros((BQ,), tl.float32) + float("-inf"), tl.zeros((BQ,), tl.float32)
    for s in range(tl.maximum(lo // BK * BK, part * chunk), tl.minimum(hi, part * chunk + chunk), BK):
        key = (s + n)[None, :]
        k_ND = load_rows(k_I, s + n, s + n < T, tl.arange(0, DIP), DI)
        score_QN = score_tile(q_I, k_ND, w, t, S, HI, DI, DIP, EXACT)
        score_QN = tl.where((key >= start[:, None]) & (key < end[:, None]), score_QN, float("-inf"))
        now = tl.maximum(largest, tl.max(score_QN, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(score_QN - base[:, None]), 1)
        largest = now
    found = tl.where(total == 0, float("-inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(lse + part * S + t, found, mask=t < S)


@triton.jit
def _target_kernel(
    q, k, lse, starts, ends, target, mass, S, T, chunk, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """p, the mean over heads of the attention's probabilities, where a query sees a key, and their sum over a chunk."""
    t, n, part = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BK), tl.program_id(1)
    start, end, lo, hi = block_range(starts, ends, t, S, T)
    mass_Q = tl.zeros((BQ,), tl.float32)
    for s in range(tl.maximum(lo // BK * BK, part * chunk), tl.minimum(hi, part * chunk + chunk), BK):
        p_QN = tl.zeros((BQ, BK), tl.float32)
        for h in range(H):
            q_row, k_row = (t.to(tl.int64) * H + h) * D, ((s + n).to(tl.int64) * G + h // (H // G)) * D
            q_main = load_part(q, q_row, t < S, D if D < DM else DM, DM)
            k_main = load_part(k, k_row, s + n < T, D if D < DM else DM, DM)
            logit_QN = tl.dot(q_main, tl.trans(k_main), input_precision=EXACT)
            if DT > 0:
                q_tail = load_part(q, q_row + DM, t < S, D - DM, DT)
                k_tail = load_part(k, k_row + DM, s + n < T, D - DM, DT)
                logit_QN = tl.dot(q_tail, tl.trans(k_tail), logit_QN, input_precision=EXACT)
            lse_h = tl.load(lse + t * H + h, mask=t < S, other=float("inf")).to(tl.float32)
            lse_h = tl.where(lse_h == float("-inf"), float("inf"), lse_h) * LOG2E
            p_QN += tl.exp2(logit_QN * (scale * LOG2E) - lse_h[:, None])
        key = (s + n)[None, :]
        seen = (key >= start[:, None]) & (key < end[:, None])
        p_QN = tl.where(seen, p_QN / H, 0.0)
        tl.store(target + t.to(tl.int64)[:, None] * T + key, p_QN, mask=seen)
        mass_Q += tl.sum(p_QN, 1)
    tl.store(mass + part * S + t, mass_Q, mask=t < S)


@triton.jit
def _kl_kernel(
    target, q_I, k_I, w, lse_I, mass, weight, starts, ends, kl, S, T, chunk,
    HI: tl.constexpr, DI: tl.constexpr, DIP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """One chunk's part of the KL; GRADIENT: its weighted derivative by the scores, softmax(I) * sum(p) - p, in the place of p."""
    t, n, part = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BK), tl.program_id(1)
    start, end, lo, hi = block_range(starts, ends, t, S, T)
    lse_Q = tl.load(lse_I + t, mask=t < S, other=0.0)
    lse_Q = tl.where(lse_Q == float("-inf"), 0.0, lse_Q)  # of a query without keys
    kl_Q = tl.zeros((BQ,), tl.float32)
    for s in range(tl.maximum(lo // BK * BK, part * chunk), tl.minimum(hi, part * chunk + chunk), BK):
        key = (s + n)[None, :]
        seen = (key >= start[:, None]) & (key < end[:, None])
        k_ND = load_rows(k_I, s + n, s + n < T, tl.arange(0, DIP), DI)
        log_share = score_tile(q_I, k_ND, w, t, S, HI, DI, DIP, EXACT) - lse_Q[:, None]
        place = target + t.to(tl.int64)[:, None] * T + key
        p_QN = tl.load(place, mask=seen, other=0.0)
        log_p = tl.log(tl.where(p_QN > 0, p_QN, 1.0))
        kl_Q += tl.sum(p_QN * tl.where(seen, log_p - log_share, 0.0), 1)
        if GRADIENT:
            weight_Q = tl.load(weight + t, mask=t < S, other=0.0).to(tl.float32)
            mass_Q = tl.load(mass + t, mask=t < S, other=0.0)
            tl.store(place, (tl.exp(log_share) * mass_Q[:, None] - p_QN) * weight_Q[:, None], mask=seen)
    tl.store(kl + part * S + t, kl_Q, mask=t < S)


def _strip(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor,
    starts: Tensor, ends: Tensor, weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl of some queries, and with `weight` the weighted derivative by their scores (queries, T), unspecified outside ranges."""
    (S, H, D), (T, G, _), (_, HI, DI) = q.shape, k.shape, q_I.shape
    target = torch.empty(S, T, dtype=torch.float32, device=q.device)
    BQ, BK, warps, stages = (128, 64, 8, 3 if D <= 192 else 2) if q.element_size() == 2 and D <= 256 else (32, 32, 4, 1)
    grid, chunk = chunks(S, T, BQ, BK, least=8)
    masses = torch.empty(grid[1], S, dtype=torch.float32, device=q.device)
    _target_kernel[grid](
        q, k, lse, starts, ends, target, masses, S, T, chunk, scale,
        H=H, G=G, D=D, **key_parts(D), BQ=BQ, BK=BK, EXACT=exact(q), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    BQ, BK = (64, 128) if q_I.element_size() == 2 else (32, 32)
    grid, chunk = chunks(S, T, BQ, BK, least=8)
    index = {"HI": HI, "DI": DI, "DIP": padded(DI), "BQ": BQ, "BK": BK, "EXACT": exact(q_I), "num_stages": 3}
    parts = torch.empty(grid[1], S, dtype=torch.float32, device=q.device)
    _lse_kernel[grid](q_I, k_I, w, starts, ends, parts, S, T, chunk, **index, num_warps=4)
    lse_I, gradient = torch.logsumexp(parts, 0), weight is not None
    _kl_kernel[grid](
        target,
        q_I,
        k_I,
        w,
        lse_I,
        masses.sum(0),
        weight,
        starts,
        ends,
        parts,
        S,
        T,
        chunk,
        **index,
        GRADIENT=gradient,
        num_warps=4,
    )
    return parts.sum(0), target


def _by_strips(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor,
    starts: Tensor, ends: Tensor, weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kl (S), and with `weight` the gradients of sum(weight * kl) by q_I, k_I and w, else zeros; a strip of queries at a time."""
    S, T = q.shape[0], k.shape[0]
    kl = torch.zeros(S, dtype=torch.float32, device=q.device)
    dq, dw = q_I.new_zeros(q_I.shape), w.new_zeros(w.shape)
    dk = torch.zeros(k_I.shape, dtype=torch.float32, device=k_I.device)
    q, k, lse, q_I, k_I, w = (x.contiguous() for x in (q, k, lse, q_I, k_I, w))
    starts, ends = ranges(starts, ends)
    rows = max(1, STRIP // max(T, 1)) if T else S
    for a in range(0, S if T else 0, max(rows, 1)):
        b = slice(a, a + rows)
        given = None if weight is None else weight[b].contiguous()
        kl[b], dscore = _strip(q[b], k, lse[b], scale, q_I[b], k_I, w[b], starts[b], ends[b], given)
        if weight is not None:
            dq[b], part, dw[b] = gradients_of_scores(dscore, q_I[b], k_I, w[b], starts[b], ends[b], None)
            dk += part
            del part
        del dscore  # before the next strip is made
    return kl, dq, dk.to(k_I.dtype), dw


def indexer_kl_dense(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> Tensor:
    return _by_strips(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, None)[0]


def indexer_kl_dense_step(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    weight_S: Tensor,
) -> tuple[Tensor, ...]:
    """kl (S) and the gradients of sum(weight * kl) by q_I, k_I and w."""
    return _by_strips(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, weight_S)


def indexer_kl_dense_backward(
    dkl_S: Tensor,
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> tuple[Tensor, ...]:
    return _by_strips(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, dkl_S)[1:]
