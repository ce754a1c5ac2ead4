"""Attention over selected entries for few heads to a group, forward and backward: blocks of queries that share a union.

Legend: S queries, T key tokens, H heads, G key-value groups, M heads of a group (MP padded), K selected, D key width, V
value width (DP, VP padded). A program holds the R = B * MP rows of a block's queries and one group's heads, and walks
over tiles of BN keys of their union (`unions`), of which a row sees what its query selected.

One query has too few rows for a matrix product if a group has few heads, and gathers its entries for itself alone. A
block's rows fill the product, its entries are gathered once, and so are its sums for the entries' gradients added.

Zero times NaN is NaN: as in `masked`, a program whose sums come out broken walks once more, guarded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.attention import LN2, LOG2E, add_part, load_part, store_part, widths
from tokensieve.ops.triton.in_order import add_in_order, wanted_in_order
from tokensieve.ops.triton.index import exact, padded
from tokensieve.ops.triton.limits import is_hopper
from tokensieve.ops.triton.masked import any_broken, finite, load_lse
from tokensieve.ops.triton.unions import WIDE, Unions, strips, unions

ROWS = 128  # of a wide block
NARROW = 16  # rows of a narrow one: as few as a matrix product takes
WIDEST = 128  # keys and values whose sums the registers of a program hold

# Of wide blocks, and of narrow ones: keys of a tile, warps and stages (docs/kernels.md).
FORWARD = ({"BN": 128, "num_warps": 8, "num_stages": 2}, {"BN": 64, "num_warps": 4, "num_stages": 2})
# TILES: tiles for which a program sums, one after the other.
MASS = (
    {"BN": 128, "TILES": 8, "num_warps": 8, "num_stages": 2},
    {"BN": 64, "TILES": 8, "num_warps": 4, "num_stages": 2},
)
BACKWARD = ({"BN": 64, "num_warps": 8, "num_stages": 1}, {"BN": 64, "num_warps": 4, "num_stages": 1})


def pays(q_SHD: Tensor, kv_TGE: Tensor, d_k: int, v_start: int, d_v: int) -> bool:
    """Whether blocks are better than one query a program: few heads to a group, no wide entries, Hopper's memory."""
    if not (q_SHD.is_cpu or is_hopper(q_SHD.device)) or widths(d_k, v_start, d_v)["SHARED"]:
        return False
    return max(d_k, d_v) <= WIDEST and q_SHD.shape[1] // kv_TGE.shape[1] <= ROWS // 4


def heads_padded(H: int, G: int) -> int:
    return triton.next_power_of_2(H // G)


def levels(indices_SK: Tensor, T: int, MP: int) -> list[Unions]:
    return unions(indices_SK, T, min(WIDE, ROWS // MP), max(1, NARROW // MP))


def shape_of(q_SHD: Tensor, kv_TGE: Tensor, d_k: int, v_start: int, d_v: int) -> dict[str, Any]:
    (_, H, _), (_, G, E) = q_SHD.shape, kv_TGE.shape
    parts = {"D": d_k, "V": d_v, "DP": padded(d_k), "VP": padded(d_v), "v_start": v_start}
    return {"H": H, "G": G, "E": E, "MP": heads_padded(H, G), **parts, "EXACT": exact(q_SHD)}


def launch(u: Unions, MP: int, settings: tuple[dict[str, int], dict[str, int]]) -> dict[str, int]:
    """C, B, R, and how a kernel of this level is launched."""
    R = max(NARROW, u.B * MP)
    return {"C": u.C, "B": u.B, "R": R, **settings[R < ROWS // 2]}


@triton.jit
def block_rows(block, g, S, H: tl.constexpr, G: tl.constexpr, MP: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """Of each row: its query within the block, its place among all queries' heads, and whether it is one."""
    r = tl.arange(0, R)
    M: tl.constexpr = H // G
    b, m = r // MP, r % MP
    t = block * B + b
    return b, t.to(tl.int64) * H + g * M + m, (b < B) & (m < M) & (t < S)


@triton.jit
def load_keys(keys, place, live):
    """Keys of a block's list (int64), 0 past its end."""
    return tl.load(keys + place, mask=live, other=0).to(tl.int64)


@triton.jit
def load_union(keys, marks, place, live):
    """Keys of a block's list, and their marks, which are 0 past its end."""
    return load_keys(keys, place, live), tl.load(marks + place, mask=live, other=0)


@triton.jit
def _attend(
    q_RD, kv, keys, marks, b, base, count, g, scale,
    G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    v_start: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """The largest logit to base 2, the sum of the others relative to it, and the weighted values.

    If GUARD, a query that selected a broken value gets NaN, and no other query does.
    """
    n = tl.arange(0, BN)
    largest, total = tl.zeros((R,), tl.float32) + float("-inf"), tl.zeros((R,), tl.float32)
    acc_RV = tl.zeros((R, VP), tl.float32)
    for s in tl.range(0, count, BN, num_stages=1 if GUARD else None):
        live = s + n < count
        key, mark = load_union(keys, marks, base + s + n, live)
        row = (key * G + g) * E
        k_ND = load_part(kv, row, live, D, DP)
        seen = ((mark[None, :] >> b[:, None]) & 1) != 0
        logit_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
        logit_RN = tl.where(seen, logit_RN * (scale * LOG2E), float("-inf"))
        now = tl.maximum(largest, tl.max(logit_RN, 1))
        relative = tl.where(now == float("-inf"), 0.0, now)  # before the first key: -inf minus -inf would be NaN
        p_RN = tl.exp2(logit_RN - relative[:, None])
        shrink = tl.exp2(largest - relative)
        total = total * shrink + tl.sum(p_RN, 1)
        v_NV = load_part(kv, row + v_start, live, V, VP)
        acc_RV = acc_RV * shrink[:, None]
        if GUARD:
            whole = tl.min(tl.where(finite(v_NV), 1, 0), 1)
            hit = tl.max(tl.where(seen & (whole == 0)[None, :], 1, 0), 1)
            acc_RV += tl.where(hit > 0, float("nan"), 0.0)[:, None]
            v_NV = tl.where(finite(v_NV), v_NV, 0.0)
        acc_RV = tl.dot(p_RN.to(v_NV.dtype), v_NV, acc_RV, input_precision=EXACT)
        largest = now
    return largest, total, acc_RV


@triton.jit(do_not_specialize=["S", "C"])
def _forward_kernel(
    q, kv, keys, marks, counts, out, lse, S, C, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, v_start: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    block, g = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + block)
    if count < 0:
        return
    b, row, mine = block_rows(block, g, S, H, G, MP, B, R)
    q_RD, base = load_part(q, row * D, mine, D, DP), block.to(tl.int64) * C
    largest, total, acc_RV = _attend(
        q_RD, kv, keys, marks, b, base, count, g, scale, G, E, D, V, DP, VP, v_start, R, BN, EXACT, False
    )
    if any_broken(acc_RV):
        largest, total, acc_RV = _attend(
            q_RD, kv, keys, marks, b, base, count, g, scale, G, E, D, V, DP, VP, v_start, R, BN, EXACT, True
        )
    divisor = tl.where(total == 0, 1.0, total)  # a query without keys divides by 1; NaN stays
    store_part(out, row * V, mine, acc_RV / divisor[:, None], V, VP)
    tl.store(lse + row, tl.where(total == 0, float("-inf"), largest * LN2 + tl.log(divisor)), mask=mine)


def forward(
    levels: list[Unions], q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, scale: float, shape: dict[str, Any]
) -> None:
    """Writes out and lse of the queries of these blocks. Everything contiguous."""
    for u in levels:
        _forward_kernel[(len(u), shape["G"])](
            q, kv, u.keys, u.marks, u.counts, out, lse, q.shape[0], scale=scale,
            **shape, **launch(u, shape["MP"], FORWARD),
        )  # fmt: skip


@triton.jit(do_not_specialize=["S", "C"])
def _mass_kernel(
    q, kv, lse, keys, marks, counts, mass, S, C, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, v_start: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    EXACT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The attention's probabilities summed over all heads, for TILES tiles of BN keys of a block's list.

    0 if a query lacks a key. One loop goes over tiles and groups, so that the entries of the next are on their way.
    Groups are summed row by row, and the rows of a query only then: that sum needs other threads.
    """
    block, n, first = tl.program_id(0), tl.arange(0, BN), tl.program_id(1) * (TILES * BN)
    count = tl.load(counts + block)
    if first >= count:
        return
    QB: tl.constexpr = R // MP
    query, base = tl.arange(0, QB), block.to(tl.int64) * C
    sum_RN = tl.zeros((R, BN), tl.float32)
    for i in range(tl.cdiv(tl.minimum(count - first, TILES * BN), BN) * G):
        g, s = i % G, first + i // G * BN + n
        live = s < count
        key = load_keys(keys, base + s, live)
        _, row, mine = block_rows(block, g, S, H, G, MP, B, R)
        q_RD = load_part(q, row * D, mine, D, DP)
        k_ND = load_part(kv, (key * G + g) * E, live, D, DP)
        logit_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
        sum_RN += tl.exp2(logit_RN * (scale * LOG2E) - load_lse(lse, row, mine)[:, None])
        if g == G - 1:
            mark = tl.load(marks + base + s, mask=live, other=0)
            mass_BN = tl.sum(tl.reshape(sum_RN, (QB, MP, BN)), 1)
            seen = ((mark[None, :] >> query[:, None]) & 1) != 0
            place = (block.to(tl.int64) * B + query[:, None]) * C + s[None, :]
            tl.store(mass + place, tl.where(seen, mass_BN, 0.0), mask=(query < B)[:, None] & live[None, :])
            sum_RN = tl.zeros((R, BN), tl.float32)


def head_mass(u: Unions, q: Tensor, kv: Tensor, lse: Tensor, scale: float, shape: dict[str, Any]) -> Tensor:
    """(blocks, B, C) float32: the probabilities summed over all heads. What lies past a count is not defined."""
    mass = torch.empty(len(u), u.B, u.C, dtype=torch.float32, device=q.device)
    settings = launch(u, shape["MP"], MASS)
    _mass_kernel[(len(u), triton.cdiv(u.C, settings["TILES"] * settings["BN"]))](
        q, kv, lse, u.keys, u.marks, u.counts, mass, q.shape[0], scale=scale, **shape, **settings
    )
    return mass


@triton.jit
def _sum_gradients(
    q_RD, dout_RV, lse_R, delta_R, kv, dkv, keys, marks, b, base, count, g, scale,
    G: tl.constexpr, E: tl.constexpr, D: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr,
    v_start: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
    IN_ORDER: tl.constexpr, GUARD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dq / scale; if ADD, the gradients of the entries are added to theirs."""
    n = tl.arange(0, BN)
    dq_RD = tl.zeros((R, DP), tl.float32)
    for s in tl.range(0, count, BN, num_stages=1 if GUARD else None):
        live = s + n < count
        key, mark = load_union(keys, marks, base + s + n, live)
        row = (key * G + g) * E
        k_ND, v_NV = load_part(kv, row, live, D, DP), load_part(kv, row + v_start, live, V, VP)
        seen = ((mark[None, :] >> b[:, None]) & 1) != 0
        logit_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
        p_RN = tl.where(seen, tl.exp2(logit_RN * (scale * LOG2E) - lse_R[:, None]), 0.0)
        dp_RN = tl.dot(dout_RV, tl.trans(v_NV), input_precision=EXACT)
        # A product that overflows, or a broken gradient of lse, must not reach a key that its query did not select.
        ds_RN = tl.where(seen, p_RN * (dp_RN - delta_R[:, None]), 0.0)
        if GUARD:  # a query that selected a broken key or value has NaN in ds itself
            p_RN = tl.where(seen & ~finite(delta_R)[:, None], float("nan"), p_RN)  # of a broken dout
            k_ND = tl.where(finite(k_ND), k_ND, 0.0)
        ds_RN = ds_RN.to(k_ND.dtype)
        dq_RD = tl.dot(ds_RN, k_ND, dq_RD, input_precision=EXACT)
        if ADD:
            if IN_ORDER:  # every place has its own row
                row = ((base + s + n) * G + g) * E
            q_sum, dout_sum = q_RD, dout_RV
            if GUARD:
                q_sum = tl.where(finite(q_RD), q_RD, 0.0)
                dout_sum = tl.where(finite(dout_RV), dout_RV, 0.0)
            dk_ND = tl.dot(tl.trans(ds_RN), q_sum, input_precision=EXACT)
            add_part(dkv, row, live, dk_ND * scale, D, DP)
            dv_NV = tl.dot(tl.trans(p_RN.to(k_ND.dtype)), dout_sum, input_precision=EXACT)
            add_part(dkv, row + v_start, live, dv_NV, V, VP)
    return dq_RD


@triton.jit(do_not_specialize=["S", "C"])
def _backward_kernel(
    dout, dlse, out, lse, q, kv, dq, dkv, keys, marks, counts, S, C, scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MP: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DP: tl.constexpr, VP: tl.constexpr, v_start: tl.constexpr, B: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    EXACT: tl.constexpr, HAS_DLSE: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    block, g = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + block)
    if count < 0:
        return
    b, row, mine = block_rows(block, g, S, H, G, MP, B, R)
    q_RD, dout_RV = load_part(q, row * D, mine, D, DP), load_part(dout, row * V, mine, V, VP)
    out_RV, base = load_part(out, row * V, mine, V, VP), block.to(tl.int64) * C
    delta_R = tl.sum(dout_RV.to(tl.float32) * out_RV.to(tl.float32), 1)
    if HAS_DLSE:
        delta_R -= tl.load(dlse + row, mask=mine, other=0.0).to(tl.float32)
    lse_R = load_lse(lse, row, mine)
    # A broken value shows in out, a broken query in q. An infinite key may show in dq only.
    if any_broken(q_RD) | any_broken(dout_RV) | any_broken(out_RV):
        dq_RD = _sum_gradients(
            q_RD, dout_RV, lse_R, delta_R, kv, dkv, keys, marks, b, base, count, g, scale,
            G, E, D, V, DP, VP, v_start, R, BN, EXACT, IN_ORDER, True, True,
        )  # fmt: skip
    else:
        dq_RD = _sum_gradients(
            q_RD, dout_RV, lse_R, delta_R, kv, dkv, keys, marks, b, base, count, g, scale,
            G, E, D, V, DP, VP, v_start, R, BN, EXACT, IN_ORDER, False, True,
        )  # fmt: skip
        if any_broken(dq_RD):
            dq_RD = _sum_gradients(
                q_RD, dout_RV, lse_R, delta_R, kv, dkv, keys, marks, b, base, count, g, scale,
                G, E, D, V, DP, VP, v_start, R, BN, EXACT, IN_ORDER, True, False,
            )  # fmt: skip
    store_part(dq, row * D, mine, dq_RD * scale, D, DP)


def bytes_in_order(K: int, kv: Tensor) -> int:
    """Bytes that a query's sums take in the deterministic mode."""
    return 4 * K * kv.shape[1] * kv.shape[2] if wanted_in_order() else 0


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
    in_order, (T, G, E) = wanted_in_order(), kv.shape
    for u in levels:
        sums = torch.zeros(len(u) * u.C, G * E, dtype=torch.float32, device=q.device) if in_order else dkv
        _backward_kernel[(len(u), G)](
            dout, dlse, out, lse, q, kv, dq, sums, u.keys, u.marks, u.counts, q.shape[0], scale=scale,
            **shape, **launch(u, shape["MP"], BACKWARD), HAS_DLSE=dlse is not None, IN_ORDER=in_order,
        )  # fmt: skip
        if in_order:
            add_in_order(dkv.view(T, G * E), u.named(), sums)


@dataclass(frozen=True)
class Kernels:
    """What takes the blocks: functions with the arguments of `forward` and `backward`."""

    forward: Callable[..., None]
    backward: Callable[..., None]


PORTABLE = Kernels(forward, backward)


def sparse_attention(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    *,
    kernels: Kernels = PORTABLE,
) -> tuple[Tensor, Tensor]:
    (S, H, _), T, K = q_SHD.shape, kv_TGE.shape[0], indices_SK.shape[1]
    out, lse = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=torch.float32)
    q, kv, indices = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK))
    shape = shape_of(q, kv, d_k, v_start, d_v)
    for part in strips(S, T, K):
        kernels.forward(levels(indices[part], T, shape["MP"]), q[part], kv, out[part], lse[part], scale, shape)
    return out, lse


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
    *,
    kernels: Kernels = PORTABLE,
) -> tuple[Tensor, Tensor]:
    (S, T), K = (q_SHD.shape[0], kv_TGE.shape[0]), indices_SK.shape[1]
    dq, dkv = q_SHD.new_empty(q_SHD.shape), torch.zeros(kv_TGE.shape, dtype=torch.float32, device=q_SHD.device)
    q, kv, indices, dout = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, dout_SHV.to(q_SHD.dtype)))
    out, lse = out_SHV.contiguous(), lse_SH.contiguous()
    dlse, shape = None if dlse_SH is None else dlse_SH.contiguous(), shape_of(q, kv, d_k, v_start, d_v)
    for part in strips(S, T, K, others=bytes_in_order(K, kv)):
        kernels.backward(
            levels(indices[part], T, shape["MP"]), dout[part], None if dlse is None else dlse[part], out[part],
            lse[part], q[part], kv, dq[part], dkv, scale, shape,
        )  # fmt: skip
    return dq, dkv.to(kv_TGE.dtype)
