"""Grouped keys and values on pages: against the float64 oracle, and against the ops on the same entries in one piece.

Every backend that has them is tested: the reference, and the portable Triton kernels in the interpreter or on a GPU.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import oracle
from tests.support.pages import LENGTHS, PLAIN, SCALE, Layout, Pool, empty_pools, make, new_tokens, raw
from tokensieve import ops
from tokensieve.ops import reference
from tokensieve.ops.hopper import limits as hopper
from tokensieve.ops.triton import limits as triton

HEADS = 8
# Key and value widths: powers of two, one that is none, a key wider than its value, and the other way round.
WIDTHS = [(64, 64), (128, 128), (48, 48), (48, 64), (64, 24)]
BACKENDS = [
    "reference",
    pytest.param("interpreter", marks=pytest.mark.skipif(triton.no_triton() is not None, reason="Triton is missing")),
    pytest.param("triton", marks=pytest.mark.gpu),
]
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 1.5e-2}  # as in test_triton_paged.py


def pool(groups: int, d_k: int, d_v: int, kind: str = "float32", n: int = 1, **how) -> Pool:
    return make(kind, n, heads=HEADS, layout=Layout(d_k, d_v, 16, groups), **how)


def on(x: Pool, backend: str) -> Pool:
    return x.to("cuda") if backend == "triton" else x


def equals_the_oracle(x: Pool, backend: str, tolerance: float) -> None:
    out, lse = (y.cpu() for y in on(x, backend).attention(backend=backend))
    assert out.dtype == x.q.dtype and out.shape == (*x.q.shape[:2], x.d_v) and lse.shape == x.q.shape[:2]
    for t, b, seen in x.queries():
        one = slice(t, t + 1)
        expected = oracle.sparse_attention(x.q[one], x.entries[b][:seen], x.indices[one], SCALE, **x.split)
        for actual, e, what in zip((out[one], lse[one]), expected, ("out", "lse"), strict=True):
            oracle.assert_close(actual, e, tolerance, 1.0, f"{what} of query {t}")
        if seen == 0:
            assert not out[t].any() and (lse[t] == -math.inf).all()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("d_k", "d_v"), WIDTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_reference_equals_the_oracle(groups: int, d_k: int, d_v: int, n: int) -> None:
    """Ragged sequences, empty ones, a shared page, and NaN in every byte that no token owns (pages.py)."""
    for kind in ("float32", "float16"):
        equals_the_oracle(pool(groups, d_k, d_v, kind, n), "reference", TOLERANCE["float32"])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    ("groups", "d_k", "d_v", "n", "kind"),
    [
        (1, 64, 64, 1, "float32"),
        (2, 48, 48, 3, "float32"),
        (4, 128, 128, 1, "float16"),
        (2, 48, 64, 1, "float16"),
        (8, 64, 24, 2, "float32"),
    ],
)
def test_the_kernels_equal_the_oracle(groups: int, d_k: int, d_v: int, n: int, kind: str, backend: str) -> None:
    dtype = "float16" if backend == "triton" else "float32"  # products on a GPU are of halves
    x = pool(groups, d_k, d_v, kind, n, dtype=dtype)
    equals_the_oracle(x, backend, TOLERANCE["float32" if dtype == "float32" else "float16"])


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_more_heads_than_a_program_holds(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of heads in each group, several tiles of places, in one piece and in several."""
    from tokensieve.ops.triton import paged_attention

    for pieces in (1, 3):
        monkeypatch.setattr(paged_attention, "pieces", lambda programs, tiles, most=pieces: min(most, tiles))
        monkeypatch.setattr(paged_attention, "head_block", lambda heads: 16)
        x = make("float16", lengths=(0, 70, 200), heads=40, places=200, layout=Layout(32, 32, 16, 2), dtype="float16")
        equals_the_oracle(x, backend, TOLERANCE["float16"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 4])
def test_is_sparse_attention_on_entries_in_one_piece(groups: int, backend: str) -> None:
    x = pool(groups, 64, 64, "float16", dtype="float16")
    entries_TGE = torch.cat([e for e in x.entries if len(e)]).half()
    ends = torch.tensor([len(e) for e in x.entries]).cumsum(0).tolist()
    first = torch.tensor([[0, *ends][b] for _, b, _ in x.queries()], dtype=torch.int32)[:, None]
    indices = torch.where(x.indices < 0, -1, x.indices + first)
    device = on(x, backend).q.device
    expected = ops.sparse_attention(
        x.q.to(device), entries_TGE.to(device), indices.to(device), SCALE, **x.split, backend=backend
    )
    for a, e in zip(on(x, backend).attention(backend=backend), expected, strict=True):
        oracle.assert_close(a, e, 1e-6 if backend == "reference" else TOLERANCE["float16"])


def test_a_group_axis_of_one_is_none() -> None:
    """To the bit: MLA's entries may be given with it."""
    x = make("float32", 2)
    for a, e in zip(replace(x, entry_pages=x.entry_pages[:, :, None]).attention(), x.attention(), strict=True):
        assert torch.equal(a, e)
    tokens, written = new_tokens(3, "float32"), []
    for axis in (False, True):
        entries, keys = empty_pools(2, "float32")
        parts = [part[:, None] if axis else part for part in tokens[:2]]
        ops.write_caches(*parts, tokens[2], entries[:, :, None] if axis else entries, keys, torch.tensor([1, 70, -1]))
        written.append((raw(entries), raw(keys)))
    assert all(torch.equal(a, b) for a, b in zip(*written, strict=True))


def test_groups_are_heads_of_their_own() -> None:
    """Each group with its heads is an attention of one group, in the reference to the bit."""
    x = pool(4, 64, 48)
    out, lse = x.attention()
    for g in range(4):
        heads = slice(2 * g, 2 * g + 2)
        alone = replace(x, q=x.q[:, heads].contiguous(), entry_pages=x.entry_pages[:, :, g].contiguous()).attention()
        oracle.assert_close(out[:, heads], alone[0], 1e-6)
        oracle.assert_close(lse[:, heads], alone[1], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_layer_of_a_pool_of_all_layers(backend: str) -> None:
    """Pages that do not lie one after the other are read and written where they are."""
    x = on(pool(2, 32, 32, "float16", dtype="float16"), backend)
    inside = [torch.stack((pages, pages.clone()), 1)[:, 0] for pages in (x.entry_pages, x.index_pages)]
    turned = [pages.clone().transpose(0, 1).contiguous().transpose(0, 1) for pages in (x.entry_pages, x.index_pages)]
    tokens = [t.half().to(x.q.device) for t in new_tokens(4, "float16", layout=Layout(32, 32, 16, 2))]
    slots = torch.tensor([3, -1, 200, 201], device=x.q.device)
    expected = x.attention(backend=backend)
    for pools in (inside, turned):
        assert not pools[0].is_contiguous()
        other = replace(x, entry_pages=pools[0], index_pages=pools[1]).attention(backend=backend)
        assert all(torch.equal(a, e) for a, e in zip(other, expected, strict=True))
        ops.write_caches(*tokens, *pools, slots, backend=backend)
    ops.write_caches(*tokens, x.entry_pages, x.index_pages, slots, backend=backend)
    for pools in (inside, turned):
        for a, e in zip(pools, (x.entry_pages, x.index_pages), strict=True):
            assert torch.equal(raw(a), raw(e))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "index"), [("float32", "float32"), ("float16", "float16"), ("float16", "fp8")])
@pytest.mark.parametrize(("groups", "d_k", "d_v"), [(1, 64, 64), (2, 48, 48), (4, 24, 40)])
def test_written_tokens_are_read_back(groups: int, d_k: int, d_v: int, kind: str, index: str, backend: str) -> None:
    """Padding rows, whose slot is negative, may hold anything; every other byte stays as it was."""
    slots = (5, -1, 64 * 3 + 63, 64, 0, -7, 64 * 3)
    first, second, k_I = new_tokens(len(slots), kind, layout=Layout(d_k, d_v, 128 if index == "fp8" else 16, groups))
    for part in (first, second, k_I):
        part[1], part[5] = math.nan, math.inf
    pages = empty_pools(5, kind, Layout(d_k, d_v, 16, groups))[0]
    keys, expected_keys = (empty_pools(5, index)[1] for _ in range(2))
    device = "cuda" if backend == "triton" else "cpu"
    pages, keys = pages.to(device), keys.to(device)
    inputs = (part.to(device) for part in (first, second, k_I))
    ops.write_caches(*inputs, pages, keys, torch.tensor(slots, device=device), backend=backend)
    expected = empty_pools(5, kind, Layout(d_k, d_v, 16, groups))[0]
    for i, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // 64, slot % 64] = torch.cat((first[i], second[i]), -1).to(expected.dtype)
    assert torch.equal(raw(pages.cpu()), raw(expected))
    # as with entries of one group
    mla = empty_pools(5, "float32")[0]
    rest = new_tokens(len(slots), "float32", layout=PLAIN)[:2]
    ops.write_caches(*rest, k_I, mla, expected_keys, torch.tensor(slots), backend="reference")
    assert torch.equal(raw(keys.cpu()), raw(expected_keys))


@pytest.mark.slow
def test_compiled_is_eager() -> None:
    """One full graph with symbolic sizes, registered soundly."""
    torch.compiler.reset()

    def attend(q, pages, indices, table, lengths):
        return ops.sparse_attention_paged(q, pages, indices, table, lengths, SCALE, d_k=48, v_start=48, d_v=40)

    def write(first, second, k_I, pages, keys, slots):
        pages, keys = pages.clone(), keys.clone()
        ops.write_caches(first, second, k_I, pages, keys, slots)
        return raw(pages), raw(keys)

    compiled = [torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager") for f in (attend, write)]
    for n, lengths in ((2, (70, 3)), (3, (0, 65, 130))):
        x = pool(2, 48, 40, n=n, lengths=lengths)
        read = x.q, x.entry_pages, x.indices, x.page_table, x.lengths
        slots = torch.tensor([9, -1, 130])
        written = *new_tokens(3, "float32", layout=Layout(48, 40, 16, 2)), x.entry_pages, x.index_pages, slots
        for fast, slow, inputs in zip(compiled, (attend, write), (read, written), strict=True):
            for a, e in zip(fast(*inputs), slow(*inputs), strict=True):
                assert torch.equal(a, e)
    torch.library.opcheck(torch.ops.tokensieve.sparse_attention_paged.default, (*read, SCALE, 48, 48, 40, "auto"))
    torch.library.opcheck(torch.ops.tokensieve.write_caches.default, (*written, "auto"))


def test_nothing_to_attend_to() -> None:
    x = pool(2, 64, 64)
    unused = torch.full_like(x.indices, -1)
    for bare in (
        replace(x, lengths=torch.zeros_like(x.lengths), indices=unused, page_table=x.page_table[:, :0]),
        replace(x, lengths=torch.zeros_like(x.lengths), indices=unused, entry_pages=x.entry_pages[:0]),
        replace(x, indices=unused[:, :0]),
        replace(x, indices=unused),
    ):
        out, lse = bare.attention()
        assert out.shape == (len(LENGTHS), HEADS, 64) and not out.any() and (lse == -math.inf).all()


def test_bad_groups_are_refused() -> None:
    x = pool(2, 64, 48)
    for changes, named in (
        ({"q": x.q[:, :3]}, "3 heads cannot share 2"),
        ({"q": x.q[..., :48]}, r"\(S, H, 64\)"),
        ({"split": {"d_k": 64, "v_start": 65, "d_v": 48}}, r"\[65, 113\)"),
        ({"split": {"v_start": 64, "d_v": 48}}, r"\(S, H, 112\)"),
        ({"entry_pages": x.entry_pages[..., None]}, r"\(pages, 64, G, width\)"),
        ({"entry_pages": x.entry_pages.view(torch.uint8)}, "quantized entry_pages"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(x, **changes).attention()
    first, second, k_I = new_tokens(3, "float32", layout=Layout(64, 48, 16, 2))
    pools, slots = empty_pools(2, "float32", Layout(64, 48, 16, 2)), torch.tensor([1, 2, 3])
    for arguments, named in (
        ((first[:, :1], second, k_I), r"first \(3, 2, L\)"),
        ((first, second[:, 0], k_I), r"second \(3, 2, R\)"),
        ((first[..., 1:], second, k_I), "width 112"),
        ((first, second[:2], k_I), "second"),
        ((first, second, k_I[:, 1:]), "k_I"),
    ):
        with pytest.raises(ValueError, match=named):
            ops.write_caches(*arguments, *pools, slots)


def test_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: nothing is computed, only asked."""
    bf16 = torch.bfloat16

    def operands(d_k: int, v_start: int, d_v: int) -> tuple[torch.Tensor, dict]:
        q = torch.empty(1, 8, d_k, dtype=bf16, device="meta")
        pages = torch.empty(4, 64, 2, d_k + d_v, dtype=bf16, device="meta")
        indices = torch.empty(1, 6, dtype=torch.int32, device="meta")
        return q, {"q": q, "entry_pages": pages, "indices": indices, "d_k": d_k, "v_start": v_start, "d_v": d_v}

    def why_not(limits, *widths: int) -> str:
        return str(limits("sparse_attention_paged", *operands(*widths)))

    taken = str(triton.no_triton())
    for is_hopper, widest in ((True, 256), (False, 128)):
        monkeypatch.setattr(triton, "is_hopper", lambda device, answer=is_hopper: answer)
        assert why_not(triton.limits, widest, widest, widest) == why_not(triton.limits, 48, 48, 64) == taken
        assert f"wider than {widest}" in why_not(triton.limits, 64, 64, widest + 64)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    assert "one group, MLA's widths" in why_not(hopper.limits, 128, 128, 128)


class Largest(TorchDispatchMode):
    """The most bytes of any result that is not a view of `pages`."""

    def __init__(self, pages: torch.Tensor) -> None:
        super().__init__()
        self.pages, self.bytes = pages.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.pages:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


def test_the_reference_gathers_what_is_selected() -> None:
    """It never copies the pool: what it holds is as large as queries x places x entry."""
    x = pool(2, 64, 64, lengths=(200, 130))
    arguments = x.q, x.entry_pages, x.indices, x.page_table, x.lengths, SCALE, *x.split.values()
    with Largest(x.entry_pages) as held:
        reference.sparse_attention_paged(*arguments)
    assert 0 < held.bytes < x.entry_pages.nbytes // 8
