"""Dense attention of blocks of a pack's queries, by levels, against the reference."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokensieve import ops
from tokensieve.model.gathered import ContextGroup
from tokensieve.model.pack import make_pack
from tokensieve.ops import fused, scattered

LENGTHS = {"one document": (512,), "documents": (70, 33, 9, 200, 1, 199), "aligned": (128, 256, 128)}


def ranges(lengths: tuple[int, ...], ranks: int, rank: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """starts and ends of a rank's queries."""
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(rows, 1)
    pack = make_pack(rows, positions.shape[1], torch.device("cpu"), positions, None, None, 1 << 20)
    own = ContextGroup(rank, ranks, None).own_queries(pack)
    return own.starts_N, own.ends_N


def pairs(found: tuple[scattered.Level, ...], S: int, T: int) -> np.ndarray:
    """(S, T), how many times a query meets a key."""
    seen = np.zeros((S, T), dtype=int)
    for level in found:
        queries, keys = level.query_bounds.tolist(), level.key_bounds.tolist()
        assert level.longest_query == max(np.diff(queries)) and level.longest_key == max(np.diff(keys))
        assert len(level.keys.unique()) == len(level.keys) == keys[-1] and len(level.rows) == queries[-1]
        for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
            mask = np.tri(b - a, dtype=int) if level.causal else 1
            seen[np.ix_(level.rows[a:b], level.keys[c:d])] += mask
    return seen


def visible(starts: Tensor, ends: Tensor, T: int) -> np.ndarray:
    key = np.arange(T)
    return (key >= starts[:, None].numpy()) & (key < ends[:, None].numpy())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 1), (4, 3)])
def test_every_pair_is_in_one_level(lengths: tuple[int, ...], ranks: int, rank: int) -> None:
    starts, ends = ranges(lengths, ranks, rank, rows=2)
    T = 2 * sum(lengths)
    found = scattered.levels(starts, ends, T)
    assert found is not None and len(found) <= 2 + math.log2(T / 64)
    assert (pairs(found, len(starts), T) == visible(starts, ends, T)).all()


def test_ranges_of_any_kind_are_divided_rightly_or_not_at_all() -> None:
    """Drawn: blocks of 16 queries on 128 keys, documents of drawn lengths, and one change that may leave no pack."""
    draw, T = np.random.default_rng(0), 128
    divided = {"as they are": 0, "a start": 0, "some starts": 0, "a window": 0, "an end": 0}
    for trial in range(400):
        ends = (np.sort(draw.choice(8, draw.integers(1, 6), False))[:, None] * 16 + np.arange(1, 17)).flatten()
        edges = np.append(0, np.sort(draw.choice(np.arange(1, T), draw.integers(0, 5), False)))
        starts = edges[np.searchsorted(edges, ends - 1, "right") - 1]
        what = list(divided)[trial % len(divided)]
        i = draw.integers(len(starts))
        if what == "a start":
            starts[i] = draw.integers(ends[i])
        elif what == "some starts":
            starts[i:] = np.minimum(ends[i:] - 1, draw.integers(T))
        elif what == "a window":
            starts = np.maximum(starts, ends - 1 - draw.integers(1, T))
        elif what == "an end":
            ends[i] = draw.integers(starts[i], T + 2)
        starts, ends = (torch.from_numpy(x) for x in (starts, ends))
        found = scattered.levels(starts, ends, T)
        if found is not None:
            divided[what] += 1
            assert (pairs(found, len(starts), T) == visible(starts, ends, T)).all()
    assert divided["as they are"] == 80 and min(divided.values()) < 80


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_values_and_gradients(lengths: tuple[int, ...], groups: int, through: str) -> None:
    """float32 on both sides, sums in another order."""
    starts, ends = ranges(lengths, 2, 1)
    draw = torch.Generator().manual_seed(0)
    T, found = sum(lengths), {}
    q, k, v = (
        torch.randn(n, h, w, generator=draw) for n, h, w in ((len(starts), 4, 24), (T, groups, 24), (T, groups, 16))
    )
    dout, dlse = torch.randn(len(starts), 4, 16, generator=draw), torch.randn(len(starts), 4, generator=draw)
    for backend in ("fused", "reference"):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = ops.dense_attention(*given, starts, ends, 0.2, backend=backend)
        parts = {"out": (out * dout).sum(), "lse": (lse * dlse).sum()}
        sum(parts[name] for name in parts if through in (name, "both")).backward()
        found[backend] = [out.detach(), lse.detach(), *(x.grad for x in given)]
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


WHOLE = torch.arange(64, dtype=torch.int32)
LEFT = {
    "from 1 to 64": (WHOLE * 0, WHOLE + 2),
    "in another order": (WHOLE * 0, WHOLE.flip(0) + 1),
    "every second query": (WHOLE * 0, WHOLE * 2 + 1),
    "no keys": (WHOLE + 1, WHOLE + 1),
    "a window": ((WHOLE + 49).clamp_min(0), WHOLE + 65),
    "two starts in a block": (torch.where(WHOLE < 32, 10, 70), WHOLE + 65),
    "past the keys": (WHOLE * 0, WHOLE + 129),
    "before the keys": (WHOLE * 0 - 1, WHOLE + 65),
}


@pytest.mark.parametrize(("starts", "ends"), LEFT.values(), ids=LEFT)
def test_what_is_left_to_the_reference(starts: Tensor, ends: Tensor) -> None:
    q, k = torch.randn(64, 1, 8), torch.randn(128, 1, 8)
    operands = {"bounds": None, "starts": starts, "ends": ends, "k": k, "v": k}
    assert "blocks of a causal pack" in fused.limits("dense_attention", q, operands)
    if starts.min() >= 0 and ends.max() <= 128:
        auto, plain = (ops.dense_attention(q, k, k, starts, ends, 0.3, backend=b) for b in ("auto", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(auto, plain, strict=True))


def test_what_is_taken() -> None:
    k = torch.zeros(128, 1, 8)
    operands = {"bounds": None, "starts": WHOLE * 0, "ends": WHOLE + 65, "k": k, "v": k}
    assert fused.limits("dense_attention", torch.zeros(64, 1, 8), operands) is None
    assert fused.limits("dense_attention", torch.zeros(128, 1, 8), operands) is not None


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """One entry for each time that ranges are looked at."""
    seen, divided = [], scattered._divided

    def counted(starts: Tensor, ends: Tensor, T: int) -> tuple[scattered.Level, ...] | None:
        seen.append(T)
        return divided(starts, ends, T)

    monkeypatch.setattr(scattered, "_divided", counted)
    return seen


def test_a_pack_is_looked_at_once(looks: list[int]) -> None:
    """By all layers, both ways, under activation checkpointing too."""
    starts, ends = ranges((70, 186), 2, 0)
    k = torch.randn(256, 2, 8, requires_grad=True)
    q = torch.randn(128, 2, 8)
    for _ in range(2):
        q = ops.dense_attention(q, k, k, starts, ends, 0.3, backend="fused")[0]
        q = checkpoint(lambda q: ops.dense_attention(q, k, k, starts, ends, 0.3)[0], q, use_reentrant=False)
    q.sum().backward()
    assert looks == [256]
    fused.limits("dense_attention", q, {"bounds": None, "starts": starts, "ends": ends.clone(), "k": k, "v": k})
    assert looks == [256] * 2


def test_what_may_have_changed_is_looked_at_again(looks: list[int]) -> None:
    starts, ends = ranges((256,), 2, 0)
    assert scattered.levels(starts, ends, 256) is scattered.levels(starts, ends, 256) and len(looks) == 1
    for x, change in ((ends, 1), (starts, -1)):
        x += change
        assert scattered.levels(starts, ends, 256) is None
        x -= change
        assert scattered.levels(starts, ends, 256) is not None
    assert scattered.levels(starts, ends, 200) is None and len(looks) == 6
    with torch.inference_mode():
        starts, ends = ranges((256,), 2, 0)
        assert scattered.levels(starts, ends, 256) is not None
        ends += 1
        assert scattered.levels(starts, ends, 256) is None


def test_nothing_is_kept_of_a_pack_that_is_gone() -> None:
    starts, ends = ranges((256,), 2, 0)
    before = len(scattered._known)
    scattered.levels(starts, ends, 256)
    scattered.levels(ends, ends, 256)
    assert len(scattered._known) == before + 2
    del starts, ends
    assert len(scattered._known) == before


def test_other_reasons_come_before_a_look(looks: list[int], monkeypatch) -> None:
    starts, ends = ranges((256,), 2, 0)

    def reason(q: Tensor | Mock, k: Tensor) -> str | None:
        return fused.limits("dense_attention", q, {"bounds": None, "starts": starts, "ends": ends, "k": k, "v": k})

    q, k = torch.zeros(128, 1, 8), torch.zeros(256, 1, 8)
    assert "float64" in reason(q.double(), k.double()) and "bfloat16" in reason(q, k.bfloat16())
    on_cuda = Mock(shape=q.shape, dtype=torch.bfloat16, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "CUDA graph" in reason(on_cuda, k.bfloat16())
    assert not looks
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert reason(on_cuda, k.bfloat16()) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "d", "v"), [(16, 16, 192, 128), (32, 8, 128, 128), (4, 2, 20, 13)])
def test_on_a_gpu(heads: int, groups: int, d: int, v: int) -> None:
    """bfloat16 on one side and float32 on the other, relative to the largest value, as test_triton.py."""
    starts, ends = (x.cuda() for x in ranges((700, 33, 2000, 1363), 2, 1))
    draw = torch.Generator().manual_seed(0)
    sizes = (len(starts), heads, d), (4096, groups, d), (4096, groups, v), (len(starts), heads, v)
    q, k, values, dout = (torch.randn(size, generator=draw).cuda().bfloat16() for size in sizes)
    dlse = torch.randn(len(starts), heads, generator=draw).cuda()
    found = {}
    for backend, dtype in (("fused", torch.bfloat16), ("reference", torch.float32)):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, values)]
        out, lse = ops.dense_attention(*given, starts, ends, d**-0.5, backend=backend)
        ((out * dout.to(dtype)).sum() + (lse * dlse).sum()).backward()
        found[backend] = [out.detach(), lse.detach(), *(x.grad for x in given)]
    for a, b in zip(*found.values(), strict=True):
        assert (a.float() - b).abs().max() / b.abs().max() < 1.5e-2
