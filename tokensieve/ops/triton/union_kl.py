"""Attention over selected entries with the indexer's loss, equation (4), on blocks of queries that share a union.

Legend: S queries, T key tokens, K selected; index heads I (HP padded), D index width (DP padded); B queries of a block,
of which BQ share a matrix product of BQ * HP rows; C places of a block's list, of which a product takes BN.

Target, scores and their gradients lie as the lists do: (blocks, B, C) float32. Only places that a query selected are
read there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton import union_attention
from tokensieve.ops.triton.in_order import add_in_order, wanted_in_order
from tokensieve.ops.triton.index import exact, load_rows, padded, relu
from tokensieve.ops.triton.masked import finite
from tokensieve.ops.triton.union_attention import PORTABLE, Kernels, load_keys
from tokensieve.ops.triton.unions import FIT, Unions, strips

# Rows of a program at most; keys of a product, products that a program makes of other keys, warps and stages.
SCORES_ROWS, SCORES = 128, {"BN": 64, "TILES": 32, "num_warps": 4, "num_stages": 3}
GRADIENTS_ROWS, GRADIENTS = 128, {"BN": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _index_rows(q, w, first, last, H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr,
                BQ: tl.constexpr):  # fmt: skip
    """Rows (BQ * HP, D) and weights of the index queries from `first` on, before `last`; where each lies; which are."""
    r = tl.arange(0, BQ * HP)
    t, head = first + r // HP, r % HP
    real = (t < last) & (head < H)
    row = t.to(tl.int64) * H + head
    q_RD = load_rows(q, row, real, tl.arange(0, DP), D)
    return q_RD, tl.load(w + row, mask=real, other=0.0).to(tl.float32), row, real


@triton.jit
def _place(block, b, n, B: tl.constexpr, C):
    return (block.to(tl.int64) * B + b[:, None]) * C + n[None, :]


@triton.jit(do_not_specialize=["S", "C"])
def _scores_kernel(
    q, k, w, keys, counts, scores, S, C,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, BQ: tl.constexpr,
    BN: tl.constexpr, EXACT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Equation (1) of BQ queries of a block with TILES tiles of BN keys of its list."""
    parts: tl.constexpr = (B + BQ - 1) // BQ
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n, begin = tl.arange(0, BN), tl.program_id(1) * (TILES * BN)
    count, first = tl.load(counts + block), block * B + part * BQ
    if begin >= count:
        return
    q_RD, w_R, _row, _real = _index_rows(q, w, first, tl.minimum(block * B + B, S), H, D, HP, DP, BQ)
    b, base = part * BQ + tl.arange(0, BQ), block.to(tl.int64) * C
    for s in range(begin, tl.minimum(count, begin + TILES * BN), BN):
        key = load_keys(keys, base + s + n, s + n < count)
        k_ND = load_rows(k, key, s + n < count, tl.arange(0, DP), D)
        # Keys are the rows: the sum over heads then stays within a thread, except for its last steps.
        dots_NR = tl.dot(k_ND, tl.trans(q_RD), input_precision=EXACT)
        score_NQ = tl.sum(tl.reshape(relu(dots_NR) * w_R[None, :], (BN, BQ, HP)), 2)
        place = (block.to(tl.int64) * B + b[None, :]) * C + (s + n)[:, None]
        tl.store(scores + place, score_NQ, mask=(b < B)[None, :] & (s + n < count)[:, None])


@triton.jit(do_not_specialize=["C"])
def _kl_kernel(
    mass, scores, marks, counts, weight, kl, C, heads, B: tl.constexpr, BN: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """One query: kl = KL(p || softmax(score)). If WEIGHTED, weight * d kl / d score instead, in the scores' place."""
    t, n = tl.program_id(0), tl.arange(0, BN)
    block, b = t // B, t % B
    count = tl.load(counts + block)
    if count < 0:
        return
    row = (block.to(tl.int64) * B + b) * C
    largest, total = tl.zeros((BN,), tl.float32) + float("-inf"), tl.zeros((BN,), tl.float32)
    p_sum = tl.zeros((BN,), tl.float32)
    for s in range(0, count, BN):
        mark = tl.load(marks + block.to(tl.int64) * C + s + n, mask=s + n < count, other=0)
        seen = ((mark >> b) & 1) != 0
        score = tl.load(scores + row + s + n, mask=seen, other=float("-inf"))
        now = tl.maximum(largest, score, propagate_nan=tl.PropagateNan.ALL)
        relative = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(largest - relative) + tl.exp(score - relative)
        p_sum += tl.load(mass + row + s + n, mask=seen, other=0.0) / heads
        largest = now
    highest = tl.max(tl.where(finite(largest) | (largest == float("-inf")), largest, float("inf")))
    broken = highest == float("inf")
    highest = tl.where((highest == float("-inf")) | broken, 0.0, highest)
    sum = tl.sum(total * tl.exp(largest - highest))
    sum = tl.where(broken, float("nan"), tl.where(sum > 0, sum, 1.0))
    lse, p_total = highest + tl.log(sum), tl.sum(p_sum)
    by = tl.load(weight + t).to(tl.float32) if WEIGHTED else 1.0
    found = tl.zeros((BN,), tl.float32)
    for s in range(0, count, BN):
        mark = tl.load(marks + block.to(tl.int64) * C + s + n, mask=s + n < count, other=0)
        seen = ((mark >> b) & 1) != 0
        score = tl.load(scores + row + s + n, mask=seen, other=0.0)
        p = tl.load(mass + row + s + n, mask=seen, other=0.0) / heads
        if WEIGHTED:
            d = (tl.exp(score - lse) * p_total - p) * by
            tl.store(scores + row + s + n, tl.where(seen, d, 0.0), mask=s + n < count)
        else:
            found += tl.where(seen, p * (tl.log(tl.where(p > 0, p, 1.0)) - score + lse), 0.0)
    if not WEIGHTED:
        tl.store(kl + t, tl.sum(found))


@triton.jit
def _opened(q_RD, k_ND, slopes, block, b, n, count, C, HP: tl.constexpr, B: tl.constexpr, BQ: tl.constexpr,
            BN: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The score's gradient g of each row's query where the row's product is above 0. A NaN passes."""
    dots_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
    g_QN = tl.load(slopes + _place(block, b, n, B, C), mask=(b < B)[:, None] & (n < count)[None, :], other=0.0)
    g_RN = tl.reshape(tl.broadcast_to(g_QN[:, None, :], (BQ, HP, BN)), (BQ * HP, BN))
    return tl.where(dots_RN <= 0, 0.0, g_RN)


@triton.jit(do_not_specialize=["S", "C", "begin"])
def _gradients_kernel(
    q, k, w, slopes, keys, counts, dq, dk, dw, S, C, begin,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, BQ: tl.constexpr,
    BN: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """dq and dw of BQ queries of a block, and their shares of dk. PARTS: programs of a block, from part `begin` on.

    dq[t,j] = w[t,j] sum_s g[t,s] 1[q.k > 0] k[s],   dw[t,j] = the same sum times q[t,j]
    dk[s] += sum_t,j g[t,s] w[t,j] 1[q.k > 0] q[t,j]
    """
    block, part = tl.program_id(0) // PARTS, begin + tl.program_id(0) % PARTS
    n, d = tl.arange(0, BN), tl.arange(0, DP)
    count, first = tl.load(counts + block), block * B + part * BQ
    if count < 0:
        return
    last, b = tl.minimum(block * B + B, S), part * BQ + tl.arange(0, BQ)
    q_RD, w_R, row, real = _index_rows(q, w, first, last, H, D, HP, DP, BQ)
    # Who selected a broken key has NaN in g, and so has a broken query. Others must not get it: zero times NaN is NaN.
    whole_RD, whole_R = tl.where(finite(q_RD), q_RD, 0.0), tl.where(finite(w_R), w_R, 0.0)
    base, moved_RD = block.to(tl.int64) * C, tl.zeros((BQ * HP, DP), tl.float32)
    for s in range(0, count, BN):
        key = load_keys(keys, base + s + n, s + n < count)
        k_ND = load_rows(k, key, s + n < count, d, D)
        opened_RN = _opened(q_RD, k_ND, slopes, block, b, s + n, count, C, HP, B, BQ, BN, EXACT)
        k_ND = tl.where(finite(k_ND), k_ND, 0.0)
        moved_RD = tl.dot(opened_RN.to(k_ND.dtype), k_ND, moved_RD, input_precision=EXACT)
        weighted_RN = (opened_RN * whole_R[:, None]).to(q_RD.dtype)
        dk_ND = tl.dot(tl.trans(weighted_RN), whole_RD, input_precision=EXACT)
        target = base + s + n if IN_ORDER else key  # in order every place has its own row
        tl.atomic_add(
            dk + target[:, None] * D + d[None, :], dk_ND, mask=(s + n < count)[:, None] & (d < D)[None, :],
            sem="relaxed",
        )  # fmt: skip
    tl.store(dq + row[:, None] * D + d[None, :], moved_RD * w_R[:, None], mask=real[:, None] & (d < D)[None, :])
    tl.store(dw + row, tl.sum(moved_RD * q_RD.to(tl.float32), 1), mask=real)


def _launch(u: Unions, q_I: Tensor, rows: int, settings: dict[str, int]) -> dict[str, Any]:
    """rows: of a program at most."""
    _, H, D = q_I.shape
    HP, DP = padded(H, triton.cdiv(16, u.B)), padded(D)  # a product takes 16 rows at least
    BQ = max(1, min(u.B, rows // HP))
    return {"C": u.C, "H": H, "D": D, "HP": HP, "DP": DP, "B": u.B, "BQ": BQ, "EXACT": exact(q_I), **settings}


def _scores(u: Unions, q_I: Tensor, k_I: Tensor, w: Tensor) -> Tensor:
    scores = torch.empty(len(u), u.B, u.C, dtype=torch.float32, device=q_I.device)
    launch = _launch(u, q_I, SCORES_ROWS, SCORES)
    grid = len(u) * triton.cdiv(u.B, launch["BQ"]), triton.cdiv(u.C, launch["BN"] * launch["TILES"])
    _scores_kernel[grid](q_I, k_I, w, u.keys, u.counts, scores, q_I.shape[0], **launch)
    return scores


def write_kl(u: Unions, mass: Tensor, heads: int, q_I: Tensor, k_I: Tensor, w: Tensor, kl: Tensor) -> None:
    """Writes the KL of these blocks' queries. mass (blocks, B, C): the probabilities summed over heads."""
    scores = _scores(u, q_I, k_I, w)
    _kl_kernel[(len(q_I),)](mass, scores, u.marks, u.counts, kl, kl, u.C, heads, B=u.B, BN=512, WEIGHTED=False)


def kl_slopes(u: Unions, mass: Tensor, heads: int, dkl: Tensor, q_I: Tensor, k_I: Tensor, w: Tensor) -> Tensor:
    """(blocks, B, C) float32: dkl times the KL's derivative by the scores."""
    slopes = _scores(u, q_I, k_I, w)
    _kl_kernel[(len(q_I),)](mass, slopes, u.marks, u.counts, dkl, dkl, u.C, heads, B=u.B, BN=512, WEIGHTED=True)
    return slopes


def _kept(K: int, MP: int) -> int:
    """Bytes of target and scores that a query has in a wide block and in a narrow one."""
    return 2 * 4 * (FIT + union_attention.NARROW // MP) * K


def sparse_attention_kl(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    *,
    kernels: Kernels = PORTABLE,
) -> tuple[Tensor, Tensor, Tensor]:
    (S, H, _), T, K = q_SHD.shape, kv_TGE.shape[0], indices_SK.shape[1]
    out, lse = q_SHD.new_empty(S, H, d_v), q_SHD.new_empty(S, H, dtype=torch.float32)
    kl = torch.empty(S, dtype=torch.float32, device=q_SHD.device)
    q, kv, indices, q_I, k_I, w = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, q_I, k_I, w))
    shape = union_attention.shape_of(q, kv, d_k, v_start, d_v)
    for part in strips(S, T, K, others=_kept(K, shape["MP"])):
        levels = union_attention.levels(indices[part], T, shape["MP"])
        kernels.forward(levels, q[part], kv, out[part], lse[part], scale, shape)
        for u in levels:
            mass = union_attention.head_mass(u, q[part], kv, lse[part], scale, shape)
            write_kl(u, mass, H, q_I[part], k_I, w[part], kl[part])
    return out, lse, kl


def sparse_attention_kl_backward(
    dout_SHV: Tensor,
    dlse_SH: Tensor | None,
    dkl_S: Tensor,
    out_SHV: Tensor,
    lse_SH: Tensor,
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    *,
    kernels: Kernels = PORTABLE,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (S, H, _), T, K = q_SHD.shape, kv_TGE.shape[0], indices_SK.shape[1]
    dq, dq_I, dw = q_SHD.new_empty(q_SHD.shape), q_I.new_empty(q_I.shape), w.new_empty(w.shape)
    dkv, dk_I = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (kv_TGE, k_I))
    q, kv, indices, dout = (x.contiguous() for x in (q_SHD, kv_TGE, indices_SK, dout_SHV.to(q_SHD.dtype)))
    q_I, k_I, w, dkl = (x.contiguous() for x in (q_I, k_I, w, dkl_S))
    out, lse = out_SHV.contiguous(), lse_SH.contiguous()
    dlse, shape = None if dlse_SH is None else dlse_SH.contiguous(), union_attention.shape_of(q, kv, d_k, v_start, d_v)
    for part in strips(S, T, K, others=_kept(K, shape["MP"]) + union_attention.bytes_in_order(K, kv)):
        levels = union_attention.levels(indices[part], T, shape["MP"])
        kernels.backward(
            levels, dout[part], None if dlse is None else dlse[part], out[part], lse[part], q[part], kv,
            dq[part], dkv, scale, shape,
        )  # fmt: skip
        for u in levels:
            mass = union_attention.head_mass(u, q[part], kv, lse[part], scale, shape)
            slopes = kl_slopes(u, mass, H, dkl[part], q_I[part], k_I, w[part])
            index_gradients(u, q_I[part], k_I, w[part], slopes, dq_I[part], dk_I, dw[part])
    return dq, dkv.to(kv_TGE.dtype), dq_I, dk_I.to(k_I.dtype), dw


def index_gradients(
    u: Unions, q_I: Tensor, k_I: Tensor, w: Tensor, slopes: Tensor, dq_I: Tensor, dk_I: Tensor, dw: Tensor
) -> None:
    """Writes dq_I and dw of the queries of these blocks, and adds to dk_I (T, D) float32."""
    launch, S = _launch(u, q_I, GRADIENTS_ROWS, GRADIENTS), q_I.shape[0]
    inputs, parts = (q_I, k_I, w, slopes, u.keys, u.counts), triton.cdiv(u.B, launch["BQ"])
    if not wanted_in_order():
        _gradients_kernel[(len(u) * parts,)](
            *inputs, dq_I, dk_I, dw, S, begin=0, **launch, PARTS=parts, IN_ORDER=False
        )  # fmt: skip
        return
    sums = torch.empty(len(u) * u.C, k_I.shape[1], dtype=torch.float32, device=k_I.device)
    for part in range(parts):
        sums.zero_()
        _gradients_kernel[(len(u),)](*inputs, dq_I, sums, dw, S, begin=part, **launch, PARTS=1, IN_ORDER=True)
        add_in_order(dk_I, u.named(), sums)
