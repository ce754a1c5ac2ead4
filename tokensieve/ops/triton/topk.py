"""The selection, equation (2), in Triton: exact, ties to the smaller position, the scores read about once.

Legend: S queries, T keys, K selected, C candidates kept of one row.

Scores are compared as integers in the same order (-0.0 counting as 0.0, NaN as the largest). A sample of the row gives a guess at a value
that somewhat more than k of its scores reach. One pass keeps those scores, of those equal to the guess only the first k, in order of
position. A guess that keeps fewer than k or more than C is corrected, in growing steps until it is known to lie between two others, and
the row is read again: the guess decides how often that happens, never what is selected. Among the candidates the k-th largest is
then found by bisection.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.index import index_scores, key_range, ranges

LOWEST: tl.constexpr = tl.constexpr(-2147483648)
HIGHEST: tl.constexpr = tl.constexpr(2147483647)
PIECE: tl.constexpr = tl.constexpr(32)  # neighbouring scores of one piece of the sample: whole lines of memory
SAMPLE = 2048
FIRST_STEP: tl.constexpr = tl.constexpr(1 << 18)  # of a correction: a thirty-second of the score, about
STRIP = 1 << 25  # candidates held at a time: 256 MiB


@triton.jit
def ordered(x):
    """float32 scores as integers in the same order; NaN is HIGHEST, which no number is."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def reached_by(keys, k, slack):
    """A value that at least k and at most k + slack of the keys reach, or else the k-th largest; there are k keys at least."""
    positive = tl.sum((keys >= 0).to(tl.int32))
    value = tl.where(positive >= k, 0, tl.min(keys))
    top = tl.where(positive >= k, tl.max(keys), -1)
    count = tl.where(positive >= k, positive, k + slack + 1)
    step = 1 << 30
    while step > top - value:
        step = step >> 1
    while (step > 0) & (count > k + slack):
        if step <= top - value:
            reach = tl.sum((keys >= value + step).to(tl.int32))
            count = tl.where(reach >= k, reach, count)
            value = tl.where(reach >= k, value + step, value)
        step = step >> 1
    return value


@triton.jit
def _keep_kernel(
    scores, starts, ends, counts, kept_keys, kept_places, T, pitch, K,
    C: tl.constexpr, SAMPLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The candidates of a row that is longer than C, in order of position."""
    t, n, piece = tl.program_id(0).to(tl.int64), tl.arange(0, TILE), tl.arange(0, SAMPLE)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    length = end - start
    scores += t * pitch
    kept_keys += t * C
    kept_places += t * C
    if length > C:
        at = (piece // PIECE).to(tl.int64) * (length - PIECE) // (SAMPLE // PIECE - 1) + piece % PIECE
        half = tl.cast((K + C) // 2, tl.int64)  # halfway between too few and too many
        aim = tl.maximum(half * SAMPLE // length, 1).to(tl.int32)
        guess = reached_by(ordered(tl.load(scores + start + at)), aim, aim // 32)
        # low is known to keep too many, high too few; at the ends nothing is known yet
        low, high, step = LOWEST, HIGHEST, FIRST_STEP
        # steps and bisection end long before 80 tries, unless there are more than C NaN, which the next kernel reports
        kept, reach, tries = 0, 0, 0
        while (tries < 80) & ((tries == 0) | (reach < K) | (kept > C)):
            if tries > 0:
                low = tl.where(reach < K, low, guess)
                high = tl.where(reach < K, guess, high)
                middle = (low & high) + ((low ^ high) >> 1)
                if reach < K:
                    guess = tl.where((low == LOWEST) & (guess > LOWEST + step), guess - step, middle)
                else:
                    guess = tl.where((high == HIGHEST) & (guess < HIGHEST - step), guess + step, middle)
                step = tl.minimum(step, 1 << 27) * 4
            above, equal = 0, 0
            for s in range(start, end, TILE):
                x = tl.load(scores + s + n, mask=s + n < end, other=float("-inf"))
                key = ordered(x)
                larger = (key > guess) & (s + n < end)
                same = (key == guess) & (s + n < end)
                both = larger.to(tl.int32) + (same.to(tl.int32) << 16)  # two counts in one scan
                scan, total = tl.cumsum(both, 0), tl.sum(both)
                rank = equal + (scan >> 16)
                keep = larger | (same & (rank <= K))
                place = above + (scan & 0xFFFF) + tl.minimum(rank, K) - 1
                tl.store(kept_keys + place, key, mask=keep & (place < C))
                tl.store(kept_places + place, s + n, mask=keep & (place < C))
                above += total & 0xFFFF
                equal += total >> 16
            kept, reach, tries = above + tl.minimum(equal, K), above + equal, tries + 1
        tl.store(counts + t, tl.minimum(kept, C))


@triton.jit
def _take_kernel(
    scores,
    starts,
    ends,
    counts,
    kept_keys,
    kept_places,
    out,
    wrong,
    T,
    pitch,
    K,
    before,
    C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The k best candidates of a row; of a row no longer than C, of all of it."""
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    length = end - start
    wanted = tl.minimum(K, tl.maximum(length, 0))
    out += t * K
    if length > C:
        count = tl.load(counts + t)
        keys = tl.load(kept_keys + t * C + c, mask=c < count, other=LOWEST)
    else:
        count = tl.maximum(length, 0)
        keys = ordered(tl.load(scores + t * pitch + start + c, mask=c < count, other=float("-inf")))
    if tl.max(tl.where(c < count, keys, LOWEST)) == HIGHEST:
        tl.atomic_max(wrong, before - tl.program_id(0))
    if wanted > 0:
        # unused places are below -inf: no candidate loses its place to them
        last = reached_by(tl.where(c < count, keys, LOWEST), wanted, 0)
        above, tied = (c < count) & (keys > last), (c < count) & (keys == last)
        if WIDE:
            both = above.to(tl.int64) + (tied.to(tl.int64) << 32)
            scan, shift, mask = tl.cumsum(both, 0), 32, 0xFFFFFFFF
        else:
            both = above.to(tl.int32) + (tied.to(tl.int32) << 16)
            scan, shift, mask = tl.cumsum(both, 0), 16, 0xFFFF
        free = wanted - tl.sum(above.to(tl.int32))  # what is left for ties
        rank = scan >> shift
        taken = above | (tied & (rank <= free))
        slot = (scan & mask) + tl.minimum(rank, free) - 1
        if length > C:
            places = tl.load(kept_places + t * C + c, mask=taken, other=0)
        else:
            places = start + c
        tl.store(out + slot, places, mask=taken)
    tl.store(out + c, -1, mask=(c >= wanted) & (c < K))


def _select(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, indices_SK: Tensor, before: int) -> Tensor:
    """Fills `indices`. Returns a number on the device: 0, or `before` less the first query that has a NaN in its range."""
    S, T = scores_ST.shape
    wrong = torch.zeros(1, dtype=torch.int32, device=scores_ST.device)
    C = max(64, triton.next_power_of_2(2 * min(k, max(T, 1))))
    rows = max(1, STRIP // C)
    longer = T > C
    kept = torch.empty(2, min(S, rows) if longer else 0, C, dtype=torch.int32, device=scores_ST.device)
    counts = torch.empty(min(S, rows), dtype=torch.int32, device=scores_ST.device)
    starts_S, ends_S = ranges(starts_S, ends_S)
    if scores_ST.stride(1) != 1:
        scores_ST = scores_ST.contiguous()
    pitch = scores_ST.stride(0)  # rows may be longer than T
    for a in range(0, S, rows):
        part = slice(a, min(a + rows, S))
        grid, inputs = (part.stop - a,), (scores_ST[part], starts_S[part], ends_S[part], counts, kept[0], kept[1])
        if longer:
            sample, tile = min(max(C, 128), SAMPLE), min(max(C // 2, 64), 2048)
            _keep_kernel[grid](*inputs, T, pitch, k, C=C, SAMPLE=sample, TILE=tile, num_warps=4)
        warps = 4 if C <= 4096 else 8 if C <= 16384 else 16
        _take_kernel[grid](
            *inputs, indices_SK[part], wrong, T, pitch, k, before - a, C=C, WIDE=C > 16384, num_warps=warps
        )
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
    indices_SK = torch.full((S, k), -1, dtype=torch.int32, device=scores_ST.device)
    _reject_nan(_select(scores_ST, k, starts_S, ends_S, indices_SK, S), S)
    return indices_SK


SCORES = 1 << 28  # held at a time: 1 GiB


def index_topk(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    k: int,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
    scores_of: Callable[..., Tensor] = index_scores,
) -> Tensor:
    S, T = q_SHD.shape[0], k_TD.shape[0]
    indices_SK = torch.full((S, k), -1, dtype=torch.int32, device=q_SHD.device)
    rows, wrong = max(1, SCORES // max(T, 1)), torch.zeros(1, dtype=torch.int32, device=q_SHD.device)
    for a in range(0, S, rows):
        part = slice(a, a + rows)
        scores = scores_of(q_SHD[part], k_TD, w_SH[part], starts_S[part], ends_S[part], k_scale_T)
        found = _select(scores, k, starts_S[part], ends_S[part], indices_SK[part], S - a)
        wrong = torch.maximum(wrong, found)
        del scores  # before the next strip is made
    _reject_nan(wrong, S)
    return indices_SK
