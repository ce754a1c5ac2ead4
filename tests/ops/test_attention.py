"""sparse_attention, masked_attention, dense_attention: values and gradients against the oracle, and against each
other."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.support import oracle
from tests.support.cases import CASES, Case, Document, Inputs, causal, make
from tokensieve import ops

# Relative to the natural size of a quantity. float32: a logit is a D-long dot product (24 roundings of 2**-24 at our
# widths, 576 at MLA's) and lse inherits its error; gradients sum over the queries as well. bf16: results are rounded
# to 8 bits (2**-9 each) and a backend may round the probabilities before they meet V, but sums are float32, so lse
# stays as good as float32's.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1.5e-2}
LSE_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-4}

Attention = Callable[..., tuple[Tensor, Tensor]]


def sparse_of(attention: Attention, x: Inputs) -> tuple[Attention, tuple[Tensor, ...]]:
    return lambda q, kv: attention(q, kv, x.indices_SK, x.scale, **x.parts), (x.q_SHD, x.kv_TGE)


def masked_of(attention: Attention, x: Inputs) -> tuple[Attention, tuple[Tensor, ...]]:
    copies = x.q_SHD.shape[1] // x.kv_TGE.shape[1]
    k_THD, v_THV = x.k_TGD.repeat_interleave(copies, 1), x.v_TGV.repeat_interleave(copies, 1)
    return lambda q, k, v: attention(q, k, v, x.indices_SK, x.scale), (x.q_SHD, k_THD, v_THV)


def dense_of(attention: Attention, x: Inputs) -> tuple[Attention, tuple[Tensor, ...]]:
    return lambda q, k, v: attention(q, k, v, x.starts_S, x.ends_S, x.scale), (x.q_SHD, x.k_TGD, x.v_TGV)


KINDS = {
    "sparse": (sparse_of, ops.sparse_attention, oracle.sparse_attention),
    "masked": (masked_of, ops.masked_attention, oracle.masked_attention),
    "dense": (dense_of, ops.dense_attention, oracle.dense_attention),
}


def size(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def run(attention: Attention, tensors: tuple[Tensor, ...], cotangents: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """out, lse and the gradient of every tensor."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out, lse = attention(*leaves)
    gradients = torch.autograd.grad(
        (out, lse), leaves, tuple(c.to(o.dtype) for c, o in zip(cotangents, (out, lse), strict=True))
    )
    return out, lse, *gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, kind: str) -> None:
    wrap, op, reference = KINDS[kind]
    g = torch.Generator().manual_seed(1)
    # Powers of two: exact in bf16, so that both sides get the same cotangents.
    out_SHV, lse_SH = (case.queries, case.heads, case.d_v), (case.queries, case.heads)
    cotangents = tuple(torch.exp2(torch.randint(-3, 1, shape, generator=g).double()) for shape in (out_SHV, lse_SH))
    # The float64 run takes the float32 inputs as they are, so that the two share one run of the oracle.
    for rounded, dtypes in (("float32", ("float32", "float64")), ("bfloat16", ("bfloat16",))):
        x = make(dataclasses.replace(case, dtype=rounded))
        function, tensors = wrap(reference, x)
        expected = run(function, tuple(tensor.double() for tensor in tensors), cotangents)
        natural_q, natural_k = x.scale * size(x.k_TGD), x.scale * size(x.q_SHD)
        floors = {"out": size(x.v_TGV), "lse": 1.0, "d q": natural_q, "d k": max(natural_k, 1.0), "d v": 1.0}
        for dtype in dtypes:
            wrapped, tensors = wrap(op, x.to(getattr(torch, dtype)))
            actual = run(wrapped, tensors, cotangents)
            assert actual[0].dtype == getattr(torch, dtype)
            assert actual[1].dtype == (torch.float64 if dtype == "float64" else torch.float32)
            for tensor, gradient in zip(tensors, actual[2:], strict=True):
                assert gradient.dtype == tensor.dtype
            for (what, floor), a, e in zip(floors.items(), actual, expected, strict=False):
                tolerance = LSE_TOLERANCE[dtype] if what == "lse" else TOLERANCE[dtype]
                if what.startswith("d "):
                    tolerance = max(tolerance, 2 * oracle.lse_rounding(expected[1], x.q_SHD.dtype))
                if tolerance > 0.5:  # the probabilities of the backward have no digit left: only that they are numbers
                    assert a.isfinite().all(), f"{kind} {what} in {dtype}"
                else:
                    oracle.assert_close(a, e, tolerance, floor, f"{kind} {what} in {dtype}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    """Numerical derivatives, output by output, of every input; 3 heads or grouped entries, ragged documents, short
    rows."""
    for case in (
        Case("gradcheck", causal(3, 1, 4), keys=8, k=2, heads=3, entry=4, d_k=3, v_start=1, d_v=3),
        Case(
            "gradcheck groups", (Document(2, 5, 2),), keys=8, k=3, heads=4, groups=2, entry=5, d_k=3, v_start=3, d_v=2
        ),
    ):
        wrap, op, _ = KINDS[kind]
        wrapped, tensors = wrap(op, make(dataclasses.replace(case, dtype="float64")))
        assert gradcheck(wrapped, [tensor.detach().clone().requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_one_output_or_one_input_only(kind: str) -> None:
    wrap, op, reference = KINDS[kind]
    x = make(dataclasses.replace(next(case for case in CASES if case.name == "empty rows"), dtype="float64"))
    wrapped, tensors = wrap(op, x)
    expected_of = wrap(reference, x)[0]
    for output in (0, 1):
        for wanted in range(len(tensors)):
            gradients = []
            for function in (wrapped, expected_of):
                inputs = [tensor.detach().clone().requires_grad_(i == wanted) for i, tensor in enumerate(tensors)]
                y = function(*inputs)[output]
                # lse does not depend on the values
                computed = (
                    torch.autograd.grad(y, inputs[wanted], torch.ones_like(y), allow_unused=True)
                    if y.requires_grad
                    else (None,)
                )
                gradients.append(computed[0])
            actual, expected = (torch.zeros_like(tensors[wanted]) if g is None else g for g in gradients)
            oracle.assert_close(actual, expected, 1e-10, what=f"d output {output} / d input {wanted}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_with_no_key(kind: str) -> None:
    """Zeros and -inf; nothing flows back through it, whatever its cotangent."""
    case = Case("nothing to see", (Document(0, 0, 2), Document(0, 5, 3), Document(5, 0, 1)), keys=5, k=3)
    for dtype in TOLERANCE:
        wrap, op, _ = KINDS[kind]
        wrapped, tensors = wrap(op, make(dataclasses.replace(case, dtype=dtype)))
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out, lse = wrapped(*leaves)
        empty = torch.tensor([0, 1, 5])
        assert torch.equal(out[empty], torch.zeros_like(out[empty]))
        assert torch.equal(lse[empty], torch.full_like(lse[empty], -math.inf))
        only_empty = torch.zeros_like(out), torch.zeros_like(lse)
        for cotangent in only_empty:
            cotangent[empty] = 3.0
        for gradient in torch.autograd.grad((out, lse), leaves, only_empty):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_dense_is_sparse_with_every_key_selected() -> None:
    for case in CASES:
        if case.content == "none_selected":
            continue
        x = make(dataclasses.replace(case, k=max(case.keys, 1), dtype="float64"))
        everything = ops.select_topk(torch.zeros(case.queries, case.keys), x.k, x.starts_S, x.ends_S)
        sparse = ops.sparse_attention(x.q_SHD, x.kv_TGE, everything, x.scale, **x.parts)
        dense = ops.dense_attention(x.q_SHD, x.k_TGD, x.v_TGV, x.starts_S, x.ends_S, x.scale)
        for what, a, e in zip(("out", "lse"), sparse, dense, strict=True):
            oracle.assert_close(a, e, 1e-12, what=f"{case.name}: {what}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_head_mass_is_the_mean_of_the_probabilities(case: Case) -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        x = make(dataclasses.replace(case, dtype=dtype))
        mass_ST = ops.head_mass(x.q_SHD, x.k_TGD, x.starts_S, x.ends_S, x.scale)
        assert mass_ST.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        expected = oracle.head_mass(x.q_SHD, x.k_TGD, x.starts_S, x.ends_S, x.scale)
        oracle.assert_close(mass_ST, expected, 1e-12 if dtype == "float64" else 1e-5, what=dtype)
        hidden_ST = mass_ST[~x.visible_ST()]
        assert torch.equal(hidden_ST, torch.zeros_like(hidden_ST))


@pytest.mark.parametrize("kind", [*KINDS, "mass"])
def test_nan_inputs_are_not_hidden(kind: str) -> None:
    """A NaN in a query shows in that query's results, and in no other's."""
    x = make(next(case for case in CASES if case.name == "prefill chunk"))
    x.q_SHD[3, 1, 2] = math.nan
    if kind == "mass":
        row = ops.head_mass(x.q_SHD, x.k_TGD, x.starts_S, x.ends_S, x.scale).isnan().any(1)
    else:
        wrap, op, _ = KINDS[kind]
        wrapped, tensors = wrap(op, x)
        row = wrapped(*tensors)[0].isnan().flatten(1).any(1)
    assert row.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_masked_heads_equal_absorbed_latent(dtype: str, tolerance: float) -> None:
    """MLA both ways: keys and values up-projected per head and masked, or the up-projections absorbed into q and
    out."""
    heads, latent, rope, nope, value = 5, 12, 4, 6, 7
    case = Case("mla", causal(19, 1, 23), keys=43, k=6, heads=heads, entry=latent + rope, d_k=latent + rope, d_v=latent)
    x = make(dataclasses.replace(case, dtype=dtype))
    g = torch.Generator().manual_seed(2)
    q_nope_SHN, up_k_HNC, up_v_HVC = (
        torch.randn(shape, generator=g).to(x.q_SHD.dtype)
        for shape in ((case.queries, heads, nope), (heads, nope, latent), (heads, value, latent))
    )
    q_rope_SHR, c_TC, k_rope_TR = x.q_SHD[..., latent:], x.kv_TGE[:, 0, :latent], x.kv_TGE[:, 0, latent:]

    k_THD = torch.cat([torch.einsum("tc,hnc->thn", c_TC, up_k_HNC), k_rope_TR[:, None].expand(-1, heads, -1)], -1)
    v_THV = torch.einsum("tc,hvc->thv", c_TC, up_v_HVC)
    out_mha, lse_mha = ops.masked_attention(
        torch.cat([q_nope_SHN, q_rope_SHR], -1), k_THD, v_THV, x.indices_SK, x.scale
    )

    q_absorbed = torch.cat([torch.einsum("shn,hnc->shc", q_nope_SHN, up_k_HNC), q_rope_SHR], -1)
    out_SHC, lse_mqa = ops.sparse_attention(q_absorbed, x.kv_TGE, x.indices_SK, x.scale, **x.parts)
    oracle.assert_close(out_mha, torch.einsum("shc,hvc->shv", out_SHC, up_v_HVC), tolerance, what="out")
    oracle.assert_close(lse_mha, lse_mqa, tolerance, what="lse")


@pytest.mark.parametrize("kind", KINDS)
def test_past_every_block_size(kind: str) -> None:
    """Few heads and many tokens: every query's blocks, against plain float64 attention under a mask."""
    S, T, K, H, D = 700, 1500, 96, 2, 8
    g = torch.Generator().manual_seed(0)
    q = torch.randn(S, H, D, generator=g, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(T, 1, D, generator=g, dtype=torch.float64, requires_grad=True)
    bounds = torch.randint(0, T + 1, (S, 2), generator=g).sort(1).values.int()
    starts, ends = bounds[:, 0].contiguous(), bounds[:, 1].contiguous()
    positions = torch.arange(T)
    visible_ST = (positions >= starts[:, None]) & (positions < ends[:, None])
    if kind == "dense":
        out, lse = ops.dense_attention(q, kv, kv, starts, ends, 0.5)
    else:
        indices = ops.select_topk(torch.randn(S, T, generator=g), K, starts, ends)
        visible_ST = torch.zeros(S, T + 1, dtype=torch.bool).scatter(1, indices.long() % (T + 1), True)[:, :T]
        if kind == "sparse":
            out, lse = ops.sparse_attention(q, kv, indices, 0.5, D, 0, D)
        else:
            out, lse = ops.masked_attention(q, kv.expand(-1, H, -1), kv.expand(-1, H, -1), indices, 0.5)
    logits = (0.5 * torch.einsum("shd,td->hst", q, kv[:, 0])).masked_fill(~visible_ST, -math.inf)
    rows = visible_ST.any(1)
    expected_lse = torch.logsumexp(logits[:, rows], -1).T
    expected = torch.einsum("hst,td->shd", torch.softmax(logits[:, rows], -1), kv[:, 0])
    oracle.assert_close(out[rows], expected, 1e-10, what="out")
    oracle.assert_close(lse[rows], expected_lse, 1e-10, what="lse")
    cotangents = (
        torch.randn(expected.shape, generator=g).double(),
        torch.randn(expected_lse.shape, generator=g).double(),
    )
    actual_gradients = torch.autograd.grad((out[rows], lse[rows]), (q, kv), cotangents)
    for what, a, e in zip(
        ("q", "kv"), actual_gradients, torch.autograd.grad((expected, expected_lse), (q, kv), cotangents), strict=True
    ):
        oracle.assert_close(a, e, 1e-10, what=f"d {what}")


@pytest.mark.parametrize("kind", KINDS)
def test_repeatable_bitwise_and_without_gradient(kind: str) -> None:
    wrap, op, _ = KINDS[kind]
    wrapped, tensors = wrap(op, make(CASES[1]))
    first, second = wrapped(*tensors), wrapped(*tensors)
    with torch.inference_mode():
        third = wrapped(*tensors)
    for a, b, c in zip(first, second, third, strict=True):
        assert not a.requires_grad
        assert torch.equal(a, b) and torch.equal(a, c)


def test_strided_inputs() -> None:
    for kind, (wrap, op, _) in KINDS.items():
        wrapped, tensors = wrap(op, make(next(case for case in CASES if case.groups == 2)))
        strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in tensors]
        plain = [tensor.detach().clone().contiguous().requires_grad_() for tensor in tensors]
        ones = [torch.ones_like(y) for y in wrapped(*plain)]
        for a, e in zip(run(wrapped, tuple(strided), ones), run(wrapped, tuple(plain), ones), strict=True):
            oracle.assert_close(a, e, 1e-5, what=kind)


def test_bad_input_is_refused() -> None:
    x = make(Case("bad input", causal(9), keys=9, k=4, heads=4, groups=2))
    q, kv, indices = x.q_SHD, x.kv_TGE, x.indices_SK
    beyond, below = indices.clone(), indices.clone()
    beyond[3, 0], below[3, 0] = 9, -2

    def sparse(q=q, kv=kv, indices=indices, d_k=24, v_start=0, d_v=16):
        return ops.sparse_attention(q, kv, indices, x.scale, d_k, v_start, d_v)

    k_THD, v_THV = kv.repeat_interleave(2, 1), kv.repeat_interleave(2, 1)[..., :16]

    def masked(q=q, k=k_THD, v=v_THV, indices=indices):
        return ops.masked_attention(q, k, v, indices, x.scale)

    def dense(q=q, k=kv, v=kv[..., :16], starts=x.starts_S, ends=x.ends_S):
        return ops.dense_attention(q, k, v, starts, ends, x.scale)

    for function, wrong, named in (
        (sparse, {"indices": beyond}, "9"),
        (sparse, {"indices": below}, "-2"),
        (sparse, {"indices": indices[:5]}, "indices"),
        (sparse, {"indices": indices.float()}, "indices"),
        (sparse, {"q": q[:, :3]}, "3"),
        (sparse, {"q": q[..., :20]}, "20"),
        (sparse, {"kv": kv[:, 0]}, "kv"),
        (sparse, {"d_k": 25}, "25"),
        (sparse, {"v_start": 9}, "25"),
        (sparse, {"v_start": -1}, "-1"),
        (sparse, {"d_v": 0}, "d_v"),
        (masked, {"indices": beyond}, "9"),
        (masked, {"indices": below}, "-2"),
        (masked, {"indices": indices[:5]}, "indices"),
        (masked, {"v": v_THV[:7]}, "v"),
        (masked, {"k": k_THD[..., :20]}, "20"),
        (dense, {"k": kv[:7]}, "k"),
        (dense, {"q": q[:, :3]}, "3"),
        (dense, {"k": kv[..., :20]}, "20"),
        (dense, {"starts": x.starts_S[:4]}, "starts"),
        (dense, {"ends": x.ends_S + 1}, "10"),
        (dense, {"starts": x.starts_S - 1}, "-1"),
    ):
        function()
        with pytest.raises(ValueError, match=named):
            function(**wrong)


# one token


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_token_alone_attends_as_in_company(case: Case) -> None:
    """Without a gradient a single query on the CPU has a path of its own; its scores keep their bits."""
    x = make(case)
    for s in range(x.q_SHD.shape[0]):
        one = slice(s, s + 1)
        index = (x.q_SID[one], x.k_TD, x.w_SI[one], x.k, x.starts_S[one], x.ends_S[one])
        attention = (x.q_SHD[one], x.kv_TGE, x.indices_SK[one], x.scale)
        want, want_lse = ops.sparse_attention(*attention, **x.parts)
        want_indices = ops.index_topk(*index)
        with torch.inference_mode():
            out, lse = ops.sparse_attention(*attention, **x.parts)
            indices = ops.index_topk(*index)
        assert torch.equal(indices, want_indices)
        assert out.dtype == want.dtype and lse.dtype == want_lse.dtype
        tolerance = TOLERANCE[case.dtype]
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance * size(want))
        torch.testing.assert_close(lse, want_lse, rtol=LSE_TOLERANCE[case.dtype], atol=LSE_TOLERANCE[case.dtype])
