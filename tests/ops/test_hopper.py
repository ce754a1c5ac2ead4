"""The Hopper kernels against the float64 reference, at their one shape; and that they compile, which needs no GPU."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, Case, Document, causal, make
from tests.support.op_results import SPARSE, results
from tokensieve import ops

pytest.importorskip("triton", reason="Triton has no build for this machine")

TOLERANCE = {"float16": 4e-3, "bfloat16": 1.5e-2}  # as test_triton.py
LSE_TOLERANCE = 1e-4
MLA = {"groups": 1, "entry": 576, "d_k": 576, "v_start": 0, "d_v": 512}
MORE = (
    Case("several tiles", causal(700), keys=700, k=300, heads=128, **MLA),
    Case("more heads than a program's", (Document(0, 200, 5),), keys=200, k=70, heads=200, **MLA),
    Case("strips of queries", causal(900), keys=900, k=64, heads=16, **MLA),
)


def hopper_cases() -> list:
    """Every case at the widths of the 671B model, and in the precisions that its magnitude allows."""
    parameters = []
    for case in (*CASES, *MORE):
        for dtype in ("bfloat16", "float16"):
            if dtype == "bfloat16" or case.magnitude <= 16:
                parameters.append(pytest.param(dataclasses.replace(case, dtype=dtype, **MLA), id=f"{case}-{dtype}"))
    return parameters


@pytest.fixture
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["in order", "any order"])
@pytest.mark.parametrize("case", hopper_cases())
def test_values_and_gradients(
    case: Case, mode: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "in order":
        request.getfixturevalue("poisoned")
    if case.name == "strips of queries":
        monkeypatch.setattr("tokensieve.ops.triton.in_order.STRIP_BYTES", 100 * 16 * 64 * 4)
    x = make(case, "cuda")
    x = dataclasses.replace(x, w_SI=x.w_SI.float())
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, "hopper", SPARSE)
    rounding = oracle.lse_rounding(expected["sparse_attention: lse"], torch.float32)
    for name, e in expected.items():
        a = actual[name]
        assert a.isfinite().eq(e.isfinite()).all(), name
        tolerance = LSE_TOLERANCE if name.endswith(": lse") else TOLERANCE[case.dtype]
        if ": d " in name or name.endswith(": kl"):
            tolerance = max(tolerance, 4 * rounding)
        if tolerance < 0.5:
            oracle.assert_close(a.double(), e, tolerance, 1.0, name)


@pytest.mark.gpu
def test_a_second_run_has_the_same_bits(poisoned: None) -> None:
    x = make(Case("twice", causal(700, 1, 1500), keys=2201, k=300, heads=128, dtype="bfloat16", **MLA), "cuda")
    first, second = results(x, "hopper", SPARSE), results(x, "hopper", SPARSE)
    for name, e in first.items():
        assert torch.equal(second[name], e), name


@pytest.mark.gpu
def test_nothing_outside_the_keys_is_touched() -> None:
    """Places that name keys past the end, or before the first, are places that name none."""
    x = make(Case("astray", causal(70), keys=70, k=20, heads=64, dtype="bfloat16", **MLA), "cuda")
    expected = results(x, "hopper", SPARSE)
    astray = torch.tensor([-(2**31), -5, 70, 71, 2**31 - 1], dtype=torch.int32, device="cuda").repeat(14)
    wrong = torch.where(x.indices_SK < 0, astray[: len(x.indices_SK), None], x.indices_SK)
    assert not torch.equal(wrong, x.indices_SK)
    for name, a in results(dataclasses.replace(x, indices_SK=wrong), "hopper", SPARSE).items():
        if ": d kv" in name or ": d k_I" in name:  # added atomically
            oracle.assert_close(a.double(), expected[name].double(), TOLERANCE["bfloat16"], 1.0, name)
        else:
            assert torch.equal(a, expected[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["in order", "any order"])
def test_more_queries_than_an_axis_of_a_grid_has_programs(mode: str, request: pytest.FixtureRequest) -> None:
    if mode == "in order":
        request.getfixturevalue("poisoned")
    g = torch.Generator(device="cuda").manual_seed(3)
    S, T = 65600, 40
    q, kv = (torch.randn(n, h, 576, generator=g, device="cuda", dtype=torch.bfloat16) for n, h in ((S, 2), (T, 1)))
    indices = torch.rand(S, T, generator=g, device="cuda").argsort(1)[:, :3].sort(1).values.int()
    q, kv = q.requires_grad_(), kv.requires_grad_()
    out, lse = ops.sparse_attention(q, kv, indices, 0.05, 576, 0, 512, backend="hopper")
    weight = (torch.arange(S, device="cuda") >= S - 5)[:, None, None].to(
        out.dtype
    )  # the last queries alone give a gradient
    dq, dkv = torch.autograd.grad((out * weight).sum(), (q, kv))
    few_q, few_kv = (x.detach().double().requires_grad_() for x in (q[-5:], kv))
    few_out, few_lse = ops.sparse_attention(few_q, few_kv, indices[-5:], 0.05, 576, 0, 512, backend="reference")
    few_dq, few_dkv = torch.autograd.grad(few_out.sum(), (few_q, few_kv))
    for a, e in ((out[-5:], few_out), (dq[-5:], few_dq), (dkv, few_dkv), (lse[-5:], few_lse)):
        oracle.assert_close(a.detach().double(), e.detach(), TOLERANCE["bfloat16"], 1.0)
    assert not dq[:-5].any()


@pytest.mark.gpu
def test_any_indices_and_addresses() -> None:
    """Indices of 64 bits, no places at all, and entries that begin between two multiples of 16 bytes."""
    x = make(Case("addresses", causal(70), keys=70, k=20, heads=64, dtype="bfloat16", **MLA), "cuda")
    x = dataclasses.replace(x, w_SI=x.w_SI.float())
    expected = results(x, "hopper", SPARSE)
    odd = torch.empty(x.kv_TGE.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(x.kv_TGE).copy_(x.kv_TGE)
    for name, a in results(
        dataclasses.replace(x, indices_SK=x.indices_SK.long(), kv_TGE=odd), "hopper", SPARSE
    ).items():
        oracle.assert_close(a.double(), expected[name].double(), TOLERANCE["bfloat16"], 1.0, name)
    for name, a in results(dataclasses.replace(x, indices_SK=x.indices_SK[:, :0]), "hopper", SPARSE).items():
        assert (a == (float("-inf") if name.endswith(": lse") else 0)).all(), name


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "documents", [(Document(0, 700, 700),), (Document(0, 0, 3), Document(5, 1500, 70), Document(9, 3, 1))]
)
def test_scores_have_the_bits_of_the_portable_kernel(
    documents: tuple[Document, ...], heads: int, poisoned: None
) -> None:
    """Which its own tests compare with the reference; here also the reference's values, with and without scales."""
    keys = max(d.start + d.keys for d in documents)
    x = make(Case("scores", documents, keys=keys, k=64, index_heads=heads, index_dim=128), "cuda")
    (q, k), scale = (y.to(torch.float8_e4m3fn) for y in (x.q_SID, x.k_TD)), torch.rand(keys, device="cuda") + 0.25
    seen = x.visible_ST()
    for k_scale in (scale, None):
        given = (x.w_SI, x.starts_S, x.ends_S, k_scale)
        actual, portable = (ops.index_scores(q, k, *given, backend=how) for how in ("hopper", "triton"))
        assert torch.equal(actual[seen], portable[seen])
        expected = ops.index_scores(q.float(), k.float(), *given, backend="reference")
        oracle.assert_close(actual[seen].double(), expected[seen].double(), 1e-3, 1.0)
        chosen = [ops.index_topk(q, k, x.w_SI, x.k, *given[1:], backend=how) for how in ("hopper", "triton")]
        assert torch.equal(*chosen)


@pytest.mark.gpu
def test_scores_of_addresses_that_cannot_be_copied_from() -> None:
    x = make(Case("scores", causal(300), keys=300, k=64, index_heads=64, index_dim=128), "cuda")
    q, k = (y.to(torch.float8_e4m3fn) for y in (x.q_SID, x.k_TD))
    odd = [torch.empty(y.numel() + 1, dtype=y.dtype, device="cuda")[1:].view_as(y).copy_(y) for y in (q, k)]
    both = [ops.index_scores(*y, x.w_SI, x.starts_S, x.ends_S, backend="hopper") for y in ((q, k), odd)]
    assert torch.equal(*(y[x.visible_ST()] for y in both))


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import MockTensor

class NoGpu:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(NoGpu())
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from tokensieve.ops.hopper import decode, dkv, dq, forward, union_backward, union_forward
from tokensieve.ops.hopper import index as scores
kinds = torch.bfloat16, torch.int32, torch.int64, torch.float32, torch.uint8
half, index, long, single, byte = map(MockTensor, kinds)
ptxas = get_ptxas(90).path
sizes = (128, 32768, 2048, 2048)
common = {"KP": 2048, "num_warps": 8}
rows = torch.empty(4096, 128, dtype=torch.float8_e4m3fn)
boxes = [TensorDescriptor.from_tensor(rows, [n, 128], scores.SWIZZLED.value) for n in (256, 512)]
split = {"W": 128, "BLOCKS": 2, "TWICE": True, "WITH_VALUE": True, "IN_ORDER": False}
groups = {"H": 32, "G": 8, "E": 256, "MP": 4, "B": 32, "D": 128, "V": 128, "v_start": 128, "num_warps": 4}
tail = {"W": 64, "BLOCKS": 1, "TWICE": False, "WITH_VALUE": False, "IN_ORDER": False}
for name, kernel, arguments, options in (
    ("scores", scores.scores_kernel,
     (*boxes, *[single] * 2, *[index] * 2, single, 4096, 32768, 512), {"H": 64, "num_warps": 8}),
    ("forward", forward.forward_kernel,
     (half, half, index, index, single, half, single, half, single, *sizes, 0.1),
     common | {"KEEP": True, "M": 0}),
    ("forward_folded", forward.forward_kernel,
     (half, half, index, index, single, half, single, half, single, *sizes, 0.1),
     common | {"KEEP": True, "M": 16, "KP": 8192}),
    ("decode", decode.decode_kernel, (half, byte, single, half, index, half, single, *sizes[:3], 41984, 0.1), common),
    ("dq", dq.dq_kernel,
     (half, half, half, index, index, single, single, half, half, half, *sizes, 0.1),
     common | {"num_warps": 4, "M": 0}),
    ("dq_folded", dq.dq_kernel,
     (half, half, half, index, index, single, single, half, half, half, *sizes, 0.1),
     common | {"num_warps": 4, "M": 16, "KP": 8192}),
    ("dkv", dkv.dkv_kernel, (half, half, half, half, index, single, *sizes, 0), common | split),
    ("dkv_tail", dkv.dkv_kernel, (half, half, half, half, long, single, *sizes, 512), common | tail),
    ("dkv_in_order", dkv.dkv_kernel,
     (half, half, half, half, index, single, *sizes, 0), common | split | {"IN_ORDER": True}),
    ("union_forward", union_forward.union_forward_kernel,
     (half, half, half, single, *[index] * 4, 65536, 8192, 0.1), groups | {"N": 128, "BUFFERS": 2}),
    ("union_backward", union_backward.union_backward_kernel,
     (half, half, half, single, single, half, single, *[index] * 3, 65536, 8192, 0.1), groups),
    ("union_backward_64", union_backward.union_backward_kernel,
     (half, half, half, single, single, half, single, *[index] * 3, 65536, 8192, 0.1),
     groups | {"H": 9, "G": 3, "E": 128, "D": 64, "V": 64, "v_start": 64}),
):
    compiled = kernel.warmup(*arguments, grid=(128,), **options)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.ptx").write_text(compiled.asm["ptx"])
        command = [ptxas, "--gpu-name", "sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"]
        words = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    print(name, compiled.metadata.shared, "serialized" if "serialized" in words else "overlapped")
"""


@pytest.mark.slow
def test_the_kernels_compile(tmp_path) -> None:
    """For sm_90, within a program's shared memory, with products that overlap: the assembler gives that up silently."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    reports = {line.split()[0]: line.split()[1:] for line in child.stdout.splitlines()}
    assert set(reports) == {
        *("scores", "forward", "forward_folded", "decode", "dq", "dq_folded"),
        *("dkv", "dkv_tail", "dkv_in_order", "union_forward", "union_backward", "union_backward_64"),
    }
    for name, (shared, products) in reports.items():
        assert int(shared) <= 227 * 1024, name
        assert products == "overlapped", name
