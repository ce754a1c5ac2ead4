"""FlashMLA's and DeepGEMM's kernels behind our contracts, on a Hopper GPU with their packages.

What they refuse is tested everywhere.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support import oracle, pages
from tests.support.cases import Case, Document, causal, make
from tests.support.op_results import SPARSE, results
from tokensieve import ops
from tokensieve.ops import quant, vendor
from tokensieve.ops.triton.limits import no_triton

MLA = {"entry": 576, "d_k": 576, "d_v": 512, "dtype": "bfloat16"}
CASES = (
    Case("k a multiple of nothing", causal(300, 41), keys=341, k=70, heads=128, **MLA),
    Case("empty rows", (Document(0, 0, 2), Document(3, 20, 20), Document(23, 0, 3)), keys=39, k=6, heads=64, **MLA),
    Case("nothing selected", causal(11), keys=11, k=6, heads=64, content="none_selected", **MLA),
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_the_references(case: Case) -> None:
    """The logsumexp too, which FlashMLA's description once called one to base 2; and our own backward takes it."""
    pytest.importorskip("flash_mla", reason="FlashMLA is not installed")
    x = make(case, "cuda")
    x = dataclasses.replace(x, w_SI=x.w_SI.float())
    expected, actual = results(x.to(torch.float64), "reference", SPARSE[:1]), results(x, "vendor", SPARSE[:1])
    for name, e in expected.items():
        assert actual[name].isfinite().eq(e.isfinite()).all(), name
        oracle.assert_close(actual[name].double(), e, 1e-4 if name.endswith(": lse") else 1.5e-2, 1.0, name)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [700, 4096])
def test_scores_are_the_references(keys: int) -> None:
    """And the selection is ours: ties, and rows longer than the keys, do not change it."""
    pytest.importorskip("deep_gemm", reason="DeepGEMM is not installed")
    x = make(Case("scores", (Document(0, keys, 90),), keys=keys, k=64, index_heads=64, index_dim=128), "cuda")
    q, q_scale = quant.quantize_e4m3(x.q_SID, 128, "ue8m0")
    k, k_scale = quant.quantize_e4m3(x.k_TD, 128, "ue8m0")
    w, k_scale = x.w_SI * q_scale.squeeze(-1), k_scale.squeeze(-1)
    actual = ops.index_scores(q, k, w, x.starts_S, x.ends_S, k_scale, backend="vendor")
    expected = ops.index_scores(q.float(), k.float(), w, x.starts_S, x.ends_S, k_scale, backend="reference")
    seen = x.visible_ST()
    oracle.assert_close(actual[seen].double(), expected[seen].double(), 1e-3, 1.0)
    chosen = ops.index_topk(q, k, w, x.k, x.starts_S, x.ends_S, k_scale, backend="vendor")
    assert torch.equal(chosen, ops.select_topk(actual, x.k, x.starts_S, x.ends_S, backend="reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 65, 300])
@pytest.mark.parametrize("gated", [False, True])
def test_products_are_the_references(rows: int, gated: bool) -> None:
    pytest.importorskip("deep_gemm", reason="DeepGEMM is not installed")
    g = torch.Generator("cuda").manual_seed(rows)
    weight, scale = quant.quantize_weight(torch.randn(448, 384, device="cuda", generator=g))
    x = torch.randn(rows, 768 if gated else 384, device="cuda", generator=g).bfloat16()
    given = x, weight[None], scale[None]
    actual = ops.block_linear(*given, gated=gated, backend="vendor")
    expected = ops.block_linear(*given, gated=gated, backend="reference")
    oracle.assert_close(actual.double(), expected.double(), 2e-2, 1.0)  # as in test_fp8.py
    same = ops.block_linear(*given, gated=gated)
    assert torch.equal(
        same, actual if rows > vendor.FEW_ROWS else ops.block_linear(*given, gated=gated, backend="triton")
    )


@pytest.fixture
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
def test_paged_attention_in_a_cuda_graph(known: bool) -> None:
    """With and without a plan that an earlier call made: a graph's plan is its own, and no later call may read it."""
    pytest.importorskip("flash_mla", reason="FlashMLA is not installed")
    places, sizes = (192, 256) if known else (320, 384), (torch.device("cuda", torch.cuda.current_device()), 5, 64)
    x = pages.make("fp8", 1, (300, 129, 1, 0, 256), "bfloat16", heads=64, places=places[0], P=5).to("cuda")
    wide = torch.full((5, places[1] - places[0]), -1, dtype=torch.int32, device="cuda")
    wider = replace(x, indices=torch.cat((x.indices, wide), 1))
    wider.attention(backend="vendor")  # compiled and loaded
    if known:
        x.attention(backend="vendor")
    held = x.indices.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = replace(x, indices=held).attention(backend="vendor")
    assert (vendor._kept_plan(*sizes, places[0]).tile_scheduler_metadata is not None) == known
    for indices in (x.indices, torch.where(torch.arange(places[0], device="cuda") % 3 == 1, -1, x.indices)):
        held.copy_(indices)
        for _ in range(2):
            graph.replay()
        for a, e in zip(actual, replace(x, indices=indices).attention(backend="vendor"), strict=True):
            assert torch.equal(a, e)


@pytest.mark.gpu
def test_auto_takes_our_own_kernel_for_few_queries(poisoned: None) -> None:
    pytest.importorskip("flash_mla", reason="FlashMLA is not installed")
    for sequences, name in ((2, "triton"), (9, "vendor")):
        x = pages.make("fp8", 1, (2100,) * sequences, "bfloat16", heads=128, places=2048, P=33).to("cuda")
        for a, e in zip(x.attention(), x.attention(backend=name), strict=True):
            assert torch.equal(a, e)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU pass for those of a Hopper GPU."""
    monkeypatch.setattr(vendor, "is_hopper", lambda device: True)


def test_what_they_do_not_take(on_hopper: None) -> None:
    q, kv = torch.zeros(2, 128, 576, dtype=torch.bfloat16), torch.zeros(5, 1, 576, dtype=torch.bfloat16)
    parts = {"v_start": 0, "d_v": 512}
    for bad_q, bad_kv in ((q[:, :3], kv), (q.half(), kv.half()), (q, kv.float()), (q[..., :80], kv[..., :80])):
        assert "FlashMLA takes" in str(vendor.limits("sparse_attention", bad_q, {"kv": bad_kv, **parts}))
    assert "FlashMLA takes" in str(vendor.limits("sparse_attention", q, {"kv": kv, "v_start": 64, "d_v": 512}))
    index, keys = (torch.zeros(2, 64, 128).to(torch.float8_e4m3fn), torch.zeros(5, 128).to(torch.float8_e4m3fn))
    assert "DeepGEMM takes" in str(vendor.limits("index_topk", index[:, :8], {"k": keys}))
    assert "DeepGEMM takes" in str(vendor.limits("index_scores", index, {"k": keys.float()}))
    assert "index_scores_paged" not in vendor.OPS
    weight, x = torch.zeros(1, 128, 256).to(torch.float8_e4m3fn), torch.zeros(70, 256, dtype=torch.bfloat16)
    for bad_x, bad_weight in ((x.float(), weight), (x, weight.repeat(2, 1, 1)), (x, weight[:, :100])):
        assert "DeepGEMM takes" in str(vendor.limits("block_linear", bad_x, {"weight": bad_weight}))
    assert "DeepGEMM takes" not in str(vendor.limits("block_linear", x, {"weight": weight}))
    assert vendor.slower("block_linear", x, {}) is None and vendor.slower("block_linear", x[:64], {}) is not None
    with pytest.raises(ValueError, match="backend 'vendor' cannot run sparse_attention: it does not run on cpu"):
        ops.sparse_attention(q, kv, torch.zeros(2, 4, dtype=torch.int32), 1.0, 576, 0, 512, backend="vendor")


def test_what_they_do_not_take_on_pages(on_hopper: None) -> None:
    q, indices = torch.zeros(3, 64, 576, dtype=torch.bfloat16), torch.zeros(3, 70, dtype=torch.int32)
    pool = torch.zeros(4, 64, 656, dtype=torch.uint8)

    def why_not(q=q, pages=pool, indices=indices) -> str:
        return str(vendor.limits("sparse_attention_paged", q, {"entry_pages": pages, "indices": indices}))

    taken = str(vendor._missing("sparse_attention_paged") or no_triton())
    assert why_not() == why_not(pages=torch.zeros(4, 2, 64, 656, dtype=torch.uint8)[:, 1]) == taken
    for bad in (q.half(), q.float(), q[:, :3], q.repeat(1, 4, 1)):
        assert "64 or 128 heads in bfloat16" in why_not(q=bad)
    assert "quantized pages" in why_not(pages=torch.zeros(4, 64, 576, dtype=torch.bfloat16))
    loose = torch.zeros(4 * (64 * 656 + 8) + 8, dtype=torch.uint8)
    for bad in (
        pool.transpose(1, 2).contiguous().transpose(1, 2),
        loose.as_strided((4, 64, 656), (64 * 656 + 8, 656, 1)),
        loose.as_strided((4, 64, 656), (64 * 656, 656, 1), 4),
    ):
        assert "bytes lie together" in why_not(pages=bad)
    assert "at most 8192 queries" in why_not(q=q.new_empty(1).expand(8193, 64, 576))
    assert "131072 places" in why_not(indices=indices.new_empty(1).expand(3, 131073))
    with pytest.raises(ValueError, match="backend 'vendor' cannot run sparse_attention_paged: it does not run on cpu"):
        pages.make("fp8", dtype="bfloat16", heads=64).attention(backend="vendor")


def test_when_ours_is_as_fast() -> None:
    """Only `auto` asks; by name it runs whatever it can."""

    def slower(op: str, S: int, heads: int, K: int) -> bool:
        q, indices = torch.empty(S, heads, 576, device="meta"), torch.empty(S, K, device="meta")
        return vendor.slower(op, q, {"indices": indices}) is not None

    for S, heads, K in ((1, 128, 2048), (2, 128, 2048), (4, 64, 2048), (16, 128, 64)):
        assert slower("sparse_attention_paged", S, heads, K) and not slower("sparse_attention", S, heads, K)
    for S, heads, K in ((3, 128, 2048), (5, 64, 2048), (128, 128, 2048)):
        assert not slower("sparse_attention_paged", S, heads, K)
