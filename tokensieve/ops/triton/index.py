"""Index scores, equation (1), and their gradients, in Triton.

Legend: S query tokens, T key tokens, H index heads (HP padded to a power of two), D index width (DP padded). A program
holds BQ queries x HP heads as one side of a matrix product (R) and walks over tiles of BK keys, the other side (N).

A score has the same bits whatever the tiling, the batch, and prefill or decode: it is one product over the whole width
and one sum over the heads, in an order that depends on (H, D, dtype) alone, because BQ and BK do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256  # query heads in one product: four queries of 64 heads keep the tensor cores busier than fewer
BK = 64
PROGRAMS = 1024  # about how many programs fill a large GPU several times


def padded(n: int, least: int = 16) -> int:
    """The power of two to which a width or a number of heads is padded for a matrix product."""
    return max(least, triton.next_power_of_2(n))


def exact(x: Tensor) -> str:
    """The precision of a product: float32 is not rounded to TF32. For narrower types it makes no difference."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def chunks(S: int, T: int, BQ: int, BK: int, least: int) -> tuple[tuple[int, int], int]:
    """The grid of blocks of BQ queries x chunks of keys, and the keys of a chunk: at least `least` tiles of BK.

    With few queries the keys are shared out as well, so that a large GPU is full.
    """
    blocks = triton.cdiv(S, BQ)
    tiles = triton.cdiv(triton.cdiv(T, triton.cdiv(PROGRAMS, blocks)), BK)
    chunk = max(tiles, least) * BK
    return (blocks, triton.cdiv(T, chunk)), chunk


def ranges(starts_S: Tensor, ends_S: Tensor) -> tuple[Tensor, Tensor]:
    """Key ranges as the kernels read them: int32, contiguous."""
    return starts_S.to(torch.int32).contiguous(), ends_S.to(torch.int32).contiguous()


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # by itself it would turn a NaN into 0


@triton.jit
def key_range(starts, ends, t, S, T):
    """The keys [start, end) of the queries `t`, cut to the T keys: nothing else checks ranges on a GPU."""
    start = tl.load(starts + t, mask=t < S, other=0)
    end = tl.load(ends + t, mask=t < S, other=0)
    return tl.minimum(tl.maximum(start, 0), T), tl.minimum(tl.maximum(end, 0), T)


@triton.jit
def block_range(starts, ends, t, S, T):
    """The keys that each of the queries `t` sees, and those that any of them sees: [lo, hi), lo >= hi if none does."""
    start, end = key_range(starts, ends, t, S, T)
    seen = end > start
    hi = tl.max(tl.where(seen, end, 0))
    # never far above hi: a pipelined loop looks a few steps ahead, and past the largest integer keys would be negative
    lo = tl.min(tl.where(seen, start, hi))
    return start, end, lo, hi


@triton.jit
def load_rows(x, row, mask, d, D):
    """Rows (R, D) of a matrix of width D; zeros past that width and if `mask` is off."""
    return tl.load(x + row.to(tl.int64)[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)


def queries_of_tiles(starts_S: Tensor, ends_S: Tensor, T: int, tile: int) -> tuple[Tensor, Tensor]:
    """For each tile of keys a range [first, last) that has all queries that see any of it. Key ranges in any order."""
    sees = ends_S > starts_S
    ends = torch.where(sees, ends_S, 0).cummax(0).values  # the first query whose range ends past the tile's first key
    starts = torch.where(sees, starts_S, T).flip(0).cummin(0).values.flip(0)  # the last one that starts before its end
    edges = torch.arange(0, T, tile, device=starts_S.device, dtype=ends.dtype)
    first = torch.searchsorted(ends, edges, right=True)
    last = torch.searchsorted(starts, (edges + tile).clamp_max(T))
    return first.to(torch.int32), last.to(torch.int32)


@triton.jit
def _scores_kernel(
    q, k, w, k_scale, starts, ends, out, S, T, chunk,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # The last queries, which see most, come first: the programs that end alone are then short.
    first, d = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ, tl.arange(0, DP)
    t, n = first + tl.arange(0, BQ), tl.arange(0, BK)
    _, _, lo, hi = block_range(starts, ends, t, S, T)
    lo = tl.maximum(lo // BK * BK, tl.program_id(1) * chunk)
    hi = tl.minimum(hi, tl.program_id(1) * chunk + chunk)
    row = tl.arange(0, BQ * HP)
    owner, head = first + row // HP, row % HP
    real = (owner < S) & (head < H)
    q_RD = load_rows(q, owner * H + head, real, d, D)
    w_R = tl.load(w + owner * H + head, mask=real, other=0.0).to(tl.float32)
    out_NQ = out + t.to(tl.int64)[None, :] * T + n[:, None]
    for s in range(lo, hi, BK):
        k_ND = load_rows(k, s + n, s + n < T, d, D)
        # Keys are the rows: the sum over heads then stays within a thread, except for its last steps.
        dots_NR = tl.dot(k_ND, tl.trans(q_RD), input_precision=EXACT)
        score_NQ = tl.sum(tl.reshape(relu(dots_NR) * w_R[None, :], (BK, BQ, HP)), 2)
        if SCALED:
            score_NQ *= tl.load(k_scale + s + n, mask=s + n < T, other=0.0)[:, None]
        tl.store(out_NQ + s, score_NQ, mask=(t < S)[None, :] & (s + n < T)[:, None])


def index_scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    (S, H, D), T = q_SHD.shape, k_TD.shape[0]
    scores_ST = torch.empty(S, T, dtype=torch.float32, device=q_SHD.device)
    if S == 0 or T == 0:
        return scores_ST
    HP, DP = padded(H, 8), padded(D, 32)  # blocks of queries fill a product
    BQ = max(1, ROWS // HP)
    grid, chunk = chunks(S, T, BQ, BK, least=16)
    _scores_kernel[grid](
        q_SHD.contiguous(), k_TD.contiguous(), w_SH.contiguous(), k_scale_T, *ranges(starts_S, ends_S), scores_ST,
        S, T, chunk,
        H=H, D=D, HP=HP, DP=DP, BQ=BQ, BK=BK, SCALED=k_scale_T is not None, EXACT=exact(q_SHD),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return scores_ST


@triton.jit
def _dq_kernel(
    dscore, q, k, w, k_scale, starts, ends, dq, dw, S, T,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq = w * sum_s g[s] 1[q.k > 0] k[s], with g the score's gradient.

    dw is the same sum times q, because relu(q.k) is q.k or 0.
    """
    first, d = tl.program_id(0) * BQ, tl.arange(0, DP)
    t, n = first + tl.arange(0, BQ), tl.arange(0, BK)
    start, end, lo, hi = block_range(starts, ends, t, S, T)
    row = tl.arange(0, BQ * HP)
    owner, head = first + row // HP, row % HP
    real = (owner < S) & (head < H)
    q_RD = load_rows(q, owner * H + head, real, d, D)
    moved_RD = tl.zeros((BQ * HP, DP), dtype=tl.float32)
    for s in range(lo // BK * BK, hi, BK):
        key = (s + n)[None, :]
        seen = (key >= start[:, None]) & (key < end[:, None])
        used = tl.max(seen.to(tl.int32), 0) > 0  # unseen keys may be NaN, and zero times NaN is NaN
        k_ND = load_rows(k, s + n, used, d, D)
        dots_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
        g_QN = tl.load(dscore + t.to(tl.int64)[:, None] * T + key, mask=seen, other=0.0).to(tl.float32)
        if SCALED:
            g_QN *= tl.load(k_scale + s + n, mask=used, other=0.0)[None, :]
        g_RN = tl.reshape(tl.broadcast_to(g_QN[:, None, :], (BQ, HP, BK)), (BQ * HP, BK))
        opened_RN = tl.where(dots_RN > 0, g_RN, 0.0).to(k_ND.dtype)
        moved_RD = tl.dot(opened_RN, k_ND, moved_RD, input_precision=EXACT)
    w_R = tl.load(w + owner * H + head, mask=real, other=0.0).to(tl.float32)
    place = dq + (owner * H + head).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, moved_RD * w_R[:, None], mask=real[:, None] & (d < D)[None, :])
    tl.store(dw + owner * H + head, tl.sum(moved_RD * q_RD.to(tl.float32), 1), mask=real)


@triton.jit
def _dk_kernel(
    dscore, q, k, w, k_scale, starts, ends, firsts, lasts, dk, S, T,
    H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    SCALED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dk[s] = sum_t,j g[t,s] w[t,j] 1[q.k > 0] q[t,j]: one tile of keys, and all queries that see any of it."""
    s, d = tl.program_id(0) * BK, tl.arange(0, DP)
    n, row = s + tl.arange(0, BK), tl.arange(0, BQ * HP)
    k_ND = load_rows(k, n, n < T, d, D)
    dk_ND = tl.zeros((BK, DP), dtype=tl.float32)
    last = tl.load(lasts + tl.program_id(0))
    for first in range(tl.load(firsts + tl.program_id(0)), last, BQ):
        t = first + tl.arange(0, BQ)
        start, end = key_range(starts, ends, t, S, T)
        owner, head = first + row // HP, row % HP
        real = (owner < last) & (head < H)
        q_RD = load_rows(q, owner * H + head, real, d, D)
        w_R = tl.load(w + owner * H + head, mask=real, other=0.0).to(tl.float32)
        dots_RN = tl.dot(q_RD, tl.trans(k_ND), input_precision=EXACT)
        seen = (n[None, :] >= start[:, None]) & (n[None, :] < end[:, None])
        g_QN = tl.load(dscore + t.to(tl.int64)[:, None] * T + n[None, :], mask=seen, other=0.0).to(tl.float32)
        g_RN = tl.reshape(tl.broadcast_to(g_QN[:, None, :], (BQ, HP, BK)), (BQ * HP, BK))
        opened_RN = tl.where(dots_RN > 0, g_RN * w_R[:, None], 0.0).to(q_RD.dtype)
        dk_ND = tl.dot(tl.trans(opened_RN), q_RD, dk_ND, input_precision=EXACT)
    if SCALED:
        dk_ND *= tl.load(k_scale + n, mask=n < T, other=0.0)[:, None]
    tl.store(dk + n.to(tl.int64)[:, None] * D + d[None, :], dk_ND, mask=(n < T)[:, None] & (d < D)[None, :])


def gradients_of_scores(
    dscores_ST: Tensor,
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq and dw in their inputs' dtypes, dk in float32, so that strips of queries can be added up."""
    (S, H, D), T = q_SHD.shape, k_TD.shape[0]
    dq, dw = q_SHD.new_empty(q_SHD.shape), w_SH.new_empty(w_SH.shape)
    dk = torch.zeros(k_TD.shape, dtype=torch.float32, device=k_TD.device)
    if S == 0 or T == 0:
        return dq.zero_(), dk, dw.zero_()
    HP, DP = padded(H, 8), padded(D, 32)  # blocks of queries fill a product
    BQ = max(1, 64 // HP)
    starts_S, ends_S = ranges(starts_S, ends_S)
    inputs = (dscores_ST.contiguous(), q_SHD.contiguous(), k_TD.contiguous(), w_SH.contiguous(), k_scale_T)
    shape = {"H": H, "D": D, "HP": HP, "DP": DP, "BQ": BQ, "BK": 128, "SCALED": k_scale_T is not None}
    settings = {"EXACT": exact(q_SHD), "num_warps": 4, "num_stages": 3}
    _dq_kernel[(triton.cdiv(S, BQ),)](*inputs, starts_S, ends_S, dq, dw, S, T, **shape, **settings)
    tiles = queries_of_tiles(starts_S, ends_S, T, 128)
    _dk_kernel[(triton.cdiv(T, 128),)](*inputs, starts_S, ends_S, *tiles, dk, S, T, **shape, **settings)
    return dq, dk, dw


def index_scores_backward(
    dscores_ST: Tensor,
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dw = gradients_of_scores(dscores_ST, q_SHD, k_TD, w_SH, starts_S, ends_S, k_scale_T)
    return dq, dk.to(k_TD.dtype), dw
