"""The warm-up's KL over all visible keys, equation (3), in Triton: value and gradients in memory linear in T.

Legend: S queries, T keys, H heads, G key-value groups, D head width (main part DM, tail DT). A program holds a block of
BQ queries and walks over tiles of BK keys, a chunk of them.

Passes over the keys:
1. the heads' probabilities, summed on the chip: p;
2. the scores, as `index.py` has them;
3. from a row of both, one row at a time, the KL and its derivative softmax(I) - p, which takes the place of p;
4. from that derivative dq_I and dw by queries, and dk_I by keys: adding up dq_I from programs that hold keys would cost
   more than the products that it saves.

Only two strips of queries x T have that length. p and the scores have passes of their own because the blocks and tiles
that suit them differ, and both together do not fit into a program's registers.
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
    index_scores,
    key_range,
    ranges,
)

STRIP = 1 << 26  # entries of p, and of the scores, held at a time: 256 MiB each


@triton.jit
def _target_kernel(
    q, k, lse, starts, ends, target, S, T, chunk, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """p, the mean over heads of the attention's probabilities, of the keys that a query sees."""
    t, n, part = tl.program_id(0) * BQ + tl.arange(0, BQ), tl.arange(0, BK), tl.program_id(1)
    start, end, lo, hi = block_range(starts, ends, t, S, T)
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
        tl.store(target + t.to(tl.int64)[:, None] * T + key, p_QN / H, mask=seen)


@triton.jit
def _kl_kernel(target, scores, weight, starts, ends, kl, T, TILE: tl.constexpr, GRADIENT: tl.constexpr):
    """The KL of one query. If GRADIENT, its weighted derivative by the scores takes the place of p.

    That derivative is softmax(I) * sum(p) - p.
    """
    t, n = tl.program_id(0), tl.arange(0, TILE)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    target += t.to(tl.int64) * T
    scores += t.to(tl.int64) * T
    largest_N, total_N, mass_N = (
        tl.full((TILE,), float("-inf"), tl.float32),
        tl.zeros((TILE,), tl.float32),
        tl.zeros((TILE,), tl.float32),
    )
    for s in range(start // TILE * TILE, end, TILE):
        seen = (s + n >= start) & (s + n < end)
        score_N = tl.load(scores + s + n, mask=seen, other=float("-inf"))
        now_N = tl.maximum(largest_N, score_N, propagate_nan=tl.PropagateNan.ALL)
        base_N = tl.where(now_N == float("-inf"), 0.0, now_N)  # -inf minus -inf would be NaN
        total_N = total_N * tl.exp(largest_N - base_N) + tl.exp(score_N - base_N)
        largest_N = now_N
        mass_N += tl.load(target + s + n, mask=seen, other=0.0)
    largest, mass = tl.max(largest_N), tl.sum(mass_N)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(total_N * tl.exp(largest_N - base))
    lse = base + tl.log(tl.where(total == 0.0, 1.0, total))
    scale = 0.0
    if GRADIENT:
        scale = tl.load(weight + t).to(tl.float32)
    kl_N = tl.zeros((TILE,), tl.float32)
    for s in range(start // TILE * TILE, end, TILE):
        seen = (s + n >= start) & (s + n < end)
        p_N = tl.load(target + s + n, mask=seen, other=0.0)
        log_share_N = tl.load(scores + s + n, mask=seen, other=0.0) - lse
        log_p_N = tl.log(tl.where(p_N > 0, p_N, 1.0))
        kl_N += tl.where(seen, p_N * (log_p_N - log_share_N), 0.0)
        if GRADIENT:
            tl.store(target + s + n, (tl.exp(log_share_N) * mass - p_N) * scale, mask=seen)
    tl.store(kl + t, tl.sum(kl_N))


def _strip(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor,
    starts: Tensor, ends: Tensor, weight: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """kl of a strip of queries, and with `weight` the weighted derivative by their scores (queries, T).

    The derivative is unspecified outside of the queries' ranges.
    """
    (S, H, D), (T, G, _) = q.shape, k.shape
    target = torch.empty(S, T, dtype=torch.float32, device=q.device)
    BQ, BK, warps, stages = (128, 64, 8, 3 if D <= 192 else 2) if q.element_size() == 2 and D <= 256 else (32, 32, 4, 1)
    grid, chunk = chunks(S, T, BQ, BK, least=8)
    _target_kernel[grid](
        q, k, lse, starts, ends, target, S, T, chunk, scale,
        H=H, G=G, D=D, **key_parts(D), BQ=BQ, BK=BK, EXACT=exact(q), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    kl = torch.empty(S, dtype=torch.float32, device=q.device)
    scores = index_scores(q_I, k_I, w, starts, ends, None)
    _kl_kernel[(S,)](target, scores, weight, starts, ends, kl, T, TILE=1024, GRADIENT=weight is not None, num_warps=4)
    return kl, target


def _by_strips(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor,
    starts: Tensor, ends: Tensor, weight: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kl (S), and the gradients of sum(weight * kl) by q_I, k_I and w, zeros without `weight`.

    It takes a strip of queries at a time.
    """
    S, T = q.shape[0], k.shape[0]
    kl = torch.zeros(S, dtype=torch.float32, device=q.device)
    dq, dw = q_I.new_zeros(q_I.shape), w.new_zeros(w.shape)
    dk = torch.zeros(k_I.shape, dtype=torch.float32, device=k_I.device)
    q, k, lse, q_I, k_I, w = (x.contiguous() for x in (q, k, lse, q_I, k_I, w))
    starts, ends = ranges(starts, ends)
    rows = max(1, STRIP // max(T, 1)) if T else S
    for a in range(0, S if T else 0, max(rows, 1)):
        b = slice(a, a + rows)
        weight_b = None if weight is None else weight[b].contiguous()
        kl[b], dscore = _strip(q[b], k, lse[b], scale, q_I[b], k_I, w[b], starts[b], ends[b], weight_b)
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
