"""Dense attention of blocks of a pack's queries, by levels, against the reference."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 1), (4, 3)])
def test_every_pair_is_in_one_level(lengths: tuple[int, ...], ranks: int, rank: int) -> None:
    starts, ends = ranges(lengths, ranks, rank, rows=2)
    T = 2 * sum(lengths)
    seen = np.zeros((len(starts), T), dtype=int)
    found = list(scattered.levels(starts, ends, T))
    assert len(found) <= 2 + math.log2(T / 64)
    for level in found:
        queries, keys = level.query_bounds.tolist(), level.key_bounds.tolist()
        assert level.longest_query == max(np.diff(queries)) and level.longest_key == max(np.diff(keys))
        assert len(level.keys.unique()) == len(level.keys) == keys[-1] and len(level.rows) == queries[-1]
        for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
            mask = np.tri(b - a, dtype=int) if level.causal else 1
            seen[np.ix_(level.rows[a:b], level.keys[c:d])] += mask
    key = np.arange(T)
    assert (seen == ((key >= starts[:, None].numpy()) & (key < ends[:, None].numpy()))).all()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("groups", [4, 2])
def test_values_and_gradients(lengths: tuple[int, ...], groups: int) -> None:
    """float32 on both sides, sums in another order."""
    starts, ends = ranges(lengths, 2, 1)
    draw = torch.Generator().manual_seed(0)
    T, found = sum(lengths), {}
    q, k, v = (
        torch.randn(n, h, w, generator=draw) for n, h, w in ((len(starts), 4, 24), (T, groups, 24), (T, groups, 16))
    )
    dout = torch.randn(len(starts), 4, 16, generator=draw)
    for backend in ("fused", "reference"):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = ops.dense_attention(*given, starts, ends, 0.2, backend=backend)
        out.backward(dout)
        found[backend] = [out.detach(), lse.detach(), *(x.grad for x in given)]
    for a, b in zip(*found.values(), strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_what_is_left_to_the_reference() -> None:
    whole = torch.arange(64, dtype=torch.int32)
    for starts, ends in (
        (whole * 0, whole + 2),  # from 1 to 64
        (whole * 0, whole.flip(0) + 1),  # in another order
        (whole * 0, whole * 2 + 1),  # every second query
        (whole + 1, whole + 1),  # no keys
    ):
        assert scattered.why_not(starts, ends)
    assert scattered.why_not(whole * 0, whole + 65) is None
    operands = {"bounds": None, "starts": whole * 0, "ends": whole + 65, "k": torch.zeros(128, 1, 8)}
    assert fused.limits("dense_attention", torch.zeros(64, 1, 8), operands | {"v": operands["k"]}) is None
    assert fused.limits("dense_attention", torch.zeros(128, 1, 8), operands | {"v": operands["k"]}) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "d", "v"), [(16, 16, 192, 128), (32, 8, 128, 128)])
def test_on_a_gpu(heads: int, groups: int, d: int, v: int) -> None:
    """bfloat16 on one side and float32 on the other, relative to the largest value, as test_triton.py."""
    starts, ends = (x.cuda() for x in ranges((700, 33, 2000, 1363), 2, 1))
    draw = torch.Generator().manual_seed(0)
    sizes = (len(starts), heads, d), (4096, groups, d), (4096, groups, v), (len(starts), heads, v)
    q, k, values, dout = (torch.randn(size, generator=draw).cuda().bfloat16() for size in sizes)
    found = {}
    for backend, dtype in (("fused", torch.bfloat16), ("reference", torch.float32)):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, values)]
        out, lse = ops.dense_attention(*given, starts, ends, d**-0.5, backend=backend)
        out.backward(dout.to(dtype))
        found[backend] = [out.detach(), lse.detach(), *(x.grad for x in given)]
    for a, b in zip(*found.values(), strict=True):
        assert (a.float() - b).abs().max() / b.abs().max() < 1.5e-2
