"""FlashMLA's and DeepGEMM's kernels behind our contracts, where there are a Hopper GPU and their packages; what they refuse, anywhere."""

import dataclasses

import oracle
import pytest
import torch
from cases import Case, Document, causal, make
from op_results import SPARSE, results

from tokensieve import ops
from tokensieve.ops import quant, vendor

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
    found = ops.index_scores(q, k, w, x.starts_S, x.ends_S, k_scale, backend="vendor")
    expected = ops.index_scores(q.float(), k.float(), w, x.starts_S, x.ends_S, k_scale, backend="reference")
    seen = x.visible_ST()
    oracle.assert_close(found[seen].double(), expected[seen].double(), 1e-3, 1.0)
    chosen = ops.index_topk(q, k, w, x.k, x.starts_S, x.ends_S, k_scale, backend="vendor")
    assert torch.equal(chosen, ops.select_topk(found, x.k, x.starts_S, x.ends_S, backend="reference"))


def test_what_they_do_not_take() -> None:
    q, kv = torch.zeros(2, 128, 576, dtype=torch.bfloat16), torch.zeros(5, 1, 576, dtype=torch.bfloat16)
    parts = {"v_start": 0, "d_v": 512}
    for bad_q, bad_kv in ((q[:, :3], kv), (q.half(), kv.half()), (q, kv.float()), (q[..., :80], kv[..., :80])):
        assert "FlashMLA takes" in str(vendor.limits("sparse_attention", bad_q, {"kv": bad_kv, **parts}))
    assert "FlashMLA takes" in str(vendor.limits("sparse_attention", q, {"kv": kv, "v_start": 64, "d_v": 512}))
    index, keys = (torch.zeros(2, 64, 128).to(torch.float8_e4m3fn), torch.zeros(5, 128).to(torch.float8_e4m3fn))
    assert "DeepGEMM takes" in str(vendor.limits("index_topk", index[:, :8], {"k": keys}))
    assert "DeepGEMM takes" in str(vendor.limits("index_scores", index, {"k": keys.float()}))
    with pytest.raises(ValueError, match="backend 'vendor' cannot run sparse_attention: it does not run on cpu"):
        ops.sparse_attention(q, kv, torch.zeros(2, 4, dtype=torch.int32), 1.0, 576, 0, 512, backend="vendor")
