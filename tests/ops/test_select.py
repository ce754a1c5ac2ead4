"""select_topk and index_topk: equation (2), exact, ties to the smaller position."""

import dataclasses
import math

import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, Case, Inputs, causal, make
from tokensieve import ops


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def select(scores_ST: torch.Tensor, k: int, ranges: list[tuple[int, int]] | None = None) -> list[list[int]]:
    """ops.select_topk over `ranges` (default: everything), as lists."""
    S, T = scores_ST.shape
    starts_S, ends_S = torch.tensor(ranges or [(0, T)] * S, dtype=torch.int32).reshape(S, 2).unbind(1)
    indices_SK = ops.select_topk(scores_ST, k, starts_S, ends_S)
    assert indices_SK.dtype == torch.int32 and indices_SK.shape == (S, k)
    assert torch.equal(indices_SK, oracle.select_topk(scores_ST, k, starts_S, ends_S))
    assert torch.equal(indices_SK, ops.select_topk(scores_ST, k, starts_S, ends_S)), "not repeatable"
    return indices_SK.tolist()


def topk(x: Inputs) -> torch.Tensor:
    return ops.index_topk(x.q_SID, x.k_TD, x.w_SI, x.k, x.starts_S, x.ends_S)


# select_topk: what wins


def test_best_keys_ascending_then_padding() -> None:
    row = [0.5, 3.0, -1.0, 2.0, 7.0]
    assert select(torch.tensor([row]), 3) == [[1, 3, 4]]
    assert select(torch.tensor([row]), 3, [(2, 4)]) == [[2, 3, -1]]
    assert select(torch.tensor([row]), 8) == [[0, 1, 2, 3, 4, -1, -1, -1]]
    assert select(torch.tensor([row]), 2, [(3, 3)]) == [[-1, -1]]


def test_equal_scores_go_to_the_smaller_positions() -> None:
    for value in (0.0, -0.0, 2.5, -3.0, 1e-45, math.inf, -math.inf):
        row = torch.full((1, 300), value)
        assert select(row, 4) == [[0, 1, 2, 3]], value
        assert select(row, 4, [(77, 299)]) == [[77, 78, 79, 80]], value


def test_negative_zero_ties_with_zero() -> None:
    assert select(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 2) == [[0, 1]]
    assert select(torch.tensor([[-1.0, -0.0, 0.0, 0.0, 5.0, -0.0]]), 3) == [[1, 2, 4]]
    assert select(torch.tensor([[0.0, -0.0, 1e-45, -1e-45]]), 3) == [[0, 1, 2]]


def test_a_tie_across_the_kth_place_is_cut_by_position() -> None:
    row = [1.0, 9.0, 4.0, 4.0, 8.0, 4.0, 0.0, 4.0]
    assert [select(torch.tensor([row]), k)[0] for k in (2, 3, 4, 5, 6, 7)] == [
        [1, 4],
        [1, 2, 4],
        [1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 7],
        [0, 1, 2, 3, 4, 5, 7],
    ]


@pytest.mark.parametrize("base", [1.0, 1.5e-39, -7.25, 3e38])
def test_many_scores_in_one_bucket(base: float) -> None:
    """Neighbouring floats: a radix pass over the high bits, or a rounded key, sees them all as equal."""
    bits = torch.tensor(base).view(torch.int32).item()
    g = torch.Generator().manual_seed(0)
    ladder = (bits + torch.arange(600, dtype=torch.int32)).view(torch.float32)
    rows = torch.stack([ladder[torch.randperm(600, generator=g)] for _ in range(3)])
    ranks = rows.double().argsort(descending=True, stable=True)[:, :100].sort().values
    assert select(rows, 100) == ranks.tolist()
    # The same in float64, where neighbours differ beyond float32's reach.
    close = 1.0 + torch.randperm(200, generator=g)[None].double() * 2.0**-50
    assert select(close, 9) == [close[0].argsort(descending=True)[:9].sort().values.tolist()]


def test_infinite_scores_are_scores() -> None:
    row = torch.tensor([[-math.inf, 1.0, math.inf, -math.inf, -math.inf, -3e38]])
    assert select(row, 2) == [[1, 2]]
    assert select(row, 4) == [[0, 1, 2, 5]]
    assert select(row, 6) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_random_rows_ranges_and_ties(seed: int, levels: int) -> None:
    g = torch.Generator().manual_seed(seed)
    S, T = 23, int(torch.randint(1, 150, (), generator=g))
    scores_ST = torch.randint(-levels, levels + 1, (S, T), generator=g).float() * 0.5
    scores_ST = torch.where(torch.rand(S, T, generator=g) < 0.3, -scores_ST, scores_ST)  # makes -0.0 too
    bounds = torch.randint(0, T + 1, (S, 2), generator=g).sort(1).values.tolist()
    for k in (1, 2, T // 2 + 1, T, T + 5):
        select(scores_ST, k, [tuple(span) for span in bounds])


def test_strided_scores() -> None:
    scores_TS = torch.randn(90, 31, generator=torch.Generator().manual_seed(3))
    select(scores_TS.T, 7)
    select(torch.randn(8, 200, generator=torch.Generator().manual_seed(4))[:, 3::2], 7)


def test_long_rows() -> None:
    g = torch.Generator().manual_seed(7)
    select(torch.randn(3, 9001, generator=g), 2048, [(0, 9001), (13, 8999), (8000, 9001)])
    select(torch.relu(torch.randn(3, 9001, generator=g) - 1.5), 2048, [(0, 9001), (13, 8999), (8000, 9001)])


# select_topk: what is refused


def test_nan_raises_only_inside_the_range() -> None:
    scores_ST = torch.arange(20.0).reshape(2, 10)
    scores_ST[1, 6] = math.nan
    for k in (1, 3, 10, 30):
        with pytest.raises(ValueError, match="(?i)nan"):
            ops.select_topk(scores_ST, k, int32(0, 0), int32(10, 10))
        with pytest.raises(ValueError, match="(?i)nan"):
            ops.select_topk(scores_ST, k, int32(0, 6), int32(10, 7))
        select(scores_ST, k, [(0, 10), (0, 6)])
        select(scores_ST, k, [(0, 10), (7, 10)])
        select(scores_ST, k, [(0, 10), (6, 6)])


def test_nan_is_not_made_up_for_by_ties() -> None:
    """Of the three largest one is NaN and two more equal the last: as many keys as wanted reach it."""
    with pytest.raises(ValueError, match="(?i)nan"):
        select(torch.tensor([[math.nan, 2.0, 1.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]]), 3)


def test_anything_may_stand_outside_the_range() -> None:
    scores_ST = torch.tensor([[math.inf, math.nan, 1.0, 2.0, math.nan, math.inf]])
    assert select(scores_ST, 1, [(2, 4)]) == [[3]]
    assert select(scores_ST, 4, [(2, 4)]) == [[2, 3, -1, -1]]


def test_bad_input_is_refused() -> None:
    scores_ST, starts, ends = torch.zeros(2, 5), int32(0, 0), int32(5, 5)
    for arguments, named in (
        ((scores_ST, 0, starts, ends), "k"),
        ((scores_ST, -3, starts, ends), "-3"),
        ((scores_ST[0], 2, starts, ends), "scores"),
        ((scores_ST, 2, starts[:1], ends), "starts"),
        ((scores_ST, 2, starts, ends[:1]), "ends"),
        ((scores_ST, 2, starts, ends + 1), "6"),
        ((scores_ST, 2, starts - 1, ends), "-1"),
    ):
        with pytest.raises(ValueError, match=named):
            ops.select_topk(*arguments)
    x = make(CASES[0])
    for k in (0, -1):
        with pytest.raises(ValueError, match="k"):
            ops.index_topk(x.q_SID, x.k_TD, x.w_SI, k, x.starts_S, x.ends_S)
    with pytest.raises(ValueError, match="starts"):
        ops.index_topk(x.q_SID, x.k_TD, x.w_SI, 4, x.starts_S[1:], x.ends_S)


# index_topk: the fused op


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_index_topk_is_select_of_scores(case: Case, dtype: str) -> None:
    x = make(dataclasses.replace(case, dtype=dtype))
    scores_ST = ops.index_scores(x.q_SID, x.k_TD, x.w_SI, x.starts_S, x.ends_S)
    actual = topk(x)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, ops.select_topk(scores_ST, x.k, x.starts_S, x.ends_S))
    assert torch.equal(actual, oracle.select_topk(scores_ST, x.k, x.starts_S, x.ends_S))
    assert torch.equal(actual, topk(x)), "not repeatable"


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.content in ("integers", "equal_keys", "zero_scores")], ids=str
)
def test_index_topk_breaks_exact_ties_as_the_oracle_does(case: Case) -> None:
    """These scores are exact or all equal, so the whole selection is known, ties included."""
    x = make(case)
    assert torch.equal(topk(x), x.indices_SK)


def test_index_topk_uses_the_key_scales() -> None:
    x = make(CASES[0])
    k_scale_T = torch.exp2(torch.arange(48) % 7 - 3.0)
    actual = ops.index_topk(x.q_SID, x.k_TD, x.w_SI, x.k, x.starts_S, x.ends_S, k_scale_T)
    scores_ST = ops.index_scores(x.q_SID, x.k_TD, x.w_SI, x.starts_S, x.ends_S, k_scale_T)
    assert torch.equal(actual, oracle.select_topk(scores_ST, x.k, x.starts_S, x.ends_S))
    assert not torch.equal(actual, topk(x))


def test_index_topk_past_every_block_size() -> None:
    """Full-precision scores, ranges anywhere: the fused answer, the two-step answer and one query at a time."""
    g = torch.Generator().manual_seed(0)
    S, T, k = 331, 1733, 50
    q, key, w = torch.randn(S, 3, 16, generator=g), torch.randn(T, 16, generator=g), torch.randn(S, 3, generator=g)
    starts, ends = torch.randint(0, T + 1, (S, 2), generator=g).sort(1).values.int().contiguous().unbind(1)
    together = ops.index_topk(q, key, w, k, starts, ends)
    scores_ST = ops.index_scores(q, key, w, starts, ends)
    assert torch.equal(together, ops.select_topk(scores_ST, k, starts, ends))
    for t in range(0, S, 10):
        one = slice(t, t + 1)
        assert torch.equal(ops.index_topk(q[one], key, w[one], k, starts[one], ends[one])[0], together[t])


def test_index_topk_of_nan_inputs() -> None:
    x = make(Case("two documents", causal(10, 10), keys=20, k=3))
    k_TD = x.k_TD.clone()
    k_TD[4] = math.nan
    with pytest.raises(ValueError, match="(?i)nan"):
        ops.index_topk(x.q_SID, k_TD, x.w_SI, x.k, x.starts_S, x.ends_S)
    second = slice(10, 20)
    actual = ops.index_topk(x.q_SID[second], k_TD, x.w_SI[second], x.k, x.starts_S[second], x.ends_S[second])
    assert torch.equal(actual, topk(x)[second])
