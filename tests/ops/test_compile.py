"""The ops as PyTorch custom ops: their registration is sound, and torch.compile sees through them without a graph
break."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.cases import Case, Document, Inputs, causal, make
from tokensieve import ops
from tokensieve.ops.reference import PAGED_OPS

CASE = Case(
    "compiled",
    causal(7, 1, 5),
    keys=13,
    k=4,
    heads=4,
    groups=2,
    entry=10,
    d_k=6,
    v_start=5,
    d_v=5,
    index_heads=3,
    index_dim=5,
)
OTHER_SIZES = Case(
    "compiled again",
    (Document(2, 19, 11), Document(0, 0, 1)),
    keys=21,
    k=4,
    heads=4,
    groups=2,
    entry=10,
    d_k=6,
    v_start=5,
    d_v=5,
    index_heads=3,
    index_dim=5,
)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def calls(x: Inputs) -> dict[str, tuple[Function, tuple[Tensor, ...]]]:
    """Each op as a function of the tensors that it is differentiable by, and of the others, which vary with the case
    as well."""
    index = (x.q_SID, x.k_TD, x.w_SI)
    ranges = (x.starts_S, x.ends_S)
    k_THD, v_THV = x.k_TGD.repeat_interleave(2, 1), x.v_TGV.repeat_interleave(2, 1)
    lse_SH = ops.dense_attention(x.q_SHD, x.k_TGD, x.v_TGV, *ranges, x.scale)[1]
    scores_ST = torch.randn(x.visible_ST().shape, generator=torch.Generator().manual_seed(0))
    parts = tuple(x.parts.values())
    return {
        "index_scores": (
            lambda q, k, w, s, e, vis: ops.index_scores(q, k, w, s, e).masked_fill(~vis, 0),
            (*index, *ranges, x.visible_ST()),
        ),
        "select_topk": (lambda scores, s, e: ops.select_topk(scores, 4, s, e), (scores_ST, *ranges)),
        "index_topk": (lambda q, k, w, s, e: ops.index_topk(q, k, w, 4, s, e), (*index, *ranges)),
        "index_topk_blocks": (
            lambda q, k, w, s, e: ops.index_topk_blocks(q, k, w, 4, s, e, block=16, blocks=3),
            (*index, *ranges),
        ),
        "dense_attention": (
            lambda q, k, v, s, e: ops.dense_attention(q, k, v, s, e, x.scale),
            (x.q_SHD, x.k_TGD, x.v_TGV, *ranges),
        ),
        "masked_attention": (
            lambda q, k, v, i: ops.masked_attention(q, k, v, i, x.scale),
            (x.q_SHD, k_THD, v_THV, x.indices_SK),
        ),
        "sparse_attention": (
            lambda q, kv, i: ops.sparse_attention(q, kv, i, x.scale, *parts),
            (x.q_SHD, x.kv_TGE, x.indices_SK),
        ),
        "sparse_attention_kl": (
            lambda q, kv, i, *index: ops.sparse_attention_kl(q, kv, i, x.scale, *parts, *index),
            (x.q_SHD, x.kv_TGE, x.indices_SK, *index),
        ),
        "indexer_kl_dense": (
            lambda q, k, lse, q_I, k_I, w, s, e: ops.indexer_kl_dense(q, k, lse, x.scale, q_I, k_I, w, s, e),
            (x.q_SHD, x.k_TGD, lse_SH, *index, *ranges),
        ),
    }


NAMES = tuple(calls(make(CASE)))
# Compiling takes seconds. An op of these is a part of another one (sparse_attention_kl), or built like it.
SELDOM = ("sparse_attention", "dense_attention", "masked_attention")


def run(function: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Every output, and the gradient of every floating input (zeros where none flows)."""
    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    differentiable = [y for y in outputs if y.requires_grad]
    if not differentiable:
        return outputs
    leaves = [t for t in inputs if t.requires_grad]
    gradients = torch.autograd.grad(
        differentiable, leaves, [torch.ones_like(y) for y in differentiable], allow_unused=True
    )
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True))]


def test_every_op_is_called_here() -> None:
    """Others are compiled elsewhere: the ops on pages in test_paged.py, block_linear in test_fp8.py."""
    assert set(NAMES) == set(ops.OPS) - set(PAGED_OPS) - {"block_linear"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SELDOM else n for n in NAMES])
def test_compiled_is_eager(name: str) -> None:
    """One full graph with symbolic sizes, forward and backward, run at two sets of sizes (the second has a query with
    no key)."""
    torch.compiler.reset()
    compiled = torch.compile(calls(make(CASE))[name][0], fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (CASE, OTHER_SIZES):
        function, tensors = calls(make(case))[name]
        for a, e in zip(run(compiled, tensors), run(function, tensors), strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e), case.name


def test_the_summed_kl_compiled_is_eager() -> None:
    """Its backward scales in place what the forward kept, which a compiler must not lose."""
    torch.compiler.reset()

    x = make(CASE)
    q, k, lse, *given = calls(x)["indexer_kl_dense"][1]
    fixed, weight_S = [t.detach() for t in (q, k, lse)], torch.linspace(0.1, 1, len(x.starts_S))

    def function(*given: Tensor) -> Tensor:
        return 3 * ops.indexer_kl_dense_sum(*fixed, x.scale, *given, weight_S)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(run(compiled, tuple(given)), run(function, tuple(given)), strict=True):
        assert torch.equal(a, e)


class RecordedCalls(TorchDispatchMode):
    """The calls of our own operators, forward and backward, with the arguments that they really got."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tokensieve":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def opcheck(name: str, function: Function, tensors: tuple[Tensor, ...]) -> None:
    """Schema, autograd registration and fake implementation (dtypes, sizes, strides) against the real results."""
    with RecordedCalls() as recorded:
        run(function, tensors)
    differentiable = "topk" not in name
    assert [op._opname for op, _ in recorded.calls] == [name, f"{name}_backward"][: 1 + differentiable]
    for op, args in recorded.calls:
        args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        if differentiable and op._opname == name:
            args = tuple(a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def strided(x: Tensor) -> Tensor:
    """The same values with the first two axes swapped in memory, as a model's reshapes leave them."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    function, tensors = calls(make(CASE).to(dtype))[name]
    opcheck(name, function, tensors)
    if dtype == torch.float32:
        opcheck(name, function, tuple(strided(t) for t in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_fused_dense_attention(dtype: torch.dtype) -> None:
    x = make(CASE).to(dtype)
    bounds, tensors = torch.tensor([0, 7, 8, 13], dtype=torch.int32), (x.q_SHD, x.k_TGD, x.v_TGV)

    def out_only(*tensors: Tensor) -> Tensor:
        return ops.dense_attention(*tensors, x.starts_S, x.ends_S, x.scale, bounds=bounds, longest=7, backend="fused")[
            0
        ]

    opcheck("dense_attention", out_only, tensors)
    opcheck("dense_attention", out_only, tuple(strided(t) for t in tensors))


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str) -> None:
    """The ops choose their own precision: float32 inputs give the same bits under bf16 autocast, forward and
    backward."""
    function, tensors = calls(make(CASE))[name]
    expected = run(function, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(function, tensors)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)
