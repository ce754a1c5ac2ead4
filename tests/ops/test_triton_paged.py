"""The Triton kernels of the paged ops against the reference: in Triton's interpreter where there is no GPU, else on it.

Outputs are poisoned, as in test_triton.py, and so is every byte of a page that no token of a sequence owns (pages.py).
The interpreter rounds neither to bfloat16 nor to FP8 as a GPU does, so what it is to round here, to bfloat16, is exact
in it already.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.pages import SCALE, Pool, empty_pools, make, new_tokens, raw
from tokensieve import ops
from tokensieve.ops import quant

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.triton import backend as kernels
from tokensieve.ops.triton import paged_attention, paged_places

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ["cpu", GPU]
# As in test_triton.py; Hopper adds up products of FP8 in fewer bits than float32 has.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 1.5e-2}
LSE_TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-3}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def backend(device: str) -> str:
    return "triton" if device == "cuda" else "interpreter"


def with_holes(x: Pool) -> Pool:
    """Every third place unused, wherever it is, and the indices in 64 bits."""
    unused = torch.arange(x.indices.shape[1], device=x.indices.device) % 3 == 1
    return replace(x, indices=x.indices.masked_fill(unused, -1).long())


def equals_the_reference(x: Pool, dtype: str, device: str, scores: bool = True, attention: bool = True) -> None:
    x = x.to(device)
    exact = replace(x, q=x.q.double(), q_I=x.q_I.double(), w=x.w.double())
    if scores:
        actual, expected = x.scores(backend=backend(device)), exact.scores(backend="reference")
        assert actual.dtype == torch.float32 and actual.shape == expected.shape
        for t, _, seen in x.queries():
            oracle.assert_close(actual[t, :seen].double(), expected[t, :seen], TOLERANCE[dtype], 1.0, f"scores of {t}")
    if attention:
        (out, lse), (out64, lse64) = x.attention(backend=backend(device)), exact.attention(backend="reference")
        assert out.dtype == x.q.dtype and lse.dtype == torch.float32
        oracle.assert_close(out.double(), out64, TOLERANCE[dtype], 1.0, "out")
        assert torch.equal(lse.isfinite(), lse64.isfinite()) and not (lse == math.inf).any()
        # entries are rounded to the queries' dtype
        narrowed = x.entry_pages.dtype not in (torch.uint8, x.q.dtype)
        oracle.assert_close(lse.double(), lse64, (TOLERANCE if narrowed else LSE_TOLERANCE)[dtype], 1.0, "lse")


SMALL = (
    ("float32", 1, "float32"),
    ("float32", 3, "float32"),
    ("float16", 5, "float16"),
    ("float16", 1, "float32"),  # queries wider than what the pages hold
    ("bfloat16", 2, "float32"),
    ("fp8", 1, "float32"),
    ("fp8", 2, "float16"),
)


@pytest.mark.parametrize(("kind", "n", "dtype"), SMALL)
def test_ragged_lengths(kind: str, n: int, dtype: str) -> None:
    """Of 0, 1, 63, 64, 65 and more tokens; more places than a short sequence has tokens."""
    equals_the_reference(make(kind, n, dtype=dtype), dtype, "cpu")


@pytest.mark.parametrize(
    ("kind", "heads", "pieces"),
    [
        ("float32", 3, 1),
        ("float32", 3, 5),
        pytest.param("float32", 128, 2, marks=pytest.mark.slow),
        ("fp8", 3, 1),
        ("fp8", 3, 3),
    ],
)
def test_many_places(kind: str, heads: int, pieces: int, monkeypatch) -> None:
    """Several tiles, in one piece and in several, some of which have nothing to do."""
    monkeypatch.setattr(paged_attention, "pieces", lambda programs, tiles: min(pieces, tiles))
    x = make(kind, lengths=(0, 70, 256), heads=heads, places=300)
    equals_the_reference(x, "float32", "cpu", scores=False)
    x.indices[1] = -1
    equals_the_reference(with_holes(x), "float32", "cpu", scores=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float16", "float32"])
def test_ragged_lengths_on_a_gpu(kind: str, n: int, dtype: str) -> None:
    for heads in (3, 16, 64, 128):
        x = make(kind, n, dtype=dtype, heads=heads)
        equals_the_reference(x, dtype, "cuda", scores=heads <= 64)
        equals_the_reference(with_holes(x), dtype, "cuda", scores=False)
    if kind == "fp8" and dtype == "bfloat16":  # as the model scores
        x = make(kind, n, heads=64)
        q_I, scale = quant.quantize_e4m3(x.q_I, quant.INDEX_WIDTH, "ue8m0")
        x = replace(x, q_I=q_I, w=x.w * scale.squeeze(-1))
        equals_the_reference(x, dtype, "cuda", attention=False)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("places", [64, 2048])
def test_full_shapes(places: int, n: int) -> None:
    """128 heads on 576 wide entries, k = 2048; the same call has the same bits."""
    x = make("fp8", n, (4096, 0, 1, 63, 2047, 2048, 3000), "bfloat16", heads=128, places=places, P=64)
    for case in (x, with_holes(x)):
        equals_the_reference(case, "bfloat16", "cuda", scores=False)
    x = x.to("cuda")
    for a, b in zip(x.attention(), x.attention(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [3, 8, 64])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "float16"])
def test_scores_have_the_bits_of_prefill(kind: str, n: int, heads: int) -> None:
    """Only a GPU can show it: the interpreter's products are numpy's."""
    x = make(kind, n, (130, 1, 64, 0, 1500, 70), heads=heads, P=24)
    x = replace(x, q_I=x.q_I.to(torch.float8_e4m3fn if kind == "fp8" else getattr(torch, kind))).to("cuda")
    scores = x.scores(backend="triton")
    assert torch.equal(scores.nan_to_num(), x.scores(backend="triton").nan_to_num())
    for t, b, seen in x.queries():
        if seen:
            keys, scale, one = x.keys[b].cuda(), x.scales[b], slice(t, t + 1)
            scale = None if scale is None else scale.cuda()
            first, last = torch.zeros(1, device="cuda").int(), torch.full((1,), seen, device="cuda").int()
            alone = ops.index_scores(x.q_I[one], keys, x.w[one], first, last, scale, backend="triton")
            assert torch.equal(scores[t, :seen], alone[0, :seen]), f"query {t}"


@pytest.mark.parametrize("device", DEVICES)
def test_every_number_of_the_latent_is_read_exactly(device: str) -> None:
    """A query that selects one token returns its latent.

    The latents have all of E4M3 but NaN, times scales from one end of bfloat16 to the other.
    """
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    powers = torch.tensor([-22, -8, 0, 1, 8, 40, 110, -110])
    tokens = torch.zeros(64, 656, dtype=torch.uint8)
    tokens[:, :512] = codes.repeat(200)[: 64 * 512].view(64, 512)
    tokens[:, 512:528] = torch.exp2(powers.repeat(32).view(64, 4).float()).view(torch.uint8)
    S = 8 if device == "cpu" else 64
    q = torch.zeros(S, 2, 576, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    indices = torch.arange(S, dtype=torch.int32)[:, None] * (64 // S)
    table, lengths = torch.zeros(S, 1, dtype=torch.int32), torch.full((S,), 64, dtype=torch.int32)
    inputs = (y.to(device) for y in (q, tokens[None], indices, table, lengths))
    out, lse = ops.sparse_attention_paged(*inputs, SCALE, backend=backend(device))
    expected = quant.unpack_latent_page(tokens[None], q.dtype)[0][0, indices[:, 0]]
    assert torch.equal(out.cpu(), expected[:, None].expand(-1, 2, -1)) and not lse.any()


def test_pieces_fill_a_gpu() -> None:
    """By queries x blocks of heads, each with 2048 places."""
    pieces = paged_attention.pieces
    assert [pieces(n, 32) for n in (2, 8, 32, 64, 128, 132, 256, 1000)] == [32, 16, 4, 2, 1, 1, 1, 1]
    assert pieces(2, 1) == 1 and pieces(1, 500) == paged_attention.MOST_PIECES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float16", "fp8"])
def test_nothing_outside_of_the_pages_is_touched(kind: str, device: str) -> None:
    """Missing pages, positions that are not seen, lengths past the table.

    Nothing looks at those beforehand on a GPU.
    """
    x = make(kind, lengths=(200, 130, 64), dtype="float16", heads=2).to(device)
    table = x.page_table.clone()
    table[0, 1], table[1, 2] = -1, 1 << 30
    right = x.scores(backend=backend(device))
    scores = kernels.index_scores_paged(x.q_I, x.index_pages, x.w, table, x.lengths)
    for b, missing in ((0, slice(64, 128)), (1, slice(128, 130)), (2, slice(0, 0))):
        assert scores[b, missing].isnan().all()
        right[b, missing] = math.nan
        assert torch.equal(scores[b, : x.lengths[b]].nan_to_num(1e9), right[b, : x.lengths[b]].nan_to_num(1e9))
    chosen = torch.tensor([[3, 70, 199, 200, 5000], [0, 128, 129, 100, 1 << 30], [-5, 1, 63, 64, 65]]).to(device)
    left = torch.tensor([[3, -1, 199, -1, -1], [0, -1, -1, 100, -1], [-1, 1, 63, -1, -1]]).to(device)
    actual = kernels.sparse_attention_paged(x.q, x.entry_pages, chosen, table, x.lengths, SCALE, *x.split.values())
    for a, e in zip(actual, replace(x, indices=left).attention(backend=backend(device)), strict=True):
        assert torch.equal(a, e)
    too_long = torch.full_like(x.lengths, 5000)
    kernels.index_scores_paged(x.q_I, x.index_pages, x.w, table, too_long)
    kernels.sparse_attention_paged(x.q, x.entry_pages, chosen, table, too_long, SCALE, *x.split.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("n", "K", "multiple"), [(1, 70, 64), (1, 64, 64), (2, 1100, 64), (3, 5, 128), (2, 0, 64)])
def test_places_in_the_pool(n: int, K: int, multiple: int, dtype: torch.dtype, device: str) -> None:
    """Against one place after the other: missing pages, positions that are not seen, lengths past the table."""
    g = torch.Generator().manual_seed(n)
    lengths = torch.tensor([0, 1, 64, 130, 256, 5000], dtype=torch.int32)
    table = torch.randint(-2, 12, (6, 4), generator=g, dtype=torch.int32)
    table[3, 2] = 1 << 30
    indices = torch.randint(-5, 300, (6 * n, K), generator=g).to(dtype)
    indices[:, :1] = (1 << 31) - 1 if dtype == torch.int32 else 1 << 40
    actual = paged_places.pool_places(*(x.to(device) for x in (indices, table, lengths)), 10, multiple)
    assert actual.dtype == torch.int32 and actual.shape == (6 * n, -(-K // multiple) * multiple)
    expected = torch.full(actual.shape, -1, dtype=torch.int32)
    for t in range(6 * n):
        b, j = divmod(t, n)
        for i, index in enumerate(indices[t].tolist()):
            if 0 <= index < min(int(lengths[b]), 256) - n + 1 + j and 0 <= (page := int(table[b, index // 64])) < 10:
                expected[t, i] = page * 64 + index % 64
    assert torch.equal(actual.cpu(), expected) and (K == 0 or (expected >= 0).any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float16", "fp8"])
def test_one_layer_of_a_pool_of_all_layers(kind: str, device: str) -> None:
    x = make(kind, lengths=(0, 65, 130), dtype="float16").to(device)
    inside = [torch.stack((pages, pages.clone()), 1)[:, 0] for pages in (x.entry_pages, x.index_pages)]
    turned = [pages.clone().transpose(0, 1).contiguous().transpose(0, 1) for pages in (x.entry_pages, x.index_pages)]
    tokens = [t.to(device).half() for t in new_tokens(5, kind)]
    slots = torch.tensor([3, 64, 200, 201, 319], device=device)
    how = {"backend": backend(device)}
    scores, (out, _) = x.scores(**how), x.attention(**how)
    for pools in (inside, turned):
        other = replace(x, entry_pages=pools[0], index_pages=pools[1])
        again = other.scores(**how)
        assert all(torch.equal(again[t, :seen], scores[t, :seen]) for t, _, seen in x.queries())
        assert torch.equal(other.attention(**how)[0], out)
        ops.write_caches(*tokens, *pools, slots, **how)
    ops.write_caches(*tokens, x.entry_pages, x.index_pages, slots, **how)
    for pools in (inside, turned):
        for a, e in zip(pools, (x.entry_pages, x.index_pages), strict=True):
            assert torch.equal(raw(a), raw(e))


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device: str) -> None:
    x = make(dtype="float16", kind="float16").to(device)
    how = {"backend": backend(device)}
    none = replace(x, **{name: getattr(x, name)[:0] for name in "q q_I w indices page_table lengths".split()})
    assert none.scores(**how).shape == (0, 256) and none.attention(**how)[0].shape == (0, 3, 24)
    lengths, unused = torch.zeros_like(x.lengths), torch.full_like(x.indices, -1)
    for bare in (
        replace(x, lengths=lengths, indices=unused, page_table=x.page_table[:, :0]),
        replace(x, lengths=lengths, indices=unused, entry_pages=x.entry_pages[:0], index_pages=x.index_pages[:0]),
        replace(x, indices=unused[:, :0]),
    ):
        out, lse = bare.attention(**how)
        assert not out.any() and (lse == -math.inf).all()
        assert bare.scores(**how).shape == (7, 64 * bare.page_table.shape[1])
    tokens, pools = (t.to(device) for t in new_tokens(2, "fp8")), empty_pools(0, "fp8")
    ops.write_caches(*tokens, *(p.to(device) for p in pools), torch.tensor([-1, -1], device=device), **how)


def hard_tokens(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Tokens whose numbers lie where rounding is decided, and rows of every size."""
    g = torch.Generator().manual_seed(7)
    tokens = new_tokens(22, kind, 3)
    latent, k_rope, k_I = (t.clone() for t in tokens)
    for x in (latent, k_I):
        x[0], x[1] = 0.0, -0.0
        x[2] = 448.0  # the largest that a scale of 1 holds, and just past it
        x[3] = 448.1
        x[4:12] *= torch.exp2(torch.arange(-6.0, 10, 2))[:, None]
        x[12] = 1e-7  # below the smallest largest value
        x[13] = torch.where(torch.rand(x.shape[1], generator=g) < 0.02, 60000.0, x[13] * 1e-3)
        # multiples of half of the smallest step: ties
        x[14:20] = torch.randint(-900, 900, (6, x.shape[1]), generator=g) / 1024
    return [t.to(dtype) for t in (latent, k_rope.bfloat16(), k_I)]


def writes() -> list:
    """(device, kind of pages, dtype of tokens); bfloat16 on a GPU alone, because the interpreter rounds otherwise."""
    parameters = []
    for kind in ("fp8", "float16", "float32", "bfloat16"):
        for dtype in ("float32", "float16", "bfloat16"):
            if "bfloat16" not in (kind, dtype):
                parameters.append(("cpu", kind, dtype))
            parameters.append(pytest.param("cuda", kind, dtype, marks=pytest.mark.gpu))
    return parameters


@pytest.mark.parametrize(("device", "kind", "dtype"), writes())
def test_written_bytes_are_those_of_the_reference(device: str, kind: str, dtype: str) -> None:
    tokens = hard_tokens(kind, getattr(torch, dtype))
    g = torch.Generator().manual_seed(8)
    slots = torch.randperm(3 * 64, generator=g)[: len(tokens[0])]
    slots[5], slots[9] = -1, -77
    for t in tokens:  # a skipped token may hold anything
        t[5] = math.nan
    slots = slots.int() if dtype == "float16" else slots
    expected, actual = empty_pools(3, kind), [p.to(device) for p in empty_pools(3, kind)]
    ops.write_caches(*tokens, *expected, slots, backend="reference")
    ops.write_caches(*(t.to(device) for t in tokens), *actual, slots.to(device), backend=backend(device))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(raw(a).cpu(), raw(e))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["fp8", "float32"])
def test_a_dense_model_has_index_pages_without_width(kind: str, device: str) -> None:
    latent, k_rope, _ = hard_tokens(kind, torch.float32)
    expected, actual = empty_pools(3, kind)[0], empty_pools(3, kind)[0].to(device)
    slots = torch.arange(len(latent), dtype=torch.int32)
    ops.write_caches(latent, k_rope, latent[:, :0], expected, torch.zeros(3, 64, 0), slots, backend="reference")
    tokens = [t.to(device) for t in (latent, k_rope, latent[:, :0])]
    ops.write_caches(*tokens, actual, torch.zeros(3, 64, 0).to(device), slots.to(device), backend=backend(device))
    assert torch.equal(raw(actual).cpu(), raw(expected)) and raw(expected).any()


@pytest.mark.parametrize("device", DEVICES)
def test_every_rounding_to_e4m3(device: str) -> None:
    """Every number of half precision up to 448, beside a 448 that makes the scale 1."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[every.abs() <= 448]
    rows = torch.cat((every, torch.zeros(-len(every) % 508))).view(-1, 4, 127)
    if device == "cpu":
        rows = rows[::9]
    latent = torch.cat((rows, torch.full((*rows.shape[:2], 1), 448.0)), 2).flatten(1)
    N = len(latent)
    entry_pages, index_pages = empty_pools(-(-N // 64), "fp8")
    others = torch.zeros(N, 64), torch.ones(N, 128)
    inputs = (x.to(device) for x in (latent, *others))
    entry_pages, index_pages = entry_pages.to(device), index_pages.to(device)
    ops.write_caches(*inputs, entry_pages, index_pages, torch.arange(N, device=device), backend=backend(device))
    actual = entry_pages.flatten(0, 1)[:N, :512].cpu()
    assert torch.equal(actual, latent.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_token_is_broken_when_it_is_read(device: str) -> None:
    """A NaN or an infinity is not looked for beforehand, but neither is it hidden; slots past the pages are skipped."""
    tokens = [t.to(device) for t in new_tokens(4, "fp8")]
    tokens[1] = tokens[1].bfloat16().float()
    pools, expected = ([p.to(device) for p in empty_pools(2, "fp8")] for _ in range(2))
    slots = torch.tensor([1, 2, 3, 70], device=device)
    ops.write_caches(*tokens, *expected, slots, backend=backend(device))
    tokens[0][1, 130], tokens[2][2, 7] = math.nan, math.inf
    slots[3] = 128
    kernels.write_caches(*tokens, *pools, slots)
    latent = quant.unpack_latent_page(pools[0], torch.float32)[0][0]
    assert latent[2, 128:256].isnan().all() and not latent[2, :128].isnan().any() and not latent[1].isnan().any()
    values, scales = quant.unpack_index_page(pools[1])
    assert scales[0, 3].isnan() and values[0, 3].float().isnan().all() and scales[0, 1:3].isfinite().all()
    assert torch.equal(raw(pools[0][0, 1]), raw(expected[0][0, 1]))
    assert torch.equal(raw(pools[0][1]), raw(empty_pools(2, "fp8")[0][1]).to(device))


@pytest.mark.gpu
def test_a_cache_is_written_scored_selected_and_attended_to() -> None:
    """The four ops of a decode step, one after the other, as a CUDA graph replays them."""
    x = make("fp8", 1, (600, 333, 64), "bfloat16", heads=64, places=128, P=10).to("cuda")
    q_I = x.q_I.to(torch.float8_e4m3fn)
    tokens = [t.cuda().bfloat16() for t in new_tokens(3, "fp8")]
    last = (x.lengths - 1).long()
    slots = x.page_table.gather(1, (last // 64)[:, None])[:, 0].long() * 64 + last % 64
    starts = torch.zeros_like(x.lengths)

    def step() -> tuple[Tensor, Tensor]:
        ops.write_caches(*tokens, x.entry_pages, x.index_pages, slots, backend="triton")
        scores = ops.index_scores_paged(q_I, x.index_pages, x.w.float(), x.page_table, x.lengths, backend="triton")
        indices = ops.select_topk(scores, 128, starts, x.lengths, backend="triton")
        return replace(x, indices=indices).attention(backend="triton")

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_what_the_kernels_do_not_take() -> None:
    x = make("float32")
    for changed, why in ((x.q.double(), "float64"), (x.q.bfloat16(), "bfloat16")):
        with pytest.raises(ValueError, match=f"interpreter.*{why}"):
            dataclasses.replace(x, q=changed).attention(backend="interpreter")
