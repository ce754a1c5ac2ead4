"""The selection, equation (2), in Triton: exact, ties to the smaller position, the scores read about once.

Legend: S queries, T keys, K selected, C candidates kept of one row.

Scores are compared as integers in the same order (-0.0 counting as 0.0). A sample of the row gives a guess at a value that somewhat
more than k of its scores reach. One pass keeps those scores, of those equal to the guess only the first k, in order of position. A
guess that keeps fewer than k or more than C is corrected between what is known to be too low and too high, and the row is read again:
the guess decides how often that happens, never what is selected. Among the candidates the k-th largest is then found bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.index import index_scores

LOWEST: tl.constexpr = tl.constexpr(-2147483648)
HIGHEST: tl.constexpr = tl.constexpr(2147483647)
PIECE: tl.constexpr = tl.constexpr(32)  # neighbouring scores of one piece of the sample: whole lines of memory


@triton.jit
def ordered(x):
    """float32 scores as integers in the same order."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def kth_largest(keys, k):
    """The largest value that at least k of the keys reach; LOWEST where there are fewer than k."""
    reached = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= k, 0, LOWEST)
    for bit in range(31):
        higher = reached + ((1 << 30) >> bit)
        reached = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= k, higher, reached)
    return reached


@triton.jit
def _select_kernel(
    scores, starts, ends, out, wrong, kept_keys, kept_places, S, T, K, before,
    C: tl.constexpr, SAMPLE: tl.constexpr, TILE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    c, n, piece = tl.arange(0, C), tl.arange(0, TILE), tl.arange(0, SAMPLE)
    kept_keys += tl.program_id(0).to(tl.int64) * C
    kept_places += tl.program_id(0).to(tl.int64) * C
    for t in range(tl.program_id(0), S, PROGRAMS):
        row, out_row = scores + tl.cast(t, tl.int64) * T, out + tl.cast(t, tl.int64) * K
        start, end = tl.load(starts + t), tl.load(ends + t)
        length = tl.maximum(end - start, 0)
        if length <= C:
            whole = tl.load(row + start + c, mask=c < length, other=0.0)
            if tl.max((whole != whole).to(tl.int32)) > 0:
                tl.atomic_max(wrong, before - t)
            keys = tl.where(c < length, ordered(whole), LOWEST)
            places, kept = start + c, length
        else:
            # 1. a guess: `SAMPLE` scores in pieces that lie evenly over the row
            at = (piece // PIECE).to(tl.int64) * (length - PIECE) // (SAMPLE // PIECE - 1) + piece % PIECE
            sample = ordered(tl.load(row + start + at))
            aim = (K + C) // 2  # halfway between too few and too many
            guess = kth_largest(sample, tl.maximum(aim * SAMPLE // length, 1))
            low, high = LOWEST, HIGHEST  # known to keep too many, known to keep too few
            kept, reach, bad, tries = 0, 0, 0, 0
            while (tries == 0) | (reach < K) | (kept > C):
                if tries > 0:
                    low = tl.where(reach < K, low, guess)
                    high = tl.where(reach < K, guess, high)
                    guess = (low & high) + ((low ^ high) >> 1)
                    if tries == 1:  # the sample once more, well to the other side
                        rank = tl.where(high == HIGHEST, K // 2, 2 * C)
                        other = kth_largest(sample, tl.maximum(rank * SAMPLE // length, 1))
                        guess = tl.where((other > low) & (other < high), other, guess)
                # 2. one pass: keep what is above the guess, and the first k equal to it
                kept, reach, bad, equal = 0, 0, 0, 0
                for s in range(start, end, TILE):
                    x = tl.load(row + s + n, mask=s + n < end, other=float("-inf"))
                    key = tl.where(s + n < end, ordered(x), LOWEST)
                    same = (key == guess).to(tl.int32)
                    rank = equal + tl.cumsum(same, 0)
                    keep = ((key > guess) | ((same > 0) & (rank <= K))).to(tl.int32)
                    place = kept + tl.cumsum(keep, 0) - 1
                    tl.store(kept_keys + place, key, mask=(keep > 0) & (place < C))
                    tl.store(kept_places + place, s + n, mask=(keep > 0) & (place < C))
                    kept += tl.sum(keep)
                    equal += tl.sum(same)
                    reach += tl.sum((key >= guess).to(tl.int32))
                    bad += tl.sum((x != x).to(tl.int32))
                tries += 1
            if bad > 0:
                tl.atomic_max(wrong, before - t)
            tl.debug_barrier()
            keys = tl.load(kept_keys + c, mask=c < kept, other=LOWEST)
            places = tl.load(kept_places + c, mask=c < kept, other=0)
        # 3. the k best candidates; they lie in order of position
        wanted = tl.minimum(K, length)
        last = kth_largest(keys, wanted)
        live = c < kept
        above = (live & (keys > last)).to(tl.int32)
        tied = (live & (keys == last)).to(tl.int32)
        taken = above | (tied & (tl.cumsum(tied, 0) <= wanted - tl.sum(above)).to(tl.int32))
        slot = tl.cumsum(taken, 0) - 1
        tl.store(out_row + slot, places, mask=taken > 0)
        for first in range(wanted // C * C, K, C):
            tl.store(out_row + first + c, -1, mask=(first + c >= wanted) & (first + c < K))
        tl.debug_barrier()


def _select(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, indices_SK: Tensor, before: int) -> Tensor:
    """Fills `indices`. Returns a number on the device: 0, or `before` less the first query that has a NaN in its range."""
    S, T = scores_ST.shape
    wrong = torch.zeros(1, dtype=torch.int32, device=scores_ST.device)
    if S == 0:
        return wrong
    C = max(64, triton.next_power_of_2(2 * k))
    programs = min(S, 4)
    if scores_ST.is_cuda:
        programs = min(S, 8 * torch.cuda.get_device_properties(scores_ST.device).multi_processor_count)
    kept = torch.empty(2, programs, C, dtype=torch.int32, device=scores_ST.device)
    inputs = (scores_ST.contiguous(), starts_S.contiguous(), ends_S.contiguous())
    _select_kernel[(programs,)](
        *inputs, indices_SK, wrong, kept[0], kept[1], S, T, k, before, PROGRAMS=programs,
        C=C, SAMPLE=min(max(C, 128), 4096), TILE=min(max(C // 2, 64), 2048), num_warps=4 if C <= 4096 else 8,
    )  # fmt: skip
    return wrong


def _reject_nan(wrong: Tensor, queries: int) -> None:
    what = "contain NaN: nothing can be selected; check the indexer's inputs and weights"
    if wrong.is_cuda and torch.cuda.is_current_stream_capturing():
        # Nobody can ask the device inside a CUDA graph: it stops by itself.
        torch._assert_async(wrong == 0, f"index scores {what}")
    elif found := int(wrong):
        raise ValueError(f"index scores of query {queries - found} {what}")


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor) -> Tensor:
    S = scores_ST.shape[0]
    indices_SK = torch.empty(S, k, dtype=torch.int32, device=scores_ST.device)
    _reject_nan(_select(scores_ST, k, starts_S, ends_S, indices_SK, S), S)
    return indices_SK


STRIP = 1 << 28  # scores held at a time: 1 GiB


def index_topk(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    S, T = q_SHD.shape[0], k_TD.shape[0]
    indices_SK = torch.empty(S, k, dtype=torch.int32, device=q_SHD.device)
    rows, wrong = max(1, STRIP // max(T, 1)), torch.zeros(1, dtype=torch.int32, device=q_SHD.device)
    for a in range(0, S, rows):
        part = slice(a, a + rows)
        scores = index_scores(q_SHD[part], k_TD, w_SH[part], starts_S[part], ends_S[part], k_scale_T)
        found = _select(scores, k, starts_S[part], ends_S[part], indices_SK[part], S - a)
        wrong = torch.maximum(wrong, found)
    _reject_nan(wrong, S)
    return indices_SK
