"""What the host does for folded queries on Hopper, with the Gluon kernels written out in PyTorch: they need a GPU."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.cases import Case, Document, Inputs, causal, make

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.hopper import folded
from tokensieve.ops.hopper.forward import Folded
from tokensieve.ops.reference import sparse
from tokensieve.ops.triton import unions

TOLERANCE = 1e-5  # float32, as in test_triton.py
MLA = {"groups": 1, "entry": 576, "d_k": 576, "v_start": 0, "d_v": 512}
# 13 queries: no whole number of blocks of eight, and blocks across documents.
PACK = Case("blocks", (Document(0, 12, 3), *causal(7), Document(12, 8, 3)), keys=20, k=4, heads=16, **MLA)


def _logits(q: Tensor, kv: Tensor, keys: Tensor, scale: float, rows: Folded) -> Tensor:
    """(blocks, 128, C): -inf where a row does not attend."""
    entries = kv[keys.clamp(min=0).long(), 0]
    bit = torch.arange(128)[:, None] // rows.M
    seen = (rows.marks[:, None] >> bit) & 1 != 0
    assert not seen[(keys < 0)[:, None].expand_as(seen)].any()
    broken = rows.row_breaks[..., None] + torch.where(rows.marks < 0, math.nan, 0.0)[:, None]
    logit = (q @ entries.mT) * scale + broken
    assert q.isfinite().all() and kv.isfinite().all()
    return torch.where(seen, logit, -math.inf)


def forward(q, kv, keys, scale, out, lse, unscaled=None, folded=None) -> None:
    logit = _logits(q, kv, keys, scale, folded)
    top = torch.where(logit.amax(-1).isneginf(), 0.0, logit.amax(-1))
    share = (logit - top[..., None]).exp()
    total = share.sum(-1)
    lse.copy_(torch.where(total == 0, -math.inf, top + total.log()))
    values = kv[keys.clamp(min=0).long(), 0, :512]
    out.copy_(share @ values / torch.where(total == 0, 1.0, total)[..., None])
    if unscaled is None:
        return
    p, tops = unscaled
    p.fill_(math.nan), tops.fill_(math.nan)  # what lies past the last used tile must not be read
    largest = torch.full(logit.shape[:2], -math.inf)
    for tile, part in enumerate(logit.split(64, -1)):
        largest = largest.maximum(part.amax(-1))
        base = torch.where(largest.isneginf(), 0.0, largest)
        p[..., tile * 64 : tile * 64 + part.shape[-1]] = (part - base[..., None]).exp()
        tops[..., tile] = largest * math.log2(math.e)


def probabilities_and_dq(dout, q, kv, keys, lse, delta, scale, dq, p, ds, folded=None) -> None:
    logit, entries = _logits(q, kv, keys, scale, folded), kv[keys.clamp(min=0).long(), 0]
    lse = torch.where(lse.isneginf(), math.inf, lse)
    P = torch.where(logit.isneginf(), 0.0, (logit - lse[..., None]).exp())
    slopes = torch.where(P == 0, 0.0, P * (dout @ entries[..., :512].mT - delta[..., None]) * scale)
    dq.copy_(slopes @ entries)
    for kept, x in ((p, P), (ds, slopes)):
        kept.fill_(math.nan)
        kept[..., : x.shape[-1]] = x


def add_dkv(p, ds, dout, q, keys, dkv, T, in_order=False) -> None:
    C = keys.shape[1]
    sums = ds[..., :C].mT @ q
    sums[..., :512] += p[..., :C].mT @ dout
    if in_order:
        dkv.copy_(sums.reshape(-1, 576))
        return
    named = keys >= 0
    dkv.index_add_(0, keys[named].long(), sums[named])


def backward_by_strips(dout, dlse, q, kv, indices, out, lse, scale, dq, dkv):
    """One query a program, in the place of Gluon kernels as well: a query without keys has no tiles."""
    dlse = dlse.masked_fill((indices < 0).all(1)[:, None], 0.0)
    found = sparse.sparse_attention_backward(dout, dlse, out, lse, q, kv, indices, scale, 576, 0, 512)
    dq.copy_(found[0]), dkv.add_(found[1].view(-1, 576))
    yield slice(0, len(q)), None


def gradients(dout, dlse, dkl, out, lse, q, kv, indices, scale, q_I, k_I, w, dq, dkv):
    found = sparse.sparse_attention_kl_backward(
        dout, dlse, dkl, out, lse, q, kv, indices, scale, 576, 0, 512, q_I, k_I, w
    )
    dq.copy_(found[0]), dkv.add_(found[1].view(-1, 576))
    return found[2:]


@pytest.fixture(autouse=True)
def written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in (forward, probabilities_and_dq, add_dkv):
        monkeypatch.setattr(folded, kernel.__name__, kernel)
    for module, replaced in (
        (folded.attention, {"sparse_attention": sparse.sparse_attention, "backward_by_strips": backward_by_strips}),
        (folded.attention_kl, {"sparse_attention_kl": sparse.sparse_attention_kl, "gradients": gradients}),
    ):
        for name, function in replaced.items():
            monkeypatch.setattr(module, name, function)


def taken(x: Inputs) -> list[bool]:
    """Whether a query's block is computed as one."""
    found = folded.Inputs(x.q_SHD, x.kv_TGE, x.indices_SK)
    return found.choice([part.taken for part in found.parts(0)]).taken.tolist()


def operands(x: Inputs) -> tuple:
    return x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, *x.parts.values()


def both_ways(module, x: Inputs, dout: Tensor, dlse: Tensor, dkl: Tensor) -> dict[str, Tensor]:
    index = (x.q_SID, x.k_TD, x.w_SI)
    out, lse, loss = module.sparse_attention_kl(*operands(x), *index)
    names = ("out", "lse", "kl", "dq", "dkv", "d q_I", "d k_I", "d w")
    gradients = module.sparse_attention_kl_backward(dout, dlse, dkl, out, lse, *operands(x), *index)
    return dict(zip(names, (out, lse, loss, *gradients), strict=True))


def given(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of out, lse (none where a query has no key) and kl."""
    g = torch.Generator().manual_seed(2)
    (S, H, _), keyless = x.q_SHD.shape, (x.indices_SK < 0).all(1)
    dlse = torch.randn(S, H, generator=g).masked_fill(keyless[:, None], 0.0)
    return torch.randn(S, H, 512, generator=g), dlse, torch.rand(S, generator=g)


@pytest.mark.parametrize("most", [20, 10, 3])
@pytest.mark.parametrize(
    ("heads", "strip", "in_order"), [(16, 2**30, False), (16, 1, True), (32, 1, False), (32, 2**30, True)]
)
def test_values_and_gradients(
    heads: int, strip: int, in_order: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded, "keys_at_most", lambda B, K: most)
    monkeypatch.setattr(unions, "STRIP_BYTES", strip)
    monkeypatch.setattr(folded, "wanted_in_order", lambda: in_order)
    x = make(dataclasses.replace(PACK, heads=heads), "cpu")
    x.indices_SK[7] = -1
    assert {20: {True}, 10: {True, False}, 3: {False}}[most] == set(taken(x))
    exact = x.to(torch.float64)
    expected = both_ways(sparse, exact, *(g.double() for g in given(x)))
    for name, a in both_ways(folded, x, *given(x)).items():
        oracle.assert_close(a.double(), expected[name], TOLERANCE, 1.0, name)
    out, lse = folded.sparse_attention(*operands(x))
    oracle.assert_close(out.double(), expected["out"], TOLERANCE, 1.0)
    dout, dlse, _ = given(x)
    dq, dkv = folded.sparse_attention_backward(dout, dlse, out, lse, *operands(x))
    alone = sparse.sparse_attention_backward(
        dout.double(), dlse.double(), expected["out"], expected["lse"], *operands(exact)
    )
    for a, e in zip((dq, dkv), alone, strict=True):
        oracle.assert_close(a.double(), e, TOLERANCE, 1.0)


@pytest.mark.parametrize(("where", "value"), [("kv_TGE", math.nan), ("kv_TGE", math.inf), ("q_SHD", math.nan)])
def test_broken_numbers_reach_only_who_selected_them(where: str, value: float) -> None:
    x = make(PACK, "cpu")
    spoiled = getattr(x, where).clone()
    at = int(x.indices_SK[5, 1]) if where == "kv_TGE" else 5
    spoiled[at, :, 3] = value
    whole = both_ways(folded, x, *given(x))
    broken = both_ways(folded, dataclasses.replace(x, **{where: spoiled}), *given(x))
    hit = (x.indices_SK == at).any(1) if where == "kv_TGE" else torch.arange(13) == at
    chosen = torch.zeros(len(x.k_TD), dtype=torch.bool)
    chosen[x.indices_SK[hit][x.indices_SK[hit] >= 0].long()] = True
    assert hit.any() and not hit.all() and not chosen.all()
    for name, e in whole.items():
        kept = ~chosen if name in ("dkv", "d k_I") else ~hit
        assert torch.equal(broken[name][kept], e[kept]), name
    for name in ("out", "kl", "dq"):
        assert not broken[name][hit].isfinite().all(-1).any(), name


def test_a_broken_gradient_reaches_only_what_its_query_selected() -> None:
    x = make(PACK, "cpu")
    dout, dlse, _ = given(x)
    dlse[9] = math.nan
    out, lse = folded.sparse_attention(*operands(x))
    dq, dkv = folded.sparse_attention_backward(dout, dlse, out, lse, *operands(x))
    assert (~dq.isfinite().all((1, 2))).nonzero().tolist() == [[9]]
    selected = x.indices_SK[9][x.indices_SK[9] >= 0]
    assert (~dkv.isfinite().all((1, 2))).nonzero()[:, 0].tolist() == selected.tolist()


def test_few_heads_alone_are_folded() -> None:
    x = make(PACK, "cpu")
    q, kv, indices = x.q_SHD, x.kv_TGE, x.indices_SK
    assert folded.pays(q, kv, indices) and folded.pays(q.repeat(1, 2, 1), kv, indices)
    assert not folded.pays(q[:, :8], kv, indices) and not folded.pays(q.repeat(1, 8, 1), kv, indices)
    assert not folded.pays(q[:0], kv, indices[:0]) and not folded.pays(q, kv, indices[:, :0])
