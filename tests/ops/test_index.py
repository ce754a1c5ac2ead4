"""index_scores: equation (1), and the promise that a score is bitwise the same however the work was cut."""

import dataclasses
import math

import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, Case, Document, Inputs, make
from tokensieve import ops

# float32: a score is H_I weighted terms of D-long dot products; with N(0, 1)-sized scores about 64 roundings of
# 2**-24 in the worst order. float64: 2**-53 leaves five digits to spare. bf16 inputs are exact in float32, and scores
# come out in float32.
TOLERANCE = {"float32": 4e-6, "bfloat16": 4e-6, "float64": 1e-12}
WIDTHS = [(3, 16), (4, 32), (8, 32), (64, 128), (5, 24), (1, 8)]


def scores(x: Inputs, k_scale_T: torch.Tensor | None = None) -> torch.Tensor:
    return ops.index_scores(x.q_SID, x.k_TD, x.w_SI, x.starts_S, x.ends_S, k_scale_T)


def draw(S: int, T: int, heads: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    """Full-precision normals: sums whose rounding shows any change of order."""
    g = torch.Generator().manual_seed(seed)
    q_SID = torch.randn(S, heads, width, generator=g).to(dtype)
    k_TD = torch.randn(T, width, generator=g).to(dtype)
    w_SI = torch.randn(S, heads, generator=g) * (heads * width) ** -0.5
    return q_SID, k_TD, w_SI.double() if dtype == torch.float64 else w_SI


def size(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def whole(S: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query sees every key."""
    return torch.zeros(S, dtype=torch.int32), torch.full((S,), T, dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, dtype: str) -> None:
    x = make(dataclasses.replace(case, dtype=dtype))
    actual, visible_ST = scores(x), x.visible_ST()
    assert actual.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert actual.shape == visible_ST.shape
    expected = oracle.index_scores(x.q_SID, x.k_TD, x.w_SI)
    floor = size(x.w_SI) * size(x.q_SID) * size(x.k_TD)
    oracle.assert_close(actual[visible_ST], expected[visible_ST], TOLERANCE[dtype], floor, "scores")


@pytest.mark.parametrize("content", ["integers", "zero_scores"])
def test_exact_inputs_give_exact_scores(content: str) -> None:
    for case in CASES:
        if case.content == content:
            x = make(case)
            visible_ST = x.visible_ST()
            expected = oracle.index_scores(x.q_SID, x.k_TD, x.w_SI)
            assert torch.equal(scores(x)[visible_ST].double(), expected[visible_ST]), case.name


def test_key_scales_multiply_scores() -> None:
    x = make(CASES[1])
    k_scale_T = torch.rand(x.k_TD.shape[0], generator=torch.Generator().manual_seed(1)) + 0.25
    visible_ST = x.visible_ST()
    expected = oracle.index_scores(x.q_SID, x.k_TD, x.w_SI, k_scale_T)
    oracle.assert_close(
        scores(x, k_scale_T)[visible_ST], expected[visible_ST], TOLERANCE["float32"], what="scaled scores"
    )


def test_fp8_inputs() -> None:
    """E4M3 values are exact in float32, so quantised inputs are as accurate as any other."""
    case = Case("fp8", (CASES[0].documents), keys=48, k=8, index_dim=32)
    x = make(case)
    x = dataclasses.replace(x, q_SID=x.q_SID.to(torch.float8_e4m3fn), k_TD=x.k_TD.to(torch.float8_e4m3fn))
    k_scale_T = torch.exp2(torch.arange(48) % 5 - 2.0)
    visible_ST = x.visible_ST()
    actual = scores(x, k_scale_T)
    assert actual.dtype == torch.float32
    expected = oracle.index_scores(x.q_SID.float(), x.k_TD.float(), x.w_SI, k_scale_T)
    oracle.assert_close(actual[visible_ST], expected[visible_ST], TOLERANCE["float32"], what="fp8 scores")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "width"), WIDTHS)
def test_bitwise_the_same_for_every_split_of_the_queries(heads: int, width: int, dtype: torch.dtype) -> None:
    S, T = 67, 301
    q, k, w = draw(S, T, heads, width, dtype)
    starts, ends = whole(S, T)
    together = ops.index_scores(q, k, w, starts, ends)
    for sizes in ([1] * S, [2, 3, 5, 7, 11, 13, 17, 9], [64, 3], [33, 34]):
        parts = [
            ops.index_scores(q_s, k, w_s, s_s, e_s)
            for q_s, w_s, s_s, e_s in zip(*(x.split(sizes) for x in (q, w, starts, ends)), strict=True)
        ]
        assert torch.equal(torch.cat(parts), together), f"queries cut as {sizes}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "width"), WIDTHS)
def test_bitwise_the_same_wherever_the_keys_lie(heads: int, width: int, dtype: torch.dtype) -> None:
    """A document alone; the same inside a longer pack, at an odd offset, among other queries."""
    S, T = 35, 203
    q, k, w = draw(S, T, heads, width, dtype)
    starts = torch.zeros(S, dtype=torch.int32)
    ends = torch.arange(T - S + 1, T + 1, dtype=torch.int32)
    alone = ops.index_scores(q, k, w, starts, ends)
    other_q, other_k, other_w = draw(90, 700, heads, width, dtype, seed=1)
    for before_S, offset in ((0, 1), (1, 64), (29, 37), (90, 497)):
        packed = ops.index_scores(
            torch.cat([other_q[:before_S], q, other_q[before_S:]]),
            torch.cat([other_k[:offset], k, other_k[offset:]]),
            torch.cat([other_w[:before_S], w, other_w[before_S:]]),
            torch.cat(
                [
                    torch.zeros(before_S, dtype=torch.int32),
                    starts + offset,
                    torch.zeros(90 - before_S, dtype=torch.int32),
                ]
            ),
            torch.cat([torch.full((before_S,), 9), ends + offset, torch.full((90 - before_S,), 900)]).int(),
        )[before_S : before_S + S, offset : offset + T]
        for t in range(S):
            assert torch.equal(packed[t, : ends[t]], alone[t, : ends[t]]), f"query {t}, keys moved by {offset}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bitwise_the_same_for_every_part_of_the_keys(dtype: torch.dtype) -> None:
    """Keys [start, end) on their own: each then stands in another place of the products that compute it."""
    g = torch.Generator().manual_seed(0)
    for heads, width, T in ((1, 32, 64), (8, 40, 64), (5, 24, 130), (4, 8, 1100), (64, 128, 500)):
        q, k, w = draw(3, T, heads, width, dtype)
        together = ops.index_scores(q, k, w, *whole(3, T))
        for start, end in torch.randint(0, T + 1, (20, 2), generator=g).sort(1).values.tolist():
            alone = ops.index_scores(q, k[start:end], w, *whole(3, end - start))
            assert torch.equal(alone, together[:, start:end]), f"{heads} heads of {width}, keys [{start}, {end}) of {T}"


@pytest.mark.parametrize(("heads", "width"), WIDTHS)
def test_bitwise_the_same_for_prefill_and_decode(heads: int, width: int) -> None:
    """Each query of a causal prefill, alone, against a cache that holds only the keys so far or that has room for
    more."""
    S = 70
    q, k, w = draw(S, S, heads, width)
    starts, ends = torch.zeros(S, dtype=torch.int32), torch.arange(1, S + 1, dtype=torch.int32)
    prefill = ops.index_scores(q, k, w, starts, ends)
    room = torch.cat([k, torch.full((58, width), 3.0)])
    for t in range(S):
        for cache in (k[: t + 1], room):
            step = ops.index_scores(q[t : t + 1], cache, w[t : t + 1], int32(0), int32(t + 1))
            assert torch.equal(step[0, : t + 1], prefill[t, : t + 1]), f"decode step {t}"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "width"), [(4, 16), (8, 32), (5, 64), (64, 128)])
def test_bitwise_the_same_for_one_query_and_many_over_a_long_range(heads: int, width: int, threads: int) -> None:
    """In decode a tile of keys is as long as its heads allow: 16,320 keys of 8 heads, where prefill takes 1,920."""
    S, T = 40, 17_000
    q_SID, k_TD, w_SI = draw(S, T, heads, width, seed=heads)
    starts_S, ends_S = torch.zeros(S, dtype=torch.int32), torch.arange(T - S + 1, T + 1, dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = ops.index_scores(q_SID, k_TD, w_SI, starts_S, ends_S)
        for t in (0, 17, S - 1):
            one = slice(t, t + 1)
            alone = ops.index_scores(q_SID[one], k_TD, w_SI[one], starts_S[one], ends_S[one])
            seen = int(ends_S[t])
            assert torch.equal(alone[0, :seen].view(torch.int32), together[t, :seen].view(torch.int32))
    finally:
        torch.set_num_threads(before)


def test_bitwise_the_same_for_every_memory_layout_and_thread_count() -> None:
    S, T, heads, width = 67, 301, 4, 24
    q, k, w = draw(S, T, heads, width)
    starts, ends = whole(S, T)
    expected = ops.index_scores(q, k, w, starts, ends)
    strided = (q.transpose(0, 1).contiguous().transpose(0, 1), k.T.contiguous().T, w.T.contiguous().T)
    assert torch.equal(ops.index_scores(*strided, starts, ends), expected)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, w)]
    assert torch.equal(ops.index_scores(*shifted, starts, ends), expected), "inputs off their alignment"
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(ops.index_scores(q, k, w, starts, ends), expected), f"{n} threads"
    finally:
        torch.set_num_threads(threads)


def test_bitwise_the_same_past_every_block_size() -> None:
    """Ranges that begin and end anywhere in long inputs, against each query alone with just its own keys."""
    S, T, heads, width = 530, 2311, 3, 16
    q, k, w = draw(S, T, heads, width)
    g = torch.Generator().manual_seed(5)
    starts = torch.randint(0, T, (S,), generator=g).int()
    ends = torch.minimum(starts + torch.randint(0, T, (S,), generator=g), torch.tensor(T)).int()
    together = ops.index_scores(q, k, w, starts, ends)
    for t in range(0, S, 7):
        start, end = starts[t].item(), ends[t].item()
        alone = ops.index_scores(q[t : t + 1], k[start:end], w[t : t + 1], int32(0), int32(end - start))
        assert torch.equal(alone[0], together[t, start:end]), f"query {t} with keys [{start}, {end})"


def test_other_documents_may_hold_anything() -> None:
    """NaN and infinity in keys that a query cannot see do not reach its scores."""
    x = make(Case("garbage outside", (Document(40, 40, 40),), keys=120, k=8))
    clean = scores(x)[:, 40:80]
    k_TD = x.k_TD.clone()
    k_TD[:40], k_TD[80:] = math.nan, math.inf
    dirty = ops.index_scores(x.q_SID, k_TD, x.w_SI, x.starts_S, x.ends_S)[:, 40:80]
    visible = x.visible_ST()[:, 40:80]
    assert torch.equal(dirty[visible], clean[visible])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_oracle(case: Case) -> None:
    """Of q, k and w, for cotangents that hold NaN outside the ranges: what is unspecified must not flow back."""
    x = make(case)
    visible_ST = x.visible_ST()
    cotangent_ST = torch.randn(visible_ST.shape, generator=torch.Generator().manual_seed(1)).double()
    leaves64 = [tensor.double().requires_grad_() for tensor in (x.q_SID, x.k_TD, x.w_SI)]
    expected = torch.autograd.grad(oracle.index_scores(*leaves64), leaves64, cotangent_ST * visible_ST)
    floors = (size(x.w_SI) * size(x.k_TD), size(x.w_SI) * size(x.q_SID), size(x.q_SID) * size(x.k_TD))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x.q_SID, x.k_TD, x.w_SI)]
        actual_ST = ops.index_scores(*leaves, x.starts_S, x.ends_S)
        gradients = torch.autograd.grad(actual_ST, leaves, cotangent_ST.to(dtype).masked_fill(~visible_ST, math.nan))
        for what, a, e, floor in zip("qkw", gradients, expected, floors, strict=True):
            oracle.assert_close(a, e, tolerance, floor, f"d {what} in {dtype}")


def test_gradcheck() -> None:
    x = make(
        Case(
            "gradcheck",
            (Document(0, 4, 4), Document(6, 5, 3)),
            keys=12,
            k=1,
            index_heads=3,
            index_dim=5,
            dtype="float64",
        )
    )
    assert torch.einsum("sid,td->sit", x.q_SID, x.k_TD).abs().min() > 1e-4, "too near the ReLU's kink for differences"
    visible_ST = x.visible_ST()
    leaves = [tensor.clone().requires_grad_() for tensor in (x.q_SID, x.k_TD, x.w_SI)]
    for k_scale_T in (None, torch.linspace(0.5, 2.0, 12, dtype=torch.float64)):
        assert torch.autograd.gradcheck(
            lambda q, k, w, k_scale_T=k_scale_T: ops.index_scores(q, k, w, x.starts_S, x.ends_S, k_scale_T)[visible_ST],
            leaves,
        )


def test_bad_input_is_refused() -> None:
    q, k, w = draw(6, 9, 2, 8)
    starts, ends = whole(6, 9)
    for arguments, named in (
        ((q, k[:, :7], w, starts, ends), "7"),
        ((q, k, w[:, :1], starts, ends), "w"),
        ((q, k, w[:5], starts, ends), "w"),
        ((q, k, w, starts[:5], ends), "starts"),
        ((q, k, w, starts, ends[:5]), "ends"),
        ((q[0], k, w, starts, ends), "q"),
        ((q, k, w, starts, ends + 1), "10"),
        ((q, k, w, starts - 1, ends), "-1"),
        ((q, k, w, starts, ends, torch.ones(8)), "k_scale"),
    ):
        with pytest.raises(ValueError, match=named):
            ops.index_scores(*arguments)
