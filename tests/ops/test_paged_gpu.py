"""Attention on quantized pages at the 671B model's shape, by the kernels of several backends: Hopper and FlashMLA."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.support import oracle, pages
from tokensieve import ops


@pytest.fixture(params=["hopper", "vendor"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """With poisoned outputs."""
    if request.param == "vendor":
        pytest.importorskip("flash_mla", reason="FlashMLA is not installed")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def with_holes(x: pages.Pool) -> pages.Pool:
    """Every third place unused, wherever it is, and the indices in 64 bits."""
    unused = torch.arange(x.indices.shape[1], device=x.indices.device) % 3 == 1
    return replace(x, indices=x.indices.masked_fill(unused, -1).long())


def equals_the_reference(x: pages.Pool, backend: str) -> None:
    out, lse = x.attention(backend=backend)
    out64, lse64 = replace(x, q=x.q.double()).attention(backend="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.is_contiguous() and lse.is_contiguous()
    oracle.assert_close(out.double(), out64, 1.5e-2, 1.0, "out")
    assert torch.equal(lse.isfinite(), lse64.isfinite()) and not (lse == math.inf).any()
    oracle.assert_close(lse.double(), lse64, 1e-3, 1.0, "lse")
    empty = (x.indices < 0).all(1)
    assert not out[empty].any() and (lse[empty] == -math.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("places", [5, 64, 70])
def test_paged_attention_is_the_references(places: int, n: int, heads: int, backend: str) -> None:
    """Lengths of 0, 1, 63, 64, 65 and more, so empty rows too.

    Every byte that no token owns is NaN, and so is what is read for an unused place.
    """
    x = pages.make("fp8", n, dtype="bfloat16", heads=heads, places=places).to("cuda")
    for case in (x, with_holes(x), replace(x, indices=torch.full_like(x.indices, -1))):
        equals_the_reference(case, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_paged_attention_at_full_size(n: int, backend: str) -> None:
    """128 heads, k = 2048, rows shorter than that; the same call has the same bits."""
    lengths = (4096, 0, 1, 63, 2047, 2048, 3000)
    x = pages.make("fp8", n, lengths, "bfloat16", heads=128, places=2048, P=64).to("cuda")
    for case in (x, with_holes(x)):
        equals_the_reference(case, backend)
    for a, b in zip(x.attention(backend=backend), x.attention(backend=backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_nothing_outside_of_the_pages_is_an_entry(backend: str) -> None:
    """Missing pages, positions that are not seen, lengths past the table.

    Nothing looks at those beforehand on a GPU.
    """
    x = pages.make("fp8", lengths=(200, 130, 64), dtype="bfloat16", heads=64).to("cuda")
    table = x.page_table.clone()
    table[0, 1], table[1, 2] = -1, 1 << 30
    chosen = torch.tensor([[3, 70, 199, 200, 5000], [0, 128, 129, 100, 1 << 30], [-5, 1, 63, 64, 65]]).cuda()
    left = torch.tensor([[3, -1, 199, -1, -1], [0, -1, -1, 100, -1], [-1, 1, 63, -1, -1]]).cuda()
    actual = ops.sparse_attention_paged(x.q, x.entry_pages, chosen, table, x.lengths, pages.SCALE, backend=backend)
    clean = replace(x, indices=left)
    for a, e in zip(actual, clean.attention(backend=backend), strict=True):
        assert torch.equal(a, e)
    equals_the_reference(clean, backend)
    too_long = torch.full_like(x.lengths, 5000)
    ops.sparse_attention_paged(x.q, x.entry_pages, chosen, table, too_long, pages.SCALE, backend=backend)
    torch.cuda.synchronize()
    none = replace(x, **{name: getattr(x, name)[:0] for name in "q indices page_table lengths".split()})
    assert none.attention(backend=backend)[0].shape == (0, 64, 512)
    unused = torch.full_like(x.indices, -1)
    for bare in (
        replace(x, lengths=torch.zeros_like(x.lengths), indices=unused, page_table=x.page_table[:, :0]),
        replace(x, lengths=torch.zeros_like(x.lengths), indices=unused, entry_pages=x.entry_pages[:0]),
        replace(x, indices=unused[:, :0]),
    ):
        out, lse = bare.attention(backend=backend)
        assert not out.any() and (lse == -math.inf).all()


@pytest.mark.gpu
def test_one_layer_of_a_pool_of_all_layers(backend: str) -> None:
    x = pages.make("fp8", lengths=(0, 65, 130), dtype="bfloat16", heads=128).to("cuda")
    other = torch.full_like(x.entry_pages, 0xFF)
    for inside in (torch.stack((x.entry_pages, other), 1)[:, 0], torch.stack((other, x.entry_pages, other), 1)[:, 1]):
        assert not inside.is_contiguous()
        for a, e in zip(
            replace(x, entry_pages=inside).attention(backend=backend), x.attention(backend=backend), strict=True
        ):
            assert torch.equal(a, e)
    turned = x.entry_pages.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="bytes lie together"):
        replace(x, entry_pages=turned).attention(backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [3, 16, 200])
def test_any_number_of_heads(heads: int) -> None:
    x = pages.make("fp8", 2, dtype="bfloat16", heads=heads, places=70).to("cuda")
    for case in (x, with_holes(x)):
        equals_the_reference(case, "hopper")


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x = pages.make("fp8", 1, (300, 129, 1, 0, 256), "bfloat16", heads=64, places=192, P=5).to("cuda")
    x.attention(backend="hopper")
    held = x.indices.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = replace(x, indices=held).attention(backend="hopper")
    for indices in (x.indices, with_holes(x).indices.int()):
        held.copy_(indices)
        graph.replay()
        for a, e in zip(actual, replace(x, indices=indices).attention(backend="hopper"), strict=True):
            assert torch.equal(a, e)
