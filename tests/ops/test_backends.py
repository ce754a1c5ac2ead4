"""Which backend runs, by name and by itself; and PyTorch's fused dense attention against the oracle."""

import dataclasses
from unittest.mock import Mock

import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, Case, Inputs, causal, make
from tokensieve import ops
from tokensieve.ops import dispatch, fused
from tokensieve.ops.backend import Backend
from tokensieve.ops.triton import limits

# The cases that are a causal pack of whole documents, which is all that the fused kernels take.
PACKS = [
    case
    for case in CASES
    if case.queries == case.keys > 0
    and case.documents == causal(*(document.keys for document in case.documents))
    and case.content != "none_selected"
]
# As in test_attention.py; in bf16 the fused kernel rounds the probabilities before they meet V, and its backward
# rounds more.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


def pack(case: Case) -> dict:
    lengths = torch.tensor([0, *(document.keys for document in case.documents)])
    return {"bounds": lengths.cumsum(0).int(), "longest": int(lengths.max())}


def dense(x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.dense_attention(q, k, v, x.starts_S, x.ends_S, x.scale, **how)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", PACKS, ids=str)
def test_fused_dense_attention_equals_the_oracle(case: Case, dtype: str) -> None:
    """Values, and the gradients of a loss on the output alone, as in training."""
    x = make(dataclasses.replace(case, dtype=dtype))
    leaves = [t.detach().clone().requires_grad_() for t in (x.q_SHD, x.k_TGD, x.v_TGV)]
    leaves64 = [t.detach().double().requires_grad_() for t in leaves]
    out, lse = dense(x, *leaves, **pack(case), backend="fused")
    out64, lse64 = oracle.dense_attention(*leaves64, x.starts_S, x.ends_S, x.scale)
    assert out.dtype == x.q_SHD.dtype and lse.dtype == torch.float32
    natural = [z.abs().max().item() for z in (x.v_TGV, x.scale * x.k_TGD, x.scale * x.q_SHD)]
    oracle.assert_close(out, out64, TOLERANCE[dtype], natural[0], "out")
    oracle.assert_close(lse, lse64, 1e-5 if dtype == "float32" else 1e-4, 1.0, "lse")
    lost = 2 * oracle.lse_rounding(lse64, x.q_SHD.dtype)
    if max(lost, TOLERANCE[dtype]) > 0.5 or (dtype == "bfloat16" and case.content == "integers"):
        return
    cotangent = torch.exp2(torch.randint(-3, 1, out.shape, generator=torch.Generator().manual_seed(1)).double())
    for what, a, e, floor in zip(
        "qkv",
        torch.autograd.grad(out, leaves, cotangent.to(out.dtype)),
        torch.autograd.grad(out64, leaves64, cotangent),
        (natural[1], max(natural[2], 1.0), 1.0),
        strict=True,
    ):
        assert a.dtype == out.dtype
        oracle.assert_close(a, e, max(lost, TOLERANCE[dtype]), floor, f"d {what}")


def test_fused_past_every_block_size() -> None:
    """Long ragged documents, a key wider than its value and a value wider than its key, gradients through the logsumexp
    too, against the reference backend."""
    for d_k, d_v in ((40, 24), (16, 32)):
        entry = {"entry": 64, "d_k": d_k, "v_start": 20, "d_v": d_v}
        case = Case("long pack", causal(700, 1, 66, 513, 32), keys=1312, k=1, heads=4, groups=2, **entry)
        q, kv, dlse = torch.randn(1312, 4, d_k), torch.randn(1312, 2, 64), torch.randn(1312, 4)
        ranges = [span for document in case.documents for span in document.ranges()]
        starts, ends = torch.tensor(ranges, dtype=torch.int32).unbind(1)
        results = []
        for how in ({"backend": "reference"}, {**pack(case), "backend": "fused"}):
            leaves = [t.clone().requires_grad_() for t in (q, kv[..., :d_k], kv[..., 20 : 20 + d_v])]
            out, lse = ops.dense_attention(*leaves, starts, ends, 0.2, **how)
            results.append((out, lse))
            for loss in (out.sum(), (lse * dlse).sum(), out.sum() + (lse * dlse).sum()):
                results[-1] += torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)
        for a, e in zip(*results, strict=True):
            oracle.assert_close(a, e, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("d_k", "d_v"), [(48, 32), (20, 13)])  # the bundled model's, and none of the kernel's own
def test_fused_on_cuda_equals_the_reference(d_k: int, d_v: int) -> None:
    """Variable-length flash attention in bf16, values and gradients."""
    case = Case("long pack", causal(700, 1, 66, 513, 32), 1312, 1, heads=8, groups=8, entry=80, d_k=d_k, d_v=d_v)
    q, k, v = (torch.randn(1312, 8, width).bfloat16().cuda() for width in (d_k, d_k, d_v))
    ranges = [span for document in case.documents for span in document.ranges()]
    starts, ends = torch.tensor(ranges, dtype=torch.int32).cuda().unbind(1)
    shape = {"bounds": pack(case)["bounds"].cuda(), "longest": pack(case)["longest"]}
    dlse, results = torch.randn(1312, 8).cuda(), []
    for how in ({"backend": "reference"}, {**shape, "backend": "fused"}):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ops.dense_attention(*leaves, starts, ends, 0.2, **how)
        results.append((out, lse, *torch.autograd.grad(out.sum() + (lse * dlse).sum(), leaves)))
    for a, e in zip(*results, strict=True):
        oracle.assert_close(a.cpu(), e.cpu(), TOLERANCE["bfloat16"])


def chunk(
    S: int, T: int, device: str, dtype: torch.dtype, groups: int = 4, d_k: int = 192, d_v: int = 128
) -> tuple[list, dict]:
    """The last S of T tokens: arguments, and what lets them be fused."""
    g = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(n, heads, width, generator=g).to(dtype).to(device)
        for n, heads, width in ((S, 4, d_k), (T, groups, d_k), (T, groups, d_v))
    )
    ends = torch.arange(T - S + 1, T + 1, dtype=torch.int32, device=device)
    bounds = torch.tensor([0, T], dtype=torch.int32, device=device)
    return [q, k, v, torch.zeros_like(ends), ends, 0.05], {"bounds": bounds, "longest": T}


@pytest.mark.parametrize(("S", "T"), [(1, 2), (5, 70), (64, 65), (130, 600)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fused_chunk_of_a_document(S: int, T: int, dtype: str) -> None:
    given, fused = chunk(S, T, "cpu", getattr(torch, dtype), groups=2)
    expected = oracle.dense_attention(*(x.double() for x in given[:3]), *given[3:])
    for actual, e, tolerance in zip(
        ops.dense_attention(*given, **fused, backend="fused"), expected, (TOLERANCE[dtype], 1e-4), strict=True
    ):
        oracle.assert_close(actual, e, tolerance, 1.0)
    with pytest.raises(ValueError, match="no gradient for a chunk"):
        leaves = [x.requires_grad_() for x in given[:3]]
        ops.dense_attention(*leaves, *given[3:], **fused, backend="fused")[0].sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize(("S", "T"), [(1, 2), (64, 65), (512, 5000)])
@pytest.mark.parametrize(("d_k", "d_v"), [(192, 128), (20, 13)])
def test_fused_chunk_on_cuda(S: int, T: int, d_k: int, d_v: int) -> None:
    given, fused = chunk(S, T, "cuda", torch.bfloat16, d_k=d_k, d_v=d_v)
    expected = ops.dense_attention(*given, backend="reference")
    for actual, e in zip(ops.dense_attention(*given, **fused, backend="fused"), expected, strict=True):
        oracle.assert_close(actual.cpu(), e.cpu(), TOLERANCE["bfloat16"], 1.0)


def test_a_gradient_through_the_logsumexp_too_wide_for_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="logsumexp for values 256 wide.*reference"):
        fused._with_dlse(torch.zeros(1, 1, 256), torch.zeros(1, 1), Mock(shape=(1, 1, 256), is_cuda=True), 256)


def test_auto_takes_fused_only_for_packs() -> None:
    x = make(CASES[0])
    tensors = (x.q_SHD, x.k_TGD, x.v_TGV)
    with_bounds, without = dense(x, *tensors, **pack(CASES[0])), dense(x, *tensors)
    for a, b in zip(with_bounds, dense(x, *tensors, **pack(CASES[0]), backend="fused"), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(without, dense(x, *tensors, backend="reference"), strict=True):
        assert torch.equal(a, b)


def test_a_backend_that_cannot_run_says_why() -> None:
    x = make(CASES[0])
    tensors = (x.q_SHD, x.k_TGD, x.v_TGV)
    with pytest.raises(ValueError, match="causal pack"):
        dense(x, *tensors, backend="fused")
    with pytest.raises(ValueError, match="(?s)float64.*auto"):
        dense(x, *(t.double() for t in tensors), **pack(CASES[0]), backend="fused")
    with pytest.raises(ValueError, match="fused cannot run|cannot run select_topk"):
        ops.select_topk(torch.zeros(2, 3), 1, torch.zeros(2).int(), torch.ones(2).int(), backend="fused")
    with pytest.raises(ValueError, match="(?s)unknown backend 'cudnn'.*reference"):
        ops.select_topk(torch.zeros(2, 3), 1, torch.zeros(2).int(), torch.ones(2).int(), backend="cudnn")


def test_auto_passes_over_what_is_slower(monkeypatch) -> None:
    """Asked for by name it runs all the same."""
    first, *rest = (
        Backend(name, f"tokensieve.ops.{name}", ("select_topk",), (), lambda op, q, operands: None)
        for name in ("fused", "reference")
    )
    for slow, chosen in ((None, "fused"), ("it is slower here", "reference")):
        both = dataclasses.replace(first, slower=lambda op, q, operands, why=slow: why), *rest
        monkeypatch.setattr(dispatch, "BACKENDS", both)
        monkeypatch.setattr(dispatch, "candidates", lambda op, device, both=both: both)
        for backend, name in (("auto", chosen), ("fused", "fused")):
            assert dispatch.pick("select_topk", torch.zeros(1), backend, {}).__name__ == f"tokensieve.ops.{name}"


def test_backends_lists_every_op() -> None:
    listed = ops.backends("cpu")
    assert set(listed) == set(ops.OPS)
    for op, rows in listed.items():
        names = [name for name, _ in rows if name != "interpreter"]
        assert names == (["fused", "reference"] if op == "dense_attention" else ["reference"])
        assert dict(rows)["reference"] is None


def test_what_the_triton_kernels_do_not_take(monkeypatch) -> None:
    """On the meta device: nothing is computed, only asked."""
    triton = next(b for b in dispatch.BACKENDS if b.name == "triton")

    def why_not(op: str, width: int, dtype: torch.dtype, other: torch.dtype | None = None, **changes) -> str:
        q, k = (torch.empty(1, 1, width, dtype=x or dtype, device="meta") for x in (dtype, other))
        index = torch.empty(1, 1, 64, dtype=torch.bfloat16, device="meta")
        operands = {"k": k, "kv": k, "v_start": 0, "d_v": 64} | changes
        if op in ("sparse_attention_kl", "indexer_kl_dense"):
            operands = {"q_I": index, "k_I": index} | operands
        return str(triton.limits(op, q, operands))

    def index(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(1, 1, width, dtype=dtype, device="meta")

    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    monkeypatch.setattr(limits, "is_hopper", lambda device: True)
    taken = str(limits.no_triton())
    assert why_not("sparse_attention", 576, bf16, d_v=512) == taken
    assert why_not("sparse_attention", 256, bf16, v_start=256, d_v=256) == taken
    assert why_not("sparse_attention_kl", 576, bf16, d_v=512) == taken
    assert why_not("indexer_kl_dense", 192, bf16) == taken
    assert why_not("index_topk", 128, fp8) == taken
    assert why_not("select_topk", 9999, torch.float32) == taken
    assert why_not("masked_attention", 192, bf16, v=index(256, bf16)) == taken
    assert "wider than 576" in why_not("sparse_attention", 640, bf16)
    assert "wider than 128" in why_not("index_scores", 256, bf16)
    assert "float64" in why_not("sparse_attention", 64, torch.float64)
    assert "bfloat16" in why_not("select_topk", 64, bf16)
    # what is not seen by looking at q alone
    assert "bfloat16 with torch.float32" in why_not("sparse_attention", 64, bf16, torch.float32)
    assert "e4m3fn with torch.bfloat16" in why_not("index_topk", 128, fp8, bf16)
    assert "bfloat16 with torch.float16" in why_not("indexer_kl_dense", 192, bf16, torch.float16)
    for op in ("sparse_attention_kl", "indexer_kl_dense"):
        assert "wider than 128" in why_not(op, 64, bf16, q_I=index(256, bf16))
        assert "takes torch.float8" in why_not(op, 64, bf16, q_I=index(128, fp8))
        assert "bfloat16 with torch.float32" in why_not(op, 64, bf16, k_I=index(64, torch.float32))
    assert "wider than 256" in why_not("sparse_attention", 576, bf16, v_start=64, d_v=512)
    assert "wider than 256" in why_not("sparse_attention", 64, bf16, d_v=512)
    assert "wider than 256" in why_not("sparse_attention_kl", 300, bf16, d_v=300)
    assert "wider than 256" in why_not("masked_attention", 64, bf16, v=index(320, bf16))
    assert "float16 with torch.bfloat16" in why_not("masked_attention", 64, bf16, v=index(64, torch.float16))
    monkeypatch.setattr(limits, "is_hopper", lambda device: False)
    assert why_not("sparse_attention_kl", 80, bf16) == taken
    assert why_not("sparse_attention", 128, bf16, v_start=128, d_v=128) == taken
    assert "wider than 128" in why_not("sparse_attention", 576, bf16, d_v=512)
    assert "wider than 128" in why_not("sparse_attention", 128, bf16, d_v=256)
    assert "wider than 64" in why_not("index_topk", 128, bf16)
    assert "wider than 128" in why_not("masked_attention", 192, bf16, v=index(128, bf16))
    assert "no dense_attention" in str(triton.why_not("dense_attention", torch.empty(1, 1, 1), {}))
    assert "not run on cpu" in str(triton.why_not("sparse_attention", torch.empty(1, 1, 1), {}))


def test_auto_sees_every_operand() -> None:
    """Where the queries alone would do for fused kernels and kernels, but the keys do not."""
    x = make(CASES[0])
    out, lse = dense(x, x.q_SHD, x.k_TGD.double(), x.v_TGV.double(), **pack(CASES[0]))
    same = dense(x, x.q_SHD, x.k_TGD, x.v_TGV, backend="reference")
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
    with pytest.raises(ValueError, match="float32 with torch.float64"):
        dense(x, x.q_SHD, x.k_TGD.double(), x.v_TGV, **pack(CASES[0]), backend="fused")
