"""The selection, equation (2), in Triton: exact, ties to the smaller position, the scores read about once.

Legend: S queries, T keys, K selected, C candidates of one row, P parts of a row.

Scores are compared as integers in the same order (-0.0 counting as 0.0, NaN as the largest).
1. A sample of the row gives a guess: a value that somewhat more than k of its scores reach.
2. One pass, a long row of few queries in parts, collects the scores that reach it, in order of position.
3. If a row has fewer than k of them or more than C, another kernel corrects the guess in growing steps until it lies
   between a value that keeps too many and one that keeps too few, then halves that range. Of the scores equal to it
   only the first k are collected. The guess decides how often a row is read, never what is selected.
4. Among the candidates the k-th largest is then searched for between two values that lie above and below it.
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
TILE, RUN, COLLECT_WARPS = 1024, 4, 4  # scores read at a time, neighbours counted together, warps of a program
PROGRAMS, MOST_PARTS = 2048, 32  # rows are cut into parts until there are this many programs, or parts
FIRST_STEP: tl.constexpr = tl.constexpr(1 << 18)  # of a correction: a thirty-second of the score, about
STRIP = 1 << 25  # candidates held at a time: 256 MiB, and a tile more for each part of a row


@triton.jit
def ordered(x):
    """float32 scores as integers in the same order; NaN is HIGHEST, which no number is."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def as_score(key):
    """The float32 of an integer of `ordered`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def reached_by(keys, low, count, k, slack):
    """A value that at least k and at most k + slack of the keys reach, or else the k-th largest.

    `count` of them, k or more, reach `low`. The next value to try is guessed as if scores were spread evenly, and every
    third time it is the middle, which ends the search whatever the scores are.
    """
    count = tl.cast(count, tl.int32)
    below, high, reach_high, tries = low.to(tl.int64), tl.max(keys).to(tl.int64) + 1, 0, 0
    while (count > k + slack) & (high - below > 1):
        share = (count - k - 0.5 * slack) / (count - reach_high)
        first, last = as_score(below.to(tl.int32)), as_score((high - 1).to(tl.int32))
        middle = ordered(first + (last - first) * share).to(tl.int64)
        middle = tl.where(tries % 3 == 2, below + (high - below) // 2, middle)
        middle = tl.minimum(tl.maximum(middle, below + 1), high - 1)
        reach = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32))
        if reach >= k:
            below, count = middle, reach
        else:
            high, reach_high = middle, reach
        tries += 1
    return below.to(tl.int32)


@triton.jit
def as_pair(x, place):
    """A candidate in 64 bits: its score above, its position below."""
    return (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | place.to(tl.int64)


@triton.jit
def append(candidates, count, x, keep, place, C: tl.constexpr):
    """Stores those of x (rows of neighbours) that `keep` marks behind `count` candidates; returns the new count."""
    # Slots are counted by rows first, then within a row: two short scans instead of a long one. Past C candidates the
    # count only shows that the guess failed: what is stored behind them is overwritten.
    ones = keep.to(tl.int32)
    of_row = tl.sum(ones, 1)
    slot = tl.minimum(count, C) + (tl.cumsum(of_row, 0) - of_row)[:, None] + tl.cumsum(ones, 1) - 1
    tl.store(candidates + slot, as_pair(x, place), mask=keep)
    return count + tl.sum(of_row)


@triton.jit
def _guess_kernel(scores, starts, ends, guesses, T, pitch, K, C: tl.constexpr, SAMPLE: tl.constexpr):
    """For every row that is longer than C, a score that about (K + C) / 2 of its scores reach."""
    t, piece = tl.program_id(0).to(tl.int64), tl.arange(0, SAMPLE)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    length = end - start
    if length > C:
        # pieces spread evenly over the row
        at = (piece // PIECE).to(tl.int64) * (length - PIECE) // (SAMPLE // PIECE - 1) + piece % PIECE
        keys = ordered(tl.load(scores + t * pitch + start + at))
        aim = tl.maximum(tl.cast((K + C) // 2, tl.int64) * SAMPLE // length, 1).to(tl.int32)
        tl.store(guesses + t, as_score(reached_by(keys, tl.min(keys), SAMPLE, aim, aim // 8)))


@triton.jit
def _collect_kernel(
    scores, starts, ends, guesses, counts, candidates, T, pitch, part,
    C: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """The candidates in `part` scores of a row that is longer than C, in order of position, and how many there are.

    There may be more than C.
    """
    t, p, P = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    n = tl.arange(0, TILE // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    scores += t * pitch
    candidates += (t * P + p) * ROOM
    if end - start > C:
        guess = tl.load(guesses + t)
        # Tiles are whole lines of memory; the first and the last one mask what is not the row's.
        first = tl.multiple_of(tl.minimum(start // 4 * 4 + p * part, end), 4)
        last = tl.minimum(first + part, end)
        count = 0
        if first < last:
            place = first + n
            x = tl.load(scores + place, mask=(place >= start) & (place < last), other=0.0)
            for s in range(first, last, TILE):
                place = s + n
                ahead = place + TILE
                if s + 2 * TILE <= last:  # the next tile is loaded while this one is counted
                    following = tl.load(scores + ahead)
                else:
                    following = tl.load(scores + ahead, mask=ahead < last, other=0.0)
                keep = ~(x < guess)  # keeps NaN, which the last kernel reports
                if (s < start) | (s + TILE > last):
                    keep = keep & (place >= start) & (place < last)
                count = append(candidates, count, x, keep, place, C)
                x = following
        tl.store(counts + t * P + p, count)


@triton.jit
def corrected(guess, low, high, step, too_few):
    """The next guess, given that this one keeps too few or too many.

    low is known to keep too many and high too few, unless they are still the ends of all integers.
    """
    low, high = tl.where(too_few, low, guess), tl.where(too_few, guess, high)
    middle = (low & high) + ((low ^ high) >> 1)
    below = tl.where((low == LOWEST) & (guess > LOWEST + step), guess - step, middle)
    above = tl.where((high == HIGHEST) & (guess < HIGHEST - step), guess + step, middle)
    return tl.where(too_few, below, above), low, high, tl.minimum(step, 1 << 27) * 4


@triton.jit
def _search_kernel(
    scores, starts, ends, guesses, counts, candidates, T, pitch, K,
    C: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The same for the rows whose guess failed, as one part, in as many passes as their scores need."""
    t, n, p = tl.program_id(0).to(tl.int64), tl.arange(0, TILE), tl.arange(0, P)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    scores += t * pitch
    candidates += t * P * ROOM
    if end - start > C:
        count = tl.sum(tl.load(counts + t * P + p))
        if (count < K) | (count > C):
            guess, low, high = ordered(tl.load(guesses + t)), tl.cast(LOWEST, tl.int32), tl.cast(HIGHEST, tl.int32)
            step = tl.cast(FIRST_STEP, tl.int32)
            if count < K:
                guess, low, high, step = corrected(guess, low, high, step, True)
            # There may be too many because they are equal, and the guess right: the row is read again, and only K of
            # the equal ones are collected. Steps and bisection end long before 80 tries, unless there are more than C
            # NaN, which the last kernel reports.
            reach, tries = 0, 0
            while (tries < 80) & ((tries == 0) | (reach < K) | (count > C)):
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
                    slot = above + (scan & 0xFFFF) + tl.minimum(rank, K) - 1
                    tl.store(candidates + slot, as_pair(x, s + n), mask=keep & (slot < C))
                    above += total & 0xFFFF
                    equal += total >> 16
                count, reach, tries = above + tl.minimum(equal, K), above + equal, tries + 1
                guess, low, high, step = corrected(guess, low, high, step, reach < K)
            tl.store(counts + t * P + p, tl.where(p == 0, tl.minimum(count, C), 0))


@triton.jit
def _take_kernel(
    scores, starts, ends, counts, candidates, out, broken, T, pitch, K, before,
    C: tl.constexpr, ROOM: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The k best candidates of a row; all of a row no longer than C are candidates."""
    t, c = tl.program_id(0).to(tl.int64), tl.arange(0, C)
    start, end = key_range(starts, ends, t, tl.num_programs(0), T)
    length = end - start
    selected = tl.minimum(K, tl.maximum(length, 0))
    out += t * K
    candidates += t * P * ROOM
    at = c
    if length > C:
        count = 0
        for p in tl.static_range(P):
            # a part's candidates begin at p * ROOM, and are counted from the parts before
            at = tl.where(c >= count, c - count + p * ROOM, at)
            count += tl.load(counts + t * P + p)
        x = (tl.load(candidates + at, mask=c < count, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        count = tl.maximum(length, 0)
        x = tl.load(scores + t * pitch + start + c, mask=c < count, other=float("-inf"))
    # unused places are below -inf, so that no candidate loses its place to them
    keys = tl.where(c < count, ordered(x), LOWEST)
    if tl.max(keys) == HIGHEST:
        tl.atomic_max(broken, before - tl.program_id(0))
    if selected > 0:
        last = reached_by(keys, tl.min(tl.where(c < count, keys, HIGHEST)), count, selected, 0)
        above, tied = (c < count) & (keys > last), (c < count) & (keys == last)
        if WIDE:
            both = above.to(tl.int64) + (tied.to(tl.int64) << 32)
            scan, shift, mask = tl.cumsum(both, 0), 32, 0xFFFFFFFF
        else:
            both = above.to(tl.int32) + (tied.to(tl.int32) << 16)
            scan, shift, mask = tl.cumsum(both, 0), 16, 0xFFFF
        free = selected - tl.sum(above.to(tl.int32))  # places left for ties
        rank = scan >> shift
        taken = above | (tied & (rank <= free))
        slot = (scan & mask) + tl.minimum(rank, free) - 1
        if length > C:
            places = tl.load(candidates + at, mask=taken, other=0).to(tl.int32)
        else:
            places = start + c
        tl.store(out + slot, places, mask=taken)
    tl.store(out + c, -1, mask=(c >= selected) & (c < K))


def _parts(rows: int, T: int, C: int) -> int:
    """In how many parts a row is read: so that few queries keep a GPU busy, none shorter than C, all within STRIP."""
    parts = 1
    while parts < MOST_PARTS and rows * parts < PROGRAMS and 2 * parts * C <= T and 2 * rows * parts * C <= STRIP:
        parts *= 2
    return parts


def _take_options(C: int) -> dict[str, int]:
    if C > 4096:
        return {"num_warps": 8 if C <= 16384 else 16}
    # Without a limit the compiler takes 202 registers, and half as many rows run at a time. Only NVIDIA's compiler has
    # this option.
    return {"num_warps": 4} if torch.version.hip else {"num_warps": 4, "maxnreg": 128}


def select_into(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, indices_SK: Tensor, before: int) -> Tensor:
    """Fills `indices`. Returns a number on the device: 0, or `before` minus the first query with a NaN in its range."""
    S, T = scores_ST.shape
    broken = torch.zeros(1, dtype=torch.int32, device=scores_ST.device)
    C = max(64, triton.next_power_of_2(2 * min(k, max(T, 1))))
    rows = max(1, min(S, STRIP // C))
    longer, tile = T > C, min(max(C // 2, 64), TILE)
    parts, sample = _parts(rows, T, C), min(max(C, 128), SAMPLE) * (1 if T < 1 << 16 else 4)
    part = triton.cdiv(triton.cdiv(T, parts), tile) * tile
    room = C + tile  # a tile may begin when there are C candidates already
    candidates = torch.empty(rows * parts * room if longer else 0, dtype=torch.int64, device=scores_ST.device)
    counts = torch.empty(rows * parts, dtype=torch.int32, device=scores_ST.device)
    guesses = torch.empty(rows, dtype=torch.float32, device=scores_ST.device)
    starts_S, ends_S = ranges(starts_S, ends_S)
    if scores_ST.stride(1) != 1:
        scores_ST = scores_ST.contiguous()
    pitch = scores_ST.stride(0)  # rows may be longer than T
    for a in range(0, S, rows):
        strip = slice(a, min(a + rows, S))
        grid, inputs = (strip.stop - a,), (scores_ST[strip], starts_S[strip], ends_S[strip])
        if longer:
            _guess_kernel[grid](
                *inputs, guesses, T, pitch, k, C=C, SAMPLE=sample, num_warps=2 if sample <= SAMPLE else 4
            )
            _collect_kernel[(*grid, parts)](
                *inputs,
                guesses,
                counts,
                candidates,
                T,
                pitch,
                part,
                C=C,
                ROOM=room,
                TILE=tile,
                RUN=RUN,
                num_warps=COLLECT_WARPS,
            )
            _search_kernel[grid](
                *inputs, guesses, counts, candidates, T, pitch, k, C=C, ROOM=room, TILE=tile, P=parts, num_warps=4
            )
        _take_kernel[grid](
            *inputs, counts, candidates, indices_SK[strip], broken, T, pitch, k, before - a,
            C=C, ROOM=room, P=parts, WIDE=C > 16384, **_take_options(C),
        )  # fmt: skip
    return broken


def new_indices(S: int, k: int, T: int, device: torch.device) -> Tensor:
    """int32 (S, k), -1 where the kernels do not write, which is past twice the number of keys."""
    if k <= 2 * T:
        return torch.empty(S, k, dtype=torch.int32, device=device)
    return torch.full((S, k), -1, dtype=torch.int32, device=device)


def reject_nan(broken: Tensor, queries: int) -> None:
    reason = "contain NaN: nothing can be selected; check the indexer's inputs and weights"
    if broken.is_cuda and torch.cuda.is_current_stream_capturing():
        # Inside a CUDA graph the device cannot be asked: it stops by itself.
        torch._assert_async(broken == 0, f"index scores {reason}")
    elif first := int(broken):
        raise ValueError(f"index scores of query {queries - first} {reason}")


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor) -> Tensor:
    S, T = scores_ST.shape
    indices_SK = new_indices(S, k, T, scores_ST.device)
    reject_nan(select_into(scores_ST, k, starts_S, ends_S, indices_SK, S), S)
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
    indices_SK = new_indices(S, k, T, q_SHD.device)
    rows, broken = max(1, SCORES // max(T, 1)), torch.zeros(1, dtype=torch.int32, device=q_SHD.device)
    for a in range(0, S, rows):
        part = slice(a, a + rows)
        scores = scores_of(q_SHD[part], k_TD, w_SH[part], starts_S[part], ends_S[part], k_scale_T)
        broken_part = select_into(scores, k, starts_S[part], ends_S[part], indices_SK[part], S - a)
        broken = torch.maximum(broken, broken_part)
        del scores  # before the next strip is made
    reject_nan(broken, S)
    return indices_SK
