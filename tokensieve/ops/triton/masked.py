"""Attention over all keys with everything but the selection masked, forward and backward, in Triton: the form for short
contexts.

Legend: S queries, T keys, H heads, K places for selected keys, D key width (main part DM, tail DT), V value width (VP
padded). A program has one head. It holds a block of BQ queries and walks over tiles of BK keys, or the other way round
for dk and dv, so that only bits are added atomically.

The selection becomes bits: a word has 32 keys of a query (or 32 queries of a key, for programs that hold keys), and
words of neighbours lie side by side. Tiles between the first and the last selected key are computed whole and masked.

Zero times NaN is NaN: through a product a broken row reaches every row of its tile, selected or not. Keeping it out
costs more than healthy rows should pay. So a program whose sums come out broken walks once more, guarded: broken
numbers then count as zeros in the products, and the rows that did select them are set to NaN separately.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.attention import LN2, LOG2E, key_parts, load_index, load_part, store_part
from tokensieve.ops.triton.index import block_range, exact, padded, queries_of_tiles

WORD: tl.constexpr = tl.constexpr(32)


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: queries of a block, keys of a tile, warps and stages."""

    BQ: int
    BK: int
    num_warps: int
    num_stages: int


def launches(D: int, V: int) -> tuple[Launch, Launch, Launch]:
    """Launches of forward, of dq, and of dk with dv, as a program's registers hold them.

    Up to a width of 128 they fit into 99 KB of shared memory.
    """
    if max(D, V) <= 128:
        return Launch(64, 32, 4, 2), Launch(64, 32, 4, 2), Launch(32, 64, 8, 2)
    if D <= 192 and V <= 128:
        return Launch(128, 64, 8, 3), Launch(128, 64, 8, 3), Launch(32, 128, 8, 3)
    return Launch(128, 64, 8, 2), Launch(128, 32, 8, 2), Launch(32, 64, 8, 2)


@triton.jit
def finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")  # false for NaN


@triton.jit
def any_broken(x):
    return tl.max(tl.where(finite(x), 0, 1)) > 0


@triton.jit(do_not_specialize=["S", "T"])
def _bits_kernel(indices, bits, firsts, ends, S, T, K, BY_KEY: tl.constexpr, BN: tl.constexpr):
    """Sets the bits of one query's keys, and stores the first of them and one past the last (0 and 0 if none)."""
    t, n = tl.program_id(0), tl.arange(0, BN)
    first_N, end_N = tl.zeros((BN,), tl.int32) + T, tl.zeros((BN,), tl.int32)
    for place in range(0, K, BN):
        index = load_index(indices + t.to(tl.int64) * K, place + n, K, T)
        named, key = index >= 0, index.to(tl.int32)
        if BY_KEY:
            word, bit = (t // WORD).to(tl.int64) * T + key, t % WORD + tl.zeros((BN,), tl.int32)
        else:
            word, bit = (key // WORD).to(tl.int64) * S + t, key % WORD
        tl.atomic_or(bits + word, 1 << bit, mask=named, sem="relaxed")  # in any order the same
        first_N, end_N = tl.minimum(first_N, tl.where(named, key, T)), tl.maximum(end_N, tl.where(named, key + 1, 0))
    end = tl.max(end_N)
    tl.store(firsts + t, tl.minimum(tl.min(first_N), end))
    tl.store(ends + t, end)


def selection_bits(indices_SK: Tensor, T: int, by_key: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Words (T / 32, S), or with `by_key` (S / 32, T), and the range [first, end) of each query's selected keys."""
    S, K = indices_SK.shape
    shape = (triton.cdiv(S, 32), T) if by_key else (triton.cdiv(T, 32), S)
    bits = torch.zeros(shape, dtype=torch.int32, device=indices_SK.device)
    firsts, ends = (torch.empty(S, dtype=torch.int32, device=indices_SK.device) for _ in range(2))
    BN = min(1024, padded(K))
    _bits_kernel[(S,)](indices_SK.contiguous(), bits, firsts, ends, S, T, K, BY_KEY=by_key, BN=BN, num_warps=4)
    return bits, firsts, ends


@triton.jit
def load_bits(bits, row, rows, begin, end, n):
    """Whether each row has the bits begin + n, of `end` bits in all. begin is a multiple of 32."""
    # One load for each word of the tile, whose 32 columns then share it.
    word_RN = tl.zeros((row.shape[0], n.shape[0]), tl.int32)
    for i in tl.static_range(n.shape[0] // WORD):
        word = begin // WORD + i
        held = tl.where(word * WORD < end, rows, 0)
        word_R = tl.load(bits + word.to(tl.int64) * rows + row, mask=row < held, other=0)
        word_RN = tl.where((n // WORD == i)[None, :], word_R[:, None], word_RN)
    return ((word_RN >> (n % WORD)[None, :]) & 1) != 0


@triton.jit
def load_both(x, row, mask, D: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr):
    """Main part and tail of queries or keys."""
    main = load_part(x, row, mask, D if D < DM else DM, DM)
    tail = load_part(x, row + DM, mask, D - DM, DT) if DT > 0 else main
    return main, tail


@triton.jit
def product(a_main, a_tail, b_main, b_tail, DT: tl.constexpr, EXACT: tl.constexpr):
    dots = tl.dot(a_main, tl.trans(b_main), input_precision=EXACT)
    if DT > 0:
        dots = tl.dot(a_tail, tl.trans(b_tail), dots, input_precision=EXACT)
    return dots


@triton.jit
def load_lse(lse, row, mask):
    """lse to base 2; infinite for a query without keys or past the last: its probabilities are 0 then."""
    lse_R = tl.load(lse + row, mask=mask, other=float("inf"))
    return tl.where(lse_R == float("-inf"), float("inf"), lse_R) * LOG2E


@triton.jit
def _attend(
    q_main, q_tail, k, v, bits, t, h, lo, hi, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """The largest logit, the sum of the others relative to it, and the weighted values.

    If GUARD, a query that selected a broken value gets NaN, and no other query does.
    """
    n = tl.arange(0, BK)
    largest, total = tl.zeros((BQ,), tl.float32) + float("-inf"), tl.zeros((BQ,), tl.float32)
    acc_QV = tl.zeros((BQ, VP), tl.float32)
    for s in tl.range(lo, hi, BK, num_stages=1 if GUARD else None):
        row = (s + n).to(tl.int64) * H + h
        k_main, k_tail = load_both(k, row * D, s + n < T, D, DM, DT)
        seen = load_bits(bits, t, S, s, T, n)
        logit_QK = product(q_main, q_tail, k_main, k_tail, DT, EXACT)
        logit_QK = tl.where(seen, logit_QK * (scale * LOG2E), float("-inf"))
        now = tl.maximum(largest, tl.max(logit_QK, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # before the first key: -inf minus -inf would be NaN
        p_QK = tl.exp2(logit_QK - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p_QK, 1)
        v_KV = load_part(v, row * V, s + n < T, V, VP)
        acc_QV = acc_QV * shrink[:, None]
        if GUARD:
            whole = tl.min(tl.where(finite(v_KV), 1, 0), 1)
            hit = tl.max(tl.where(seen & (whole == 0)[None, :], 1, 0), 1)
            acc_QV += tl.where(hit > 0, float("nan"), 0.0)[:, None]
            v_KV = tl.where(finite(v_KV), v_KV, 0.0)
        acc_QV = tl.dot(p_QK.to(v_KV.dtype), v_KV, acc_QV, input_precision=EXACT)
        largest = now
    return largest, total, acc_QV


@triton.jit(do_not_specialize=["S", "T"])
def _forward_kernel(
    q, k, v, bits, firsts, ends, out, lse, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # The last queries, which see most, come first: the programs that end alone are then short. Heads come one after
    # the other, so that only one head's keys are in the cache.
    t, h = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ + tl.arange(0, BQ), tl.program_id(1)
    _, _, lo, hi = block_range(firsts, ends, t, S, T)
    lo = lo // BK * BK
    row = t.to(tl.int64) * H + h
    q_main, q_tail = load_both(q, row * D, t < S, D, DM, DT)
    largest, total, acc_QV = _attend(
        q_main, q_tail, k, v, bits, t, h, lo, hi, S, T, scale, H, D, V, DM, DT, VP, BQ, BK, EXACT, False
    )
    if any_broken(acc_QV):
        largest, total, acc_QV = _attend(
            q_main, q_tail, k, v, bits, t, h, lo, hi, S, T, scale, H, D, V, DM, DT, VP, BQ, BK, EXACT, True
        )
    divisor = tl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    store_part(out, row * V, t < S, acc_QV / divisor[:, None], V, VP)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), largest * LN2 + tl.log(divisor)), mask=t < S)


def masked_attention(
    q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    (S, H, D), T, V = q_SHD.shape, k_THD.shape[0], v_THV.shape[2]
    out, lse = q_SHD.new_empty(S, H, V), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S == 0:
        return out, lse
    bits, firsts, ends = selection_bits(indices_SK, T, by_key=False)
    launch = launches(D, V)[0]
    _forward_kernel[(triton.cdiv(S, launch.BQ), H)](
        q_SHD.contiguous(), k_THD.contiguous(), v_THV.contiguous(), bits, firsts, ends, out, lse, S, T, scale,
        H=H, D=D, V=V, **key_parts(D), VP=padded(V), EXACT=exact(q_SHD), **asdict(launch),
    )  # fmt: skip
    return out, lse


@triton.jit
def _delta_kernel(
    dout, dlse, out, delta, rows, V: tl.constexpr, VP: tl.constexpr, BR: tl.constexpr, HAS_DLSE: tl.constexpr
):
    """delta = sum(dout * out) - dlse, a row for each query and head."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    a, b = load_part(dout, row * V, row < rows, V, VP), load_part(out, row * V, row < rows, V, VP)
    delta_R = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    if HAS_DLSE:
        delta_R -= tl.load(dlse + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(delta + row, delta_R, mask=row < rows)


@triton.jit
def _sum_dq(
    q_main, q_tail, dout_QV, lse_Q, delta_Q, k, v, bits, t, h, lo, hi, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BK)
    dmain_QD, dtail_QD = tl.zeros((BQ, DM), tl.float32), tl.zeros((BQ, DT if DT > 0 else 16), tl.float32)
    for s in tl.range(lo, hi, BK, num_stages=1 if GUARD else None):
        row = (s + n).to(tl.int64) * H + h
        k_main, k_tail = load_both(k, row * D, s + n < T, D, DM, DT)
        v_KV = load_part(v, row * V, s + n < T, V, VP)
        seen = load_bits(bits, t, S, s, T, n)
        logit_QK = product(q_main, q_tail, k_main, k_tail, DT, EXACT)
        p_QK = tl.where(seen, tl.exp2(logit_QK * (scale * LOG2E) - lse_Q[:, None]), 0.0)
        dp_QK = tl.dot(dout_QV, tl.trans(v_KV), input_precision=EXACT)
        ds_QK = p_QK * (dp_QK - delta_Q[:, None])
        if GUARD:  # a query that selected a broken key or value has NaN in ds itself
            ds_QK = tl.where(seen, ds_QK, 0.0)
            k_main, k_tail = tl.where(finite(k_main), k_main, 0.0), tl.where(finite(k_tail), k_tail, 0.0)
        ds_QK = ds_QK.to(k_main.dtype)
        dmain_QD = tl.dot(ds_QK, k_main, dmain_QD, input_precision=EXACT)
        if DT > 0:
            dtail_QD = tl.dot(ds_QK, k_tail, dtail_QD, input_precision=EXACT)
    return dmain_QD, dtail_QD


@triton.jit(do_not_specialize=["S", "T"])
def _dq_kernel(
    dout, q, k, v, bits, firsts, ends, lse, delta, dq, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    t, h = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ + tl.arange(0, BQ), tl.program_id(1)
    _, _, lo, hi = block_range(firsts, ends, t, S, T)
    lo = lo // BK * BK
    row = t.to(tl.int64) * H + h
    q_main, q_tail = load_both(q, row * D, t < S, D, DM, DT)
    dout_QV = load_part(dout, row * V, t < S, V, VP)
    lse_Q, delta_Q = load_lse(lse, row, t < S), tl.load(delta + row, mask=t < S, other=0.0)
    dmain_QD, dtail_QD = _sum_dq(
        q_main, q_tail, dout_QV, lse_Q, delta_Q, k, v, bits, t, h, lo, hi, S, T, scale,
        H, D, V, DM, DT, VP, BQ, BK, EXACT, False,
    )  # fmt: skip
    if any_broken(dmain_QD) | any_broken(dtail_QD):
        dmain_QD, dtail_QD = _sum_dq(
            q_main, q_tail, dout_QV, lse_Q, delta_Q, k, v, bits, t, h, lo, hi, S, T, scale,
            H, D, V, DM, DT, VP, BQ, BK, EXACT, True,
        )  # fmt: skip
    store_part(dq, row * D, t < S, dmain_QD * scale, D if D < DM else DM, DM)
    if DT > 0:
        store_part(dq, row * D + DM, t < S, dtail_QD * scale, D - DM, DT)


@triton.jit
def _sum_dkv(
    k_main, k_tail, v_KV, q, dout, bits, lse, delta, s, h, first, last, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, BQ)
    dmain_KD, dtail_KD = tl.zeros((BK, DM), tl.float32), tl.zeros((BK, DT if DT > 0 else 16), tl.float32)
    dv_KV = tl.zeros((BK, VP), tl.float32)
    for t in tl.range(first, last, BQ, num_stages=1 if GUARD else None):
        row = (t + n).to(tl.int64) * H + h
        q_main, q_tail = load_both(q, row * D, t + n < S, D, DM, DT)
        dout_QV = load_part(dout, row * V, t + n < S, V, VP)
        lse_Q, delta_Q = load_lse(lse, row, t + n < S), tl.load(delta + row, mask=t + n < S, other=0.0)
        seen = load_bits(bits, s, T, t, S, n)
        logit_KQ = product(k_main, k_tail, q_main, q_tail, DT, EXACT)
        p_KQ = tl.where(seen, tl.exp2(logit_KQ * (scale * LOG2E) - lse_Q[None, :]), 0.0)
        dp_KQ = tl.dot(v_KV, tl.trans(dout_QV), input_precision=EXACT)
        ds_KQ = p_KQ * (dp_KQ - delta_Q[None, :])
        if GUARD:  # a key that a broken query selected has NaN in ds itself; a broken dout shows in its delta
            ds_KQ = tl.where(seen, ds_KQ, 0.0)
            p_KQ = tl.where(seen & ~finite(delta_Q)[None, :], float("nan"), p_KQ)
            q_main, q_tail = tl.where(finite(q_main), q_main, 0.0), tl.where(finite(q_tail), q_tail, 0.0)
            dout_QV = tl.where(finite(dout_QV), dout_QV, 0.0)
        dv_KV = tl.dot(p_KQ.to(dout_QV.dtype), dout_QV, dv_KV, input_precision=EXACT)
        ds_KQ = ds_KQ.to(q_main.dtype)
        dmain_KD = tl.dot(ds_KQ, q_main, dmain_KD, input_precision=EXACT)
        if DT > 0:
            dtail_KD = tl.dot(ds_KQ, q_tail, dtail_KD, input_precision=EXACT)
    return dmain_KD, dtail_KD, dv_KV


@triton.jit(do_not_specialize=["S", "T"])
def _dkv_kernel(
    dout, q, k, v, bits, firsts, lasts, lse, delta, dk, dv, S, T, scale,
    H: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of keys, and all queries that selected any of it."""
    s, h = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1)
    first, last = tl.load(firsts + tl.program_id(0)) // BQ * BQ, tl.load(lasts + tl.program_id(0))
    row = s.to(tl.int64) * H + h
    k_main, k_tail = load_both(k, row * D, s < T, D, DM, DT)
    v_KV = load_part(v, row * V, s < T, V, VP)
    dmain_KD, dtail_KD, dv_KV = _sum_dkv(
        k_main, k_tail, v_KV, q, dout, bits, lse, delta, s, h, first, last, S, T, scale,
        H, D, V, DM, DT, VP, BQ, BK, EXACT, False,
    )  # fmt: skip
    if any_broken(dmain_KD) | any_broken(dtail_KD) | any_broken(dv_KV):
        dmain_KD, dtail_KD, dv_KV = _sum_dkv(
            k_main, k_tail, v_KV, q, dout, bits, lse, delta, s, h, first, last, S, T, scale,
            H, D, V, DM, DT, VP, BQ, BK, EXACT, True,
        )  # fmt: skip
    store_part(dk, row * D, s < T, dmain_KD * scale, D if D < DM else DM, DM)
    if DT > 0:
        store_part(dk, row * D + DM, s < T, dtail_KD * scale, D - DM, DT)
    store_part(dv, row * V, s < T, dv_KV, V, VP)


def masked_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    indices_SK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (S, H, D), T, V = q_SHD.shape, k_THD.shape[0], v_THV.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_SHD, k_THD, v_THV))
    if S == 0 or T == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    q, k, v, dout = (x.contiguous() for x in (q_SHD, k_THD, v_THV, dout_SHV.to(q_SHD.dtype)))
    dlse = dlse_SH.contiguous() if dlse_SH is not None else None
    delta, VP = torch.empty_like(lse_SH), padded(V)
    _delta_kernel[(triton.cdiv(S * H, 32),)](
        dout, dlse, out_SHV, delta, S * H, V=V, VP=VP, BR=32, HAS_DLSE=dlse is not None, num_warps=4
    )
    shape = {"H": H, "D": D, "V": V, **key_parts(D), "VP": VP, "EXACT": exact(q)}
    _, by_queries, by_keys = launches(D, V)
    bits, firsts, ends = selection_bits(indices_SK, T, by_key=False)
    _dq_kernel[(triton.cdiv(S, by_queries.BQ), H)](
        dout, q, k, v, bits, firsts, ends, lse_SH, delta, dq, S, T, scale, **shape, **asdict(by_queries)
    )
    bits, firsts, ends = selection_bits(indices_SK, T, by_key=True)
    seen_by = queries_of_tiles(firsts, ends, T, by_keys.BK)
    _dkv_kernel[(triton.cdiv(T, by_keys.BK), H)](
        dout, q, k, v, bits, *seen_by, lse_SH, delta, dk, dv, S, T, scale, **shape, **asdict(by_keys)
    )
    return dq, dk, dv
