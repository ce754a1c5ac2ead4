"""Attention over selected entries in Triton, forward and backward.

Legend: S queries, T key tokens, H heads, G key-value groups, M heads of a group, K selected, E entry width, V value
width. A program holds one query: BH of a group's heads x tiles of BN selected entries. An entry's key is cut into a
main part, a power of two wide (DM), and a tail (DT): 576 = 512 + 64. Under MLA the main part is the value too and is
loaded once.

Logits are taken to base 2, so that exp2 needs no further product. Places beyond the last used one are never read. T is
only compared: kernels are not compiled again when it grows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.in_order import add_in_order, strips, wanted_in_order
from tokensieve.ops.triton.index import exact, padded

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN2: tl.constexpr = tl.constexpr(math.log(2))


def key_parts(d_k: int) -> dict[str, int]:
    """DM, DT: widths of a key's main part, the largest power of two that fits, and of its tail (0: none), padded."""
    DM = max(16, triton.next_power_of_2(d_k + 1) // 2)
    return {"DM": DM, "DT": padded(d_k - DM) if d_k > DM else 0}


def widths(d_k: int, v_start: int, d_v: int) -> dict[str, int | bool]:
    """The key's parts, VP: the value, padded; SHARED: the value is the key's main part."""
    parts = key_parts(d_k)
    return {**parts, "VP": padded(d_v), "SHARED": v_start == 0 and d_v == parts["DM"] and d_k >= d_v}


def head_block(M: int) -> int:
    return min(64, padded(M))


@triton.jit
def load_index(indices, place, K, T):
    """The keys that places of a row name, -1 for none or one past the T keys: nothing else checks that on a GPU."""
    index = tl.load(indices + place, mask=place < K, other=-1)
    return tl.where(index < T, index, -1)


@triton.jit
def used_places(indices, K, KP: tl.constexpr):
    """One more than the last place of a row that names a key."""
    at = tl.arange(0, KP)
    index = tl.load(indices + at, mask=at < K, other=-1)
    return tl.max(tl.where(index >= 0, at + 1, 0))


@triton.jit
def load_part(x, row, mask, width: tl.constexpr, W: tl.constexpr):
    """The first `width` values from each offset `row` on, padded with zeros to W; zeros if `mask` is off."""
    w = tl.arange(0, W)
    return tl.load(x + row[:, None] + w[None, :], mask=mask[:, None] & (w < width)[None, :], other=0.0)


@triton.jit
def store_part(x, row, mask, value, width: tl.constexpr, W: tl.constexpr):
    w = tl.arange(0, W)
    tl.store(x + row[:, None] + w[None, :], value, mask=mask[:, None] & (w < width)[None, :])


@triton.jit
def add_part(x, row, mask, value, width: tl.constexpr, W: tl.constexpr):
    w = tl.arange(0, W)
    tl.atomic_add(x + row[:, None] + w[None, :], value, mask=mask[:, None] & (w < width)[None, :], sem="relaxed")


@triton.jit
def load_entry(
    kv, index, g, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Main part, tail and value of the entries that `index` names, of group g; zeros if it names none."""
    live = index >= 0
    row = (index.to(tl.int64) * G + g) * E
    main = load_part(kv, row, live, d_k if d_k < DM else DM, DM)
    tail = load_part(kv, row + DM, live, d_k - DM, DT) if DT > 0 else main
    value = main if SHARED else load_part(kv, row + v_start, live, d_v, VP)
    return main, tail, value


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    q, kv, indices, out, lse, T, K, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
    KP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = H // G
    blocks: tl.constexpr = (M + BH - 1) // BH
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * BH + tl.arange(0, BH)
    mine, n = head < M, tl.arange(0, BN)
    row = t * H + g * M + head
    q_main = load_part(q, row * d_k, mine, d_k if d_k < DM else DM, DM)
    q_tail = load_part(q, row * d_k + DM, mine, d_k - DM, DT) if DT > 0 else q_main
    largest = tl.zeros((BH,), tl.float32) + float("-inf")
    total = tl.zeros((BH,), tl.float32)
    acc_HV = tl.zeros((BH, VP), tl.float32)
    indices += t * K
    for first in range(0, used_places(indices, K, KP), BN):
        index = load_index(indices, first + n, K, T)
        main, tail, value = load_entry(kv, index, g, G, E, d_k, v_start, d_v, DM, DT, VP, SHARED)
        logit_HN = tl.dot(q_main, tl.trans(main), input_precision=EXACT)
        if DT > 0:
            logit_HN = tl.dot(q_tail, tl.trans(tail), logit_HN, input_precision=EXACT)
        logit_HN = tl.where((index >= 0)[None, :], logit_HN * (scale * LOG2E), float("-inf"))
        now = tl.maximum(largest, tl.max(logit_HN, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # before the first key: -inf minus -inf would be NaN
        p_HN = tl.exp2(logit_HN - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p_HN, 1)
        acc_HV = tl.dot(p_HN.to(value.dtype), value, acc_HV * shrink[:, None], input_precision=EXACT)
        largest = now
    divisor = tl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    out_HV = acc_HV / divisor[:, None]
    store_part(out, row * d_v, mine, out_HV, d_v, VP)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), largest * LN2 + tl.log(divisor)), mask=mine)


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    (S, H, _), (T, G, E), K = q_SHD.shape, kv_TGE.shape, indices_SK.shape[1]
    out, lse = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=torch.float32)
    if S == 0:
        return out, lse
    BH = head_block(H // G)
    _forward_kernel[(S, G * triton.cdiv(H // G, BH))](
        q_SHD.contiguous(), kv_TGE.contiguous(), indices_SK.contiguous(), out, lse, T, K, scale,
        H=H, G=G, E=E, d_k=d_k, v_start=v_start, d_v=d_v, **widths(d_k, v_start, d_v),
        KP=padded(K), BH=BH, BN=64, EXACT=exact(q_SHD), num_warps=8 if d_v > 128 else 4, num_stages=2,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["T"])
def _dq_kernel(
    dout, dlse, q, kv, indices, out, lse, dq, delta, mass, T, K, scale, S,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
    KP: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    HAS_DLSE: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """dq, delta = sum(dout * out) - dlse, and if MASS the probabilities summed over this block's heads, for (4)."""
    M: tl.constexpr = H // G
    blocks: tl.constexpr = (M + BH - 1) // BH
    t, g = tl.program_id(0).to(tl.int64), tl.program_id(1) // blocks
    head = tl.program_id(1) % blocks * BH + tl.arange(0, BH)
    mine, n = head < M, tl.arange(0, BN)
    row = t * H + g * M + head
    q_main = load_part(q, row * d_k, mine, d_k if d_k < DM else DM, DM)
    q_tail = load_part(q, row * d_k + DM, mine, d_k - DM, DT) if DT > 0 else q_main
    delta_H = tl.zeros((BH,), tl.float32)
    for begin in tl.static_range(0, VP, 16):  # narrow pieces: registers are what this kernel is short of
        piece = row * d_v + begin
        a, b = load_part(dout, piece, mine, d_v - begin, 16), load_part(out, piece, mine, d_v - begin, 16)
        delta_H += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    dout_HV = load_part(dout, row * d_v, mine, d_v, VP)
    if HAS_DLSE:
        delta_H -= tl.load(dlse + row, mask=mine, other=0.0).to(tl.float32)
    tl.store(delta + row, delta_H, mask=mine)
    # a row past the last head, or without keys, gets probability 0 everywhere
    lse_H = tl.load(lse + row, mask=mine, other=float("inf"))
    lse_H = tl.where(lse_H == float("-inf"), float("inf"), lse_H) * LOG2E
    dmain_HD = tl.zeros((BH, DM), tl.float32)
    dtail_HD = tl.zeros((BH, DT if DT > 0 else 16), tl.float32)
    indices += t * K
    for first in range(0, used_places(indices, K, KP), BN):
        index = load_index(indices, first + n, K, T)
        main, tail, value = load_entry(kv, index, g, G, E, d_k, v_start, d_v, DM, DT, VP, SHARED)
        logit_HN = tl.dot(q_main, tl.trans(main), input_precision=EXACT)
        if DT > 0:
            logit_HN = tl.dot(q_tail, tl.trans(tail), logit_HN, input_precision=EXACT)
        p_HN = tl.exp2(logit_HN * (scale * LOG2E) - lse_H[:, None])
        p_HN = tl.where((index >= 0)[None, :], p_HN, 0.0)
        if MASS:
            place = mass + (tl.program_id(1).to(tl.int64) * S + t) * K + first + n
            tl.store(place, tl.sum(p_HN, 0), mask=first + n < K)
        dp_HN = tl.dot(dout_HV, tl.trans(value), input_precision=EXACT)
        ds_HN = (p_HN * (dp_HN - delta_H[:, None])).to(main.dtype)
        dmain_HD = tl.dot(ds_HN, main, dmain_HD, input_precision=EXACT)
        if DT > 0:
            dtail_HD = tl.dot(ds_HN, tail, dtail_HD, input_precision=EXACT)
    store_part(dq, row * d_k, mine, dmain_HD * scale, d_k if d_k < DM else DM, DM)
    if DT > 0:
        store_part(dq, row * d_k + DM, mine, dtail_HD * scale, d_k - DM, DT)


@triton.jit(do_not_specialize=["T"])
def _dkv_kernel(
    dout, q, kv, indices, lse, delta, dkv, T, K, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, d_k: tl.constexpr, v_start: tl.constexpr, d_v: tl.constexpr,
    DM: tl.constexpr, DT: tl.constexpr, VP: tl.constexpr, SHARED: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Adds one query's part of the gradient of one tile of its entries.

    It is summed over all heads first: atomic adds are what is expensive.
    """
    M: tl.constexpr = H // G
    tiles, n = (K + BN - 1) // BN, tl.arange(0, BN)
    t = (tl.program_id(0) // tiles).to(tl.int64)
    first, g = tl.program_id(0) % tiles * BN, tl.program_id(1)
    index = load_index(indices + t * K, first + n, K, T)
    live = index >= 0
    if tl.max(index) >= 0:
        main, tail, value = load_entry(kv, index, g, G, E, d_k, v_start, d_v, DM, DT, VP, SHARED)
        dmain_ND = tl.zeros((BN, DM), tl.float32)
        dtail_ND = tl.zeros((BN, DT if DT > 0 else 16), tl.float32)
        dvalue_NV = tl.zeros((BN, 16 if SHARED else VP), tl.float32)
        for begin in range(0, M, BH):
            head = begin + tl.arange(0, BH)
            mine = head < M
            row = t * H + g * M + head
            q_main = load_part(q, row * d_k, mine, d_k if d_k < DM else DM, DM)
            dout_HV = load_part(dout, row * d_v, mine, d_v, VP)
            logit_HN = tl.dot(q_main, tl.trans(main), input_precision=EXACT)
            if DT > 0:
                q_tail = load_part(q, row * d_k + DM, mine, d_k - DM, DT)
                logit_HN = tl.dot(q_tail, tl.trans(tail), logit_HN, input_precision=EXACT)
            # a row past the last head, or without keys, gets probability 0 everywhere
            lse_H = tl.load(lse + row, mask=mine, other=float("inf"))
            lse_H = tl.where(lse_H == float("-inf"), float("inf"), lse_H) * LOG2E
            p_HN = tl.where(live[None, :], tl.exp2(logit_HN * (scale * LOG2E) - lse_H[:, None]), 0.0)
            dp_HN = tl.dot(dout_HV, tl.trans(value), input_precision=EXACT)
            delta_H = tl.load(delta + row, mask=mine, other=0.0)
            ds_NH = tl.trans((p_HN * (dp_HN - delta_H[:, None]) * scale).to(main.dtype))
            p_NH = tl.trans(p_HN.to(main.dtype))
            dmain_ND = tl.dot(ds_NH, q_main, dmain_ND, input_precision=EXACT)
            if SHARED:
                dmain_ND = tl.dot(p_NH, dout_HV, dmain_ND, input_precision=EXACT)
            else:
                dvalue_NV = tl.dot(p_NH, dout_HV, dvalue_NV, input_precision=EXACT)
            if DT > 0:
                dtail_ND = tl.dot(ds_NH, q_tail, dtail_ND, input_precision=EXACT)
        row_N = (index.to(tl.int64) * G + g) * E
        if IN_ORDER:  # every place has its own row
            row_N = ((t * K + first + n) * G + g) * E
        add_part(dkv, row_N, live, dmain_ND, d_k if d_k < DM else DM, DM)
        if DT > 0:
            add_part(dkv, row_N + DM, live, dtail_ND, d_k - DM, DT)
        if not SHARED:
            add_part(dkv, row_N + v_start, live, dvalue_NV, d_v, VP)


def backward_with_mass(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    with_mass: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dq, dkv, and with `with_mass` the probabilities summed over heads (S, K).

    Those are unspecified past a row's last used place.
    """
    (S, H, _), (T, G, E), K = q_SHD.shape, kv_TGE.shape, indices_SK.shape[1]
    dq = q_SHD.new_empty(q_SHD.shape)
    dkv = torch.zeros(kv_TGE.shape, dtype=torch.float32, device=q_SHD.device)
    BH = head_block(H // G)
    blocks = G * triton.cdiv(H // G, BH)
    mass = torch.empty(blocks if with_mass else 0, S, K, dtype=torch.float32, device=q_SHD.device)
    if S > 0:
        delta = torch.empty_like(lse_SH)
        q, kv, indices, dout = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, dout_SHV.to(q_SHD.dtype)))
        dlse = dlse_SH.contiguous() if dlse_SH is not None else None
        shape = {"H": H, "G": G, "E": E, "d_k": d_k, "v_start": v_start, "d_v": d_v} | widths(d_k, v_start, d_v)
        _dq_kernel[(S, blocks)](
            dout, dlse, q, kv, indices, out_SHV, lse_SH, dq, delta, mass, T, K, scale, S,
            **shape, KP=padded(K), BH=BH, BN=64, HAS_DLSE=dlse is not None, MASS=with_mass,
            EXACT=exact(q_SHD), num_warps=8 if d_v > 128 else 4, num_stages=1,
        )  # fmt: skip
        in_order = wanted_in_order()
        for part in strips(S, K * G * E * 4) if in_order else (slice(0, S),):
            s = part.stop - part.start
            sums = torch.zeros(s * K, G * E, dtype=torch.float32, device=q.device) if in_order else dkv
            _dkv_kernel[(s * triton.cdiv(K, 32), G)](
                dout[part], q[part], kv, indices[part], lse_SH[part], delta[part], sums, T, K, scale,
                **shape, BH=min(BH, 32), BN=32, EXACT=exact(q_SHD), IN_ORDER=in_order, num_warps=4, num_stages=2,
            )  # fmt: skip
            if in_order:
                add_in_order(dkv.view(T, G * E), indices[part], sums)
    return dq, dkv.to(kv_TGE.dtype), mass.sum(0) if with_mass else None


def sparse_attention_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    dq, dkv, _ = backward_with_mass(
        dout_SHV, dlse_SH, out_SHV, lse_SH, q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v, with_mass=False
    )
    return dq, dkv
