"""What the host does for unions on Hopper, with the Gluon kernels written out in PyTorch: they need a GPU."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.cases import Case, Inputs, causal, make

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.hopper import limits
from tokensieve.ops.hopper import unions as on_hopper
from tokensieve.ops.reference import sparse
from tokensieve.ops.triton import union_attention, unions

TOLERANCE = 1e-5  # float32, as in test_triton.py
GROUPED = {"heads": 6, "groups": 2, "entry": 32, "d_k": 16, "v_start": 16, "d_v": 16}
PACK = Case("two blocks of 32 queries, and a part of one", causal(70), keys=70, k=4, **GROUPED)


class Written:
    """A kernel's place, called as `kernel[grid](...)`, which counts its calls."""

    def __init__(self, run) -> None:
        self.run, self.calls = run, 0

    def __getitem__(self, grid: tuple[int, ...]):
        self.calls += 1
        return self.run


def each_query(keys: Tensor, marks: Tensor, counts: Tensor, B: int, S: int):
    """(query, the keys of its block's list that it selected)."""
    for block, count in enumerate(counts.tolist()):
        for b in range(B if count >= 0 else 0):
            if block * B + b < S:
                bits = (marks[block, :count] >> b) & 1
                yield block * B + b, block, keys[block, :count], bits != 0


def parts(kv: Tensor, listed: Tensor, H: int, G: int, D: int, v_start: int, V: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a list (C, H, D), (C, H, V)."""
    entries = kv[listed.long()].repeat_interleave(H // G, 1)
    return entries[..., :D], entries[..., v_start : v_start + V]


def run_forward(q, kv, out, lse, keys, marks, counts, broken, S, *, scale, H, G, D, V, v_start, B, **_) -> None:
    for t, block, listed, seen in each_query(keys, marks, counts, B, S):
        k, v = parts(kv, listed, H, G, D, v_start, V)
        logit = torch.where(seen, torch.einsum("hd,chd->hc", q[t], k) * scale, -math.inf)
        lse[t] = logit.logsumexp(1) if len(listed) else -math.inf
        p = torch.where(lse[t].isneginf()[:, None], 0.0, (logit - lse[t][:, None]).exp())
        out[t] = torch.einsum("hc,chv->hv", p, v)  # zero times NaN is NaN
        if not out[t].isfinite().all():
            broken[block] = 1


def run_backward(
    dout, q, kv, lse, delta, dq, dkv, keys, marks, counts, S, *, scale, H, G, D, V, v_start, B, **_
) -> None:
    for t, _block, listed, seen in each_query(keys, marks, counts, B, S):
        k, v = parts(kv, listed, H, G, D, v_start, V)
        logit = torch.einsum("hd,chd->hc", q[t], k) * scale
        p = torch.where(seen, (logit - torch.where(lse[t].isneginf(), math.inf, lse[t])[:, None]).exp(), 0.0)
        ds = torch.where(seen, p * (torch.einsum("hv,chv->hc", dout[t], v) - delta[t][:, None]), 0.0)
        dq[t] = torch.einsum("hc,chd->hd", ds, k) * scale
        group = torch.arange(H) // (H // G)
        for h in range(H):
            dkv[listed.long(), group[h], :D] += ds[h][:, None] * q[t, h] * scale
            dkv[listed.long(), group[h], v_start : v_start + V] += p[h][:, None] * dout[t, h]


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch) -> dict[str, Written]:
    """The kernels that stand in, by name."""
    kernels = {"forward": Written(run_forward), "backward": Written(run_backward)}
    for name, kernel in kernels.items():
        monkeypatch.setattr(on_hopper, f"union_{name}_kernel", kernel)
    monkeypatch.setattr(on_hopper, "takes", lambda u, kv, shape: u.B * shape["MP"] == union_attention.ROWS)
    return kernels


def operands(x: Inputs) -> tuple:
    return x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, *x.parts.values()


def both_ways(module, x: Inputs, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    kernels = {} if module is sparse else {"kernels": on_hopper.KERNELS}
    out, lse = module.sparse_attention(*operands(x), **kernels)
    dq, dkv = module.sparse_attention_backward(dout, dlse, out, lse, *operands(x), **kernels)
    return {"out": out, "lse": lse, "dq": dq, "dkv": dkv}


def given(x: Inputs) -> tuple[Tensor, Tensor]:
    """Gradients of out and lse."""
    g = torch.Generator().manual_seed(2)
    S, H, _ = x.q_SHD.shape
    return torch.randn(S, H, 16, generator=g), torch.randn(S, H, generator=g)


@pytest.mark.parametrize(("fit", "in_order"), [(1, False), (4, False), (4, True)])
def test_wide_blocks_and_narrow_ones(
    fit: int, in_order: bool, written_out: dict[str, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order the portable kernels take the whole backward."""
    monkeypatch.setattr(unions, "FIT", fit)
    for module in (on_hopper, union_attention):
        monkeypatch.setattr(module, "wanted_in_order", lambda: in_order)
    x = make(PACK, "cpu")
    x.indices_SK[32:64] = x.indices_SK[63]  # one union fits in any case
    expected = both_ways(sparse, x.to(torch.float64), *(g.double() for g in given(x)))
    for name, a in both_ways(union_attention, x, *given(x)).items():
        oracle.assert_close(a.double(), expected[name], TOLERANCE, 1.0, name)
    assert {name: kernel.calls for name, kernel in written_out.items()} == {"forward": 1, "backward": int(not in_order)}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("kv_TGE", math.nan),
        pytest.param("kv_TGE", math.inf, marks=pytest.mark.slow),
        pytest.param("q_SHD", math.nan, marks=pytest.mark.slow),
    ],
)
def test_broken_numbers_reach_only_who_selected_them(where: str, value: float) -> None:
    x = make(PACK, "cpu")
    spoiled = getattr(x, where).clone()
    at = int(x.indices_SK[40, 1]) if where == "kv_TGE" else 40
    spoiled[at] = value
    whole, broken = (
        both_ways(union_attention, x, *given(x)),
        both_ways(union_attention, dataclasses.replace(x, **{where: spoiled}), *given(x)),
    )
    hit = (x.indices_SK == at).any(1) if where == "kv_TGE" else torch.arange(70) == at
    chosen = torch.zeros(70, dtype=torch.bool)
    chosen[x.indices_SK[hit][x.indices_SK[hit] >= 0].long()] = True
    assert hit.any() and not hit.all() and not chosen.all()
    for name, e in whole.items():
        kept = ~chosen if name == "dkv" else ~hit
        oracle.assert_close(broken[name][kept].double(), e[kept].double(), TOLERANCE, 1.0, name)
    assert not broken["out"][hit].isfinite().all((1, 2)).any()


def test_a_broken_gradient_reaches_only_what_its_query_selected() -> None:
    x = make(PACK, "cpu")
    dout, dlse = given(x)
    dlse[9] = math.nan
    gradients = both_ways(union_attention, x, dout, dlse)
    assert (~gradients["dq"].isfinite().all((1, 2))).nonzero().tolist() == [[9]]
    selected = x.indices_SK[9][x.indices_SK[9] >= 0]
    assert (~gradients["dkv"].isfinite().all((1, 2))).nonzero()[:, 0].tolist() == selected.tolist()


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lists = torch.zeros(1, 8, dtype=torch.int32)
    wide, narrow = (unions.Unions(lists, lists, torch.zeros(1, dtype=torch.int32), B) for B in (32, 4))
    kv, shape = torch.zeros(5, 8, 256, dtype=torch.bfloat16), {"MP": 4}
    assert on_hopper.takes(wide, kv, shape)
    assert not on_hopper.takes(narrow, kv, shape) and not on_hopper.takes(wide, kv[:0], shape)
    assert not on_hopper.takes(wide, kv, {"MP": 2})
    entries = {"v_start": 128, "d_v": 128}
    q, kv = torch.zeros(1, 32, 128, device="meta"), torch.zeros(1, 8, 256, device="meta")
    assert limits.is_grouped(q, {"kv": kv, **entries})
    assert limits.is_grouped(q[..., :64], {"kv": kv[..., :128], "v_start": 64, "d_v": 64})
    for heads, width, change in (
        (16, 128, {}), (512, 128, {}), (32, 96, {}), (32, 128, {"d_v": 32}), (32, 128, {"v_start": 132}),
        (32, 128, {"v_start": 0}), (32, 128, {"kv": torch.zeros(1, 8, 260, device="meta")}),
    ):  # fmt: skip
        q = torch.zeros(1, heads, width, device="meta")
        assert not limits.is_grouped(q, {"kv": kv, **entries} | change), (heads, width, change)
