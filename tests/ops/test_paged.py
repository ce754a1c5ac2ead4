"""Decoding from paged caches, and writing them: against the float64 oracle, and bit by bit against the ops on packed
keys."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import oracle
from tests.support.pages import KINDS, LENGTHS, SCALE, P, Pool, empty_pools, make, new_tokens, raw
from tokensieve import ops
from tokensieve.ops import quant, reference
from tokensieve.ops.reference import PAGED_OPS

# What the pages hold is exact in float32: the errors are float32's own, over up to 576 products, as in
# test_attention.py and test_index.py.
TOLERANCE = 1e-5


def test_the_pools_are_what_they_are_said_to_be() -> None:
    for kind in KINDS:
        x = make(kind)
        assert x.page_table[5, 0] == x.page_table[6, 0] and x.page_table[5, 1] != x.page_table[6, 1]
        stored = x.index_pages.view(torch.float8_e4m3fn) if kind == "fp8" else x.index_pages
        assert stored[x.page_table[1, 0]].float().isnan().any(), "nothing follows the only token of sequence 1"
        assert stored.float().flatten(1).isnan().all(1).any(), "no page is unused"


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_oracle(kind: str, n: int) -> None:
    """One query at a time, each on the tokens of its own sequence that it sees."""
    x = make(kind, n)
    scores, (out, lse) = x.scores(), x.attention()
    assert scores.shape == (len(LENGTHS) * n, 64 * P) and scores.dtype == torch.float32
    assert out.shape == (len(LENGTHS) * n, 3, x.d_v) and lse.shape == (len(LENGTHS) * n, 3)
    for t, b, seen in x.queries():
        one, scale = slice(t, t + 1), x.scales[b]
        expected = oracle.index_scores(x.q_I[one], x.keys[b][:seen], x.w[one], None if scale is None else scale[:seen])
        oracle.assert_close(scores[one, :seen], expected, TOLERANCE, 1.0, f"scores of query {t}")
        entries = x.entries[b][:seen, None]
        expected = oracle.sparse_attention(x.q[one], entries, x.indices[one], SCALE, entries.shape[2], 0, x.d_v)
        oracle.assert_close(out[one], expected[0], TOLERANCE, 1.0, f"out of query {t}")
        oracle.assert_close(lse[one], expected[1], TOLERANCE, 1.0, f"lse of query {t}")
        if seen == 0:
            assert not out[t].any() and (lse[t] == -math.inf).all()


def packed(parts: tuple[Tensor, ...]) -> tuple[Tensor, list[int]]:
    """The sequences one after the other, as a prefill has them, and where each begins."""
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    return torch.cat([part for part in parts if len(part)]), [0, *ends[:-1]]


@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_the_bits_of_index_scores(kind: str, n: int, q_dtype: str) -> None:
    x = make(kind, n)
    x = replace(x, q_I=x.q_I.to(getattr(torch, q_dtype)))
    keys_TD, first = packed(x.keys)
    scale_T = packed(tuple(s for s in x.scales if s is not None))[0] if kind == "fp8" else None
    starts = torch.tensor([first[b] for _, b, _ in x.queries()], dtype=torch.int32)
    ends = torch.tensor([first[b] + seen for _, b, seen in x.queries()], dtype=torch.int32)
    expected, actual = ops.index_scores(x.q_I, keys_TD, x.w, starts, ends, scale_T), x.scores()
    for t, b, seen in x.queries():
        assert torch.equal(actual[t, :seen], expected[t, first[b] : first[b] + seen]), f"query {t}"


@pytest.mark.parametrize("behind", [3, 2, 0])
def test_pages_one_after_the_other_have_the_bits_of_scattered_ones(behind: int) -> None:
    """They are read where they lie, if the pool has room behind them; that room holds NaN."""
    g = torch.Generator().manual_seed(1)
    q, w = torch.randn(1, 8, 32, generator=g), torch.randn(1, 8, generator=g)
    pages = torch.full((30, 64, 32), math.nan)
    at = 30 - behind - 20
    pages[at : at + 20] = torch.randn(20, 64, 32, generator=g)
    lengths, in_order = torch.tensor([20 * 64 - 7], dtype=torch.int32), torch.arange(at, at + 20, dtype=torch.int32)
    back = torch.arange(29, -1, -1)
    scores = [ops.index_scores_paged(q, pages, w, in_order[None], lengths)]
    scores += [ops.index_scores_paged(q, pages[back], w, 29 - in_order[None], lengths)]
    assert not scores[0][0, : lengths[0]].isnan().any() and torch.equal(
        scores[0][0, : lengths[0]], scores[1][0, : lengths[0]]
    )


@pytest.mark.parametrize("q_dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_sparse_attention(kind: str, q_dtype: str) -> None:
    x = make(kind, 2)
    x = replace(x, q=x.q.to(getattr(torch, q_dtype)))
    entries_TE, first = packed(x.entries)
    offset = torch.tensor([first[b] for _, b, _ in x.queries()], dtype=torch.int32)[:, None]
    indices = torch.where(x.indices < 0, -1, x.indices + offset)
    expected = ops.sparse_attention(x.q, entries_TE[:, None], indices, SCALE, entries_TE.shape[1], 0, x.d_v)
    for a, e in zip(x.attention(), expected, strict=True):
        assert a.dtype == e.dtype
        oracle.assert_close(a, e, 1e-12 if q_dtype == "float64" else 1e-6 if a.dtype == torch.float32 else 1e-2)


def test_a_draft_sees_what_its_tokens_alone_would_see() -> None:
    """n queries at once are n decode steps of one query, to the last bit of a score."""
    x = make("fp8", 3, lengths=(70, 3, 200))
    together, (out, lse) = x.scores(), x.attention()
    for j in range(3):
        step = replace(
            x, q=x.q[j::3], q_I=x.q_I[j::3], w=x.w[j::3], indices=x.indices[j::3], lengths=x.lengths - 2 + j, n=1
        )
        for t, _, seen in step.queries():
            assert torch.equal(step.scores()[t, :seen], together[3 * t + j, :seen])
        for a, e in zip(step.attention(), (out[j::3], lse[j::3]), strict=True):
            oracle.assert_close(a, e, 1e-6)


@pytest.mark.parametrize("kind", ["fp8", "float32"])
def test_one_layer_of_a_pool_of_all_layers(kind: str) -> None:
    """Pages that do not lie one after the other are read and written where they are."""
    x = make(kind)
    inside = [torch.stack((pages, pages.clone()), 1)[:, 0] for pages in (x.entry_pages, x.index_pages)]
    assert not inside[0].is_contiguous() and not inside[1].is_contiguous()
    strided = replace(x, entry_pages=inside[0], index_pages=inside[1])
    for t, _, seen in x.queries():
        assert torch.equal(strided.scores()[t, :seen], x.scores()[t, :seen])
    assert torch.equal(strided.attention()[0], x.attention()[0])
    tokens = new_tokens(5, kind)
    slots = torch.tensor([3, 64, 200, 201, 319])
    for pages in ((x.entry_pages, x.index_pages), inside):
        ops.write_caches(*tokens, *pages, slots)
    for a, e in zip(inside, (x.entry_pages, x.index_pages), strict=True):
        assert torch.equal(raw(a), raw(e))


SLOTS = (5, -1, 64 * 3 + 63, 64, 0, -7, 64 * 3)
PAGES = 5


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_written_tokens_are_read_back(kind: str, slot_dtype: torch.dtype) -> None:
    latent, k_rope, k_I = new_tokens(len(SLOTS), kind)
    for x in (latent, k_rope, k_I):  # a skipped token may hold anything
        x[1], x[5] = math.nan, math.inf
    entry_pages, index_pages = empty_pools(PAGES, kind)
    before = raw(entry_pages).clone(), raw(index_pages).clone()
    assert ops.write_caches(
        latent, k_rope, k_I, entry_pages, index_pages, torch.tensor(SLOTS, dtype=slot_dtype)
    ) is None  # fmt: skip
    written = torch.zeros(PAGES, 64, dtype=torch.bool)
    for i, (page, place) in [(i, divmod(slot, 64)) for i, slot in enumerate(SLOTS) if slot >= 0]:
        written[page, place] = True
        if kind != "fp8":
            dtype = getattr(torch, kind)
            assert torch.equal(entry_pages[page, place], torch.cat((latent[i], k_rope[i])).to(dtype))
            assert torch.equal(index_pages[page, place], k_I[i].to(dtype))
            continue
        back, rope_back = quant.unpack_latent_page(entry_pages[page : page + 1], torch.float32)
        values, scales = quant.unpack_index_page(index_pages[page : page + 1])
        assert torch.equal(rope_back[0, place], k_rope[i].bfloat16().float())
        assert torch.frexp(scales[0, place]).mantissa == 0.5, "the scale is no power of two"
        stored = values[0, place].double() * scales[0, place]
        for a, e in ((back[0, place].double(), latent[i]), (quant.hadamard(stored), k_I[i])):
            assert (a - e).norm() < 0.04 * e.norm()
        # As whole pages are packed: to the byte.
        page_like = [x[i].expand(1, 64, -1).contiguous() for x in (latent, k_rope, quant.hadamard(k_I))]
        assert torch.equal(entry_pages[page, place], quant.pack_latent_page(*page_like[:2])[0, place])
        expected = quant.unpack_index_page(quant.pack_index_page(page_like[2], "ue8m0"))
        assert torch.equal(raw(values[0, place]), raw(expected[0][0, place]))
        assert scales[0, place] == expected[1][0, place]
    by_token = raw(entry_pages).view(PAGES, 64, -1)
    assert torch.equal(by_token[~written], before[0].view(PAGES, 64, -1)[~written])
    if kind == "fp8":
        parts, old = quant.index_page_tokens(index_pages), quant.index_page_tokens(before[1])
    else:
        parts, old = (raw(index_pages).view(PAGES, 64, -1),), (before[1].view(PAGES, 64, -1),)
    for a, e in zip(parts, old, strict=True):
        assert torch.equal(a[~written], e[~written]) and not torch.equal(a[written], e[written])


def test_pages_of_two_kinds_and_nothing_to_write() -> None:
    """FP8 for the one cache, plain numbers for the other; a step in which every token is skipped changes nothing."""
    latent, k_rope, _ = new_tokens(2, "float32")
    k_I = new_tokens(2, "fp8")[2]
    entry_pages, index_pages = empty_pools(2, "float32")[0], empty_pools(2, "fp8")[1]
    old = entry_pages.clone(), index_pages.clone()
    ops.write_caches(latent, k_rope, k_I, entry_pages, index_pages, torch.tensor([-1, -1]))
    empty = latent[:0], k_rope[:0], k_I[:0]
    ops.write_caches(*empty, entry_pages, index_pages, torch.tensor([], dtype=torch.int32))
    assert torch.equal(raw(entry_pages), raw(old[0])) and torch.equal(index_pages, old[1])
    ops.write_caches(latent, k_rope, k_I, entry_pages, index_pages, torch.tensor([-1, 70]))
    assert torch.equal(entry_pages[1, 6], torch.cat((latent[1], k_rope[1])))
    assert quant.unpack_index_page(index_pages)[1][1, 6] > 0


@pytest.mark.parametrize("bad", range(3))
def test_what_cannot_be_quantized_leaves_both_caches_as_they_were(bad: int) -> None:
    tokens = new_tokens(3, "fp8")
    tokens[bad][1, 7] = math.nan
    pools = empty_pools(2, "fp8")
    if bad == 1:  # rope dims are not quantized
        ops.write_caches(*tokens, *pools, torch.tensor([1, 2, 3]))
        return
    with pytest.raises(ValueError, match="NaN"):
        ops.write_caches(*tokens, *pools, torch.tensor([1, 2, 3]))
    for pool, untouched in zip(pools, empty_pools(2, "fp8"), strict=True):
        assert torch.equal(pool, untouched)


def test_nothing_to_attend_to() -> None:
    """No sequence, no page in the table, no page at all, no place for an index."""
    x = make()
    none = replace(x, **{name: getattr(x, name)[:0] for name in "q q_I w indices page_table lengths".split()})
    assert none.scores().shape == (0, 64 * P) and none.attention()[0].shape == (0, 3, 24)
    lengths = torch.zeros_like(x.lengths)
    unused = torch.full_like(x.indices, -1)
    for bare in (
        replace(x, lengths=lengths, indices=unused, page_table=x.page_table[:, :0]),
        replace(x, lengths=lengths, indices=unused, entry_pages=x.entry_pages[:0], index_pages=x.index_pages[:0]),
        replace(x, indices=unused[:, :0]),
    ):
        out, lse = bare.attention()
        assert not out.any() and (lse == -math.inf).all()
        assert bare.scores().shape == (len(LENGTHS), 64 * bare.page_table.shape[1])


def test_a_position_past_what_a_query_sees_is_not_read() -> None:
    """On a GPU nobody looks at the indices beforehand."""
    x = make("fp8")
    beyond = torch.where(x.indices < 0, x.lengths[:, None] + torch.arange(6) * 64, x.indices).int()
    actual = reference.sparse_attention_paged(
        x.q, x.entry_pages, beyond, x.page_table, x.lengths, SCALE, *x.split.values()
    )
    for a, e in zip(actual, x.attention(), strict=True):
        assert torch.equal(a, e)


def test_no_gradient() -> None:
    x = make()
    leaves = [t.clone().requires_grad_() for t in (x.q, x.q_I, x.w, x.entry_pages, x.index_pages)]
    x = replace(x, **dict(zip("q q_I w entry_pages index_pages".split(), leaves, strict=True)))
    assert not x.scores().requires_grad and not any(y.requires_grad for y in x.attention())
    ops.write_caches(*(t.requires_grad_() for t in new_tokens(1, "float32")), *leaves[3:], torch.tensor([0]))


class Largest(TorchDispatchMode):
    """The most numbers that any one result had."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_nothing_of_size_heads_times_queries_times_keys() -> None:
    S, H, D, pages = 64, 64, 8, 16
    q, w, lengths = torch.randn(S, H, D), torch.randn(S, H), torch.full((S,), pages * 64, dtype=torch.int32)
    pool, table = torch.randn(pages, 64, D), torch.arange(pages, dtype=torch.int32).expand(S, pages)
    every = torch.arange(pages * 64, dtype=torch.int32).expand(S, -1)
    for run in (
        lambda: reference.index_scores_paged(q, pool, w, table, lengths),
        lambda: reference.sparse_attention_paged(q, pool, every, table, lengths, SCALE, D, 0, D),
    ):
        with Largest() as seen:
            run()
        assert 0 < seen.numbers <= H * S * pages * 64 // 4


def calls(x: Pool, kind: str) -> dict[str, tuple]:
    """Each op as a function of tensors, and as it is registered, with the arguments that this one gets."""
    tokens, pools = new_tokens(3, kind), (x.entry_pages, x.index_pages)
    slots = torch.tensor([9, -1, 130])

    def write(latent, k_rope, k_I, entry_pages, index_pages, slots) -> tuple[Tensor, Tensor]:
        entry_pages, index_pages = entry_pages.clone(), index_pages.clone()
        ops.write_caches(latent, k_rope, k_I, entry_pages, index_pages, slots)
        return raw(entry_pages), raw(index_pages)

    def queries(q, w, cos, sin) -> tuple[Tensor, Tensor]:
        values, weights = ops.quantize_queries(q, w, cos, sin)
        return values.float(), weights

    S = x.q.shape[0]
    asked = torch.randn(S, 3, 128).to(x.q.dtype), torch.randn(S, 3), torch.randn(S, 1, 64), torch.randn(S, 1, 64)
    attention = x.q, x.entry_pages, x.indices, x.page_table, x.lengths
    return {
        "quantize_queries": (queries, asked, ("auto",)),
        "index_scores_paged": (ops.index_scores_paged, x.index_arguments(), ("auto",)),
        "sparse_attention_paged": (
            lambda *t: ops.sparse_attention_paged(*t, SCALE, **x.split),
            attention,
            (SCALE, *x.split.values(), "auto"),
        ),
        "write_caches": (write, (*tokens, *pools, slots), ("auto",)),
    }


@pytest.mark.parametrize(("kind", "dtype"), [("fp8", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", PAGED_OPS)
def test_opcheck(name: str, kind: str, dtype: str) -> None:
    """Schema (what is written to), fake implementation and tracing with symbolic sizes, against the real results."""
    _, tensors, rest = calls(make(kind, 2, lengths=(70, 3), dtype=dtype), kind)[name]
    torch.library.opcheck(getattr(torch.ops.tokensieve, name).default, (*tensors, *rest))


@pytest.mark.parametrize("name", PAGED_OPS)
def test_compiled_is_eager(name: str) -> None:
    """One full graph with symbolic sizes, run at two sets of sizes."""
    torch.compiler.reset()
    sets = [calls(make("fp8", n, lengths), "fp8")[name] for n, lengths in ((2, (70, 3)), (3, (0, 65, 130)))]
    compiled = torch.compile(sets[0][0], fullgraph=True, dynamic=True, backend="aot_eager")
    for function, tensors, _ in sets:
        actual, expected = compiled(*tensors), function(*tensors)
        for a, e in zip(*((y,) if isinstance(y, Tensor) else y for y in (actual, expected)), strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)


def test_autocast_changes_nothing() -> None:
    x = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, attention = x.scores(), x.attention()
    assert torch.equal(scores, x.scores()) and torch.equal(attention[0], x.attention()[0])


def test_a_backend_that_cannot_run_says_so() -> None:
    x = make()
    for name, reason in (("triton", "does not run on cpu"), ("fused", "has no {}")):
        with pytest.raises(ValueError, match=f"{name}.*it {reason.format('index_scores_paged')}"):
            x.scores(backend=name)
        with pytest.raises(ValueError, match=f"{name}.*it {reason.format('sparse_attention_paged')}"):
            x.attention(backend=name)
    assert torch.equal(x.scores(backend="reference"), x.scores())


def with_value(x: Tensor, place: tuple[int, ...], value: int) -> Tensor:
    changed = x.clone()
    changed[place] = value
    return changed


def test_bad_tables_are_refused() -> None:
    x, fp8 = make(n=2), make("fp8")
    for changes, named in (
        ({"page_table": x.page_table[:3]}, "page_table"),
        ({"page_table": x.page_table[0]}, "page_table"),
        ({"page_table": x.page_table.long()}, "int64"),
        ({"lengths": x.lengths.long()}, "int64"),
        ({"lengths": x.lengths[:3], "page_table": x.page_table[:3]}, "14 queries .* 3 sequences"),
        ({"lengths": with_value(x.lengths, (0,), -1)}, "-1"),
        ({"lengths": with_value(x.lengths, (0,), 64 * P + 1)}, r"\[0, 256\].*257"),
        ({"page_table": with_value(x.page_table, (1, 0), -1)}, "-1"),
        ({"page_table": with_value(x.page_table, (4, 1), 31)}, r"\[0, 31\).*31"),
    ):
        for run in (Pool.scores, Pool.attention):
            with pytest.raises(ValueError, match=named):
                run(replace(x, **changes))
    for y, changes, named in (
        (x, {"q_I": x.q_I[..., :8]}, r"\(S, H, 16\)"),
        (x, {"q_I": x.q_I[0]}, r"\(S, H, 16\)"),
        (x, {"q_I": x.q_I.int()}, "int32"),
        (x, {"w": x.w[:, :1]}, "w"),
        (x, {"w": x.w.int()}, "w"),
        (x, {"index_pages": x.index_pages.double()}, "float64"),
        (x, {"index_pages": x.index_pages[:, :63]}, "63"),
        (x, {"index_pages": x.index_pages[0]}, "index_pages"),
        (fp8, {"index_pages": fp8.index_pages[:, :8447]}, "8447"),
        (fp8, {"q_I": fp8.q_I[..., :64]}, r"\(S, H, 128\)"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(y, **changes).scores()


def test_bad_attention_is_refused() -> None:
    x, fp8 = make(n=2), make("fp8")
    t, seen = next((t, seen) for t, _, seen in x.queries() if seen == 64)
    for y, changes, named in (
        (x, {"q": x.q[..., :8]}, r"\(S, H, 32\)"),
        (x, {"q": x.q.to(torch.float8_e4m3fn)}, "float8"),
        (x, {"split": {"d_v": 33}}, "33"),
        (x, {"split": {"d_v": 0}}, "d_v"),
        (x, {"split": {"v_start": 9, "d_v": 24}}, r"\[9, 33\)"),
        (x, {"split": {"d_k": 24}}, r"\(S, H, 24\)"),
        (x, {"indices": x.indices[:3]}, "indices"),
        (x, {"indices": x.indices[0]}, "indices"),
        (x, {"indices": x.indices.float()}, "float32"),
        (x, {"indices": with_value(x.indices, (t, 0), -2)}, "-2"),
        (x, {"indices": with_value(x.indices, (t, 2), seen)}, f"query {t} sees 64 tokens.* 64"),
        (x, {"entry_pages": x.entry_pages.int()}, "int32"),
        (x, {"entry_pages": x.entry_pages[:, :63]}, "63"),
        (fp8, {"entry_pages": fp8.entry_pages[..., :655]}, "655"),
        (fp8, {"split": {"d_v": 256}}, "d_v must be 512"),
        (fp8, {"split": {"v_start": 64}}, "v_start must be 0"),
    ):
        with pytest.raises(ValueError, match=named):
            replace(y, **changes).attention()


def test_bad_writes_are_refused() -> None:
    slots = torch.tensor([1, 2, 3])
    for kind in ("float32", "fp8"):
        latent, k_rope, k_I = new_tokens(3, kind)
        pages, index_pages = empty_pools(2, kind)
        for arguments, named in (
            ((latent[:, :-1], k_rope, k_I, pages, index_pages, slots), "width"),
            ((latent[0], k_rope, k_I, pages, index_pages, slots), "first"),
            ((latent, k_rope[:2], k_I, pages, index_pages, slots), "second"),
            ((latent, k_rope, k_I[:, :-1], pages, index_pages, slots), "k_I"),
            ((latent, k_rope, k_I.int(), pages, index_pages, slots), "int32"),
            ((latent, k_rope, k_I, pages, index_pages[:1], slots), "2 entry_pages and 1 index_pages"),
            ((latent, k_rope, k_I, pages, index_pages, slots[:2]), "slots"),
            ((latent, k_rope, k_I, pages, index_pages, slots.float()), "float32"),
            ((latent, k_rope, k_I, pages, index_pages, slots + 126), "128.*129"),
            ((latent, k_rope, k_I, pages.int(), index_pages, slots), "entry_pages"),
        ):
            with pytest.raises(ValueError, match=named):
                ops.write_caches(*arguments)
    joined = torch.cat((latent, k_rope), 1)
    with pytest.raises(ValueError, match="latent of width 512, got 500"):
        ops.write_caches(joined[:, :500], joined[:, 500:], k_I, pages, index_pages, slots)
