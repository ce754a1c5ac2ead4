"""The Triton kernels against the float64 reference: in Triton's interpreter where there is no GPU, else on it.

Outputs are poisoned first: under deterministic algorithms PyTorch fills what `empty` returns with NaN, integers with
their largest value.
"""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import oracle, training
from tests.support.cases import CASES, Case, Document, Inputs, causal, make
from tests.support.op_results import SPARSE, leaves, results
from tokensieve import ops
from tokensieve.ops import checks, dispatch

pytest.importorskip("triton", reason="Triton has no build for this machine")

# float32 in the interpreter: as the reference's own float32 (test_attention.py). On a GPU the products take bf16 or
# half inputs and add up in float32; probabilities and their derivatives are rounded (2**-9, 2**-11) before they meet
# the next product.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 1.5e-2}
LSE_TOLERANCE = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-4}
# In any order, so that they differ in the last bits from run to run; in the order of queries in the deterministic mode.
ADDED_ATOMICALLY = ("sparse_attention: d kv", "sparse_attention_kl: d kv", "sparse_attention_kl: d k_I")
QUICK = (
    "ragged pack, keys nobody sees",
    "one-token documents",
    "T < k",
    "no key tokens",
    "decode of a batch",
    "prefill chunks of a batch",
    "empty rows",
    "nothing selected",
    "zero scores",
    "index shape of the 671B model",
    "MLA widths",
)
SLOW_ON_CPU = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
# Of the quick cases, too long for the interpreter in `make test`.
LONG_GRADIENTS = ("zero scores", "prefill chunks of a batch", "empty rows", "one-token documents")


def places(quick: tuple[str, ...] = QUICK) -> list:
    """(case, device, dtype). A GPU runs all; the interpreter float32, in `make test` the `quick` cases alone."""
    parameters = []
    for case in CASES:
        marks = [] if case.name in quick else [pytest.mark.slow]
        parameters.append(pytest.param(case, "cpu", "float32", id=f"{case}-interpreter", marks=marks))
        for dtype in ("bfloat16", "float16"):
            if dtype == "bfloat16" or case.magnitude <= 16:  # half precision ends at 65504
                parameters.append(pytest.param(case, "cuda", dtype, id=f"{case}-{dtype}", marks=pytest.mark.gpu))
    return parameters


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def backend(device: str) -> str:
    return "triton" if device == "cuda" else "interpreter"


@pytest.mark.parametrize(("case", "device", "dtype"), places(tuple(sorted({*QUICK} - {*LONG_GRADIENTS}))))
def test_values_and_gradients(case: Case, device: str, dtype: str) -> None:
    x = make(dataclasses.replace(case, dtype=dtype), device)
    if device == "cuda" and x.w_SI.dtype != torch.float32:
        x = dataclasses.replace(x, w_SI=x.w_SI.float())  # as the model's indexer gives it
    expected, actual = results(x.to(torch.float64), "reference"), results(x, backend(device))
    rounding = oracle.lse_rounding(expected["sparse_attention: lse"], torch.float32)
    for name, e in expected.items():
        a = actual[name]
        assert a.isfinite().eq(e.isfinite()).all(), name
        tolerance = LSE_TOLERANCE[dtype] if name.endswith(": lse") else TOLERANCE[dtype]
        if ": d " in name or name.startswith("indexer_kl_dense") or name.endswith(": kl"):
            tolerance = max(tolerance, 4 * rounding)  # from probabilities that an lse in float32 gives back
        if tolerance < 0.5:  # else they have no digit left
            oracle.assert_close(a.double(), e, tolerance, 1.0, name)


@pytest.mark.parametrize(("case", "device", "dtype"), places(("T < k",)))
def test_sums_in_any_order(case: Case, device: str, dtype: str) -> None:
    """The default adds atomically what the deterministic mode, which poisoning needs, adds in order.

    All else has the same bits.
    """
    x = make(dataclasses.replace(case, dtype=dtype), device)
    ordered = results(x, backend(device), SPARSE)
    torch.use_deterministic_algorithms(False)
    for name, a in results(x, backend(device), SPARSE).items():
        if name in ADDED_ATOMICALLY:
            oracle.assert_close(a.double(), ordered[name].double(), TOLERANCE[dtype], 1.0, name)
        else:
            assert torch.equal(a, ordered[name]), name


@pytest.mark.parametrize(("case", "device", "dtype"), places())
def test_the_selection_is_the_oracles(case: Case, device: str, dtype: str) -> None:
    x = make(case, device)
    scores = oracle.index_scores(x.q_SID, x.k_TD, x.w_SI).float()
    actual = ops.select_topk(scores, x.k, x.starts_S, x.ends_S, backend=backend(device))
    assert torch.equal(actual.cpu(), oracle.select_topk(scores, x.k, x.starts_S, x.ends_S).cpu())
    if case.content != "normal" or device == "cpu":  # scores are the same to the last bit, or nearly so
        fused = ops.index_topk(
            *(t.to(getattr(torch, dtype)) for t in (x.q_SID, x.k_TD)), x.w_SI, x.k, x.starts_S, x.ends_S,
            backend=backend(device),
        )  # fmt: skip
        assert torch.equal(fused.cpu(), oracle.select_topk(scores, x.k, x.starts_S, x.ends_S).cpu())


def hard_rows(N: int) -> dict[str, Tensor]:
    """Rows that a guess from a sample gets wrong, and rows of ties."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(N, generator=g)
    return {
        "noise": noise,
        "half zeros": noise.relu(),
        "zeros": torch.zeros(N),
        "zeros of both signs": torch.zeros(N) * noise,
        "all the same": torch.full((N,), -5.0),
        "rising": torch.arange(N).float(),
        "falling": -torch.arange(N).float(),
        "sorted noise": noise.sort().values,
        "three values": torch.randint(0, 3, (N,), generator=g).float(),
        "huge": noise * 1e30,
        "subnormal": noise * 1e-40,
        "the best in one place": torch.cat((torch.full((N - 90,), -1e9), torch.ones(90))),
        "the best where no sample is": torch.where(torch.arange(N) % 32 == 17, 1e9, noise),
        "with a period": (torch.arange(N) % 97).float(),
        "half infinite": torch.cat((noise[: N // 2], torch.full((N - N // 2,), math.inf))),
        "all -inf": torch.full((N,), -math.inf),
    }


def selected_as_by_the_reference(rows: dict[str, Tensor], k: int, device: str) -> None:
    scores = torch.stack(list(rows.values()))
    S, N = scores.shape
    starts, ends = torch.zeros(S, dtype=torch.int32), torch.full((S,), N, dtype=torch.int32)
    starts[3], ends[5] = 17, N - 89
    expected = ops.select_topk(scores, k, starts, ends, backend="reference")
    given = (t.to(device) for t in (scores, starts, ends))
    s, first, last = given
    actual = ops.select_topk(s, k, first, last, backend=backend(device)).cpu()
    for name, a, e in zip(rows, actual, expected, strict=True):
        assert torch.equal(a, e), name


@pytest.mark.parametrize("k", [1, pytest.param(8, marks=pytest.mark.slow), 200])
def test_rows_longer_than_the_candidates(k: int) -> None:
    selected_as_by_the_reference(hard_rows(700), k, "cpu")


@pytest.mark.slow
def test_strips_of_queries_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that serve several strips in turn, and the number of a refused query in a later one."""
    from tokensieve.ops.triton import loss, topk

    monkeypatch.setattr(topk, "STRIP", 64 * 5)
    selected_as_by_the_reference(hard_rows(700), 8, "cpu")
    scores = torch.randn(16, 300, generator=torch.Generator().manual_seed(3))
    scores[13, 77] = math.nan
    with pytest.raises(ValueError, match="query 13 contain NaN"):
        ops.select_topk(scores, 8, torch.zeros(16).int(), torch.full((16,), 300).int(), backend="interpreter")
    x = make(CASES[0], "cpu").to(torch.float32)
    monkeypatch.setattr(topk, "SCORES", 2 * len(x.k_TD))
    monkeypatch.setattr(loss, "STRIP", 2 * len(x.k_TD))
    index, ranges = (x.q_SID, x.k_TD, x.w_SI), (x.starts_S, x.ends_S)
    a, e = (ops.index_topk(*index, x.k, *ranges, backend=how) for how in ("interpreter", "reference"))
    assert torch.equal(a, e)
    lse = ops.dense_attention(x.q_SHD, x.k_TGD, x.v_TGV, *ranges, x.scale, backend="reference")[1]
    a, e = (
        ops.indexer_kl_dense(x.q_SHD, x.k_TGD, lse, x.scale, *index, *ranges, backend=how)
        for how in ("interpreter", "reference")
    )
    oracle.assert_close(a, e.double(), TOLERANCE["float32"], 1.0, "kl in strips")


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 100, 2048, 5000, 9000])
def test_rows_longer_than_the_candidates_on_a_gpu(k: int) -> None:
    selected_as_by_the_reference(hard_rows(40_000), k, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", [50, 700])
def test_nan_is_refused(length: int, device: str) -> None:
    scores = torch.randn(6, length, generator=torch.Generator().manual_seed(2)).to(device)
    starts, ends = torch.zeros(6, device=device).int(), torch.full((6,), length, device=device).int()
    ends[2] = 40
    scores[2, 40:] = math.nan  # nobody sees these
    ops.select_topk(scores, 8, starts, ends, backend=backend(device))
    scores[4, 30], scores[5, 3] = math.nan, math.nan
    with pytest.raises(ValueError, match="query 4 contain NaN"):
        ops.select_topk(scores, 8, starts, ends, backend=backend(device))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("where", ["q_SID", "k_TD", "w_SI"])
def test_nan_among_the_inputs_is_not_hidden(where: str, device: str) -> None:
    """Neither by the relu nor by the selection: a broken model must not go on."""
    x = make(dataclasses.replace(CASES[0], documents=causal(20), keys=20), device)
    x = x.to(torch.bfloat16) if device == "cuda" else x
    getattr(x, where).view(-1)[5 if where == "k_TD" else -1] = math.nan
    with pytest.raises(ValueError, match="contain NaN"):
        ops.index_topk(x.q_SID, x.k_TD, x.w_SI, 4, x.starts_S, x.ends_S, backend=backend(device))


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_nothing_outside_the_keys_is_touched(device: str, monkeypatch) -> None:
    """On a GPU an index past the keys counts as -1, and a range is cut to them. Around them lies NaN."""
    monkeypatch.setattr(checks, "indices", lambda *given: None)
    monkeypatch.setattr(checks, "ranges", lambda *given: None)
    lowest, highest = -(2**31), 2**31 - 1
    x = make(
        Case("strays", (Document(0, 40, 4), Document(40, 50, 3), Document(0, 0, 3)), keys=90, k=8, heads=2), device
    )
    x = x.to(torch.bfloat16) if device == "cuda" else x
    S, T, how = len(x.q_SHD), len(x.k_TD), backend(device)

    def among_nan(keys: Tensor) -> Tensor:
        surrounded = keys.new_full((3 * T, *keys.shape[1:]), math.nan)
        surrounded[T : 2 * T] = keys
        return surrounded[T : 2 * T]

    starts, ends = torch.where(x.starts_S == 0, -70, x.starts_S), torch.where(x.ends_S == T, T + 70, x.ends_S)
    starts[-3:], ends[-3:] = (
        torch.tensor(edges).to(starts) for edges in ((lowest, T + 1, highest), (highest, T + 9, lowest))
    )
    clean = torch.full((S, 5), -1, device=device).int()
    strays = torch.tensor([T, T + 1, highest, -2, lowest], device=device).int().expand(S, -1)
    given = dataclasses.replace(
        x, kv_TGE=among_nan(x.kv_TGE), k_TD=among_nan(x.k_TD), starts_S=starts, ends_S=ends,
        indices_SK=torch.cat((strays, x.indices_SK), 1),
    )  # fmt: skip
    meant = dataclasses.replace(
        x, starts_S=starts.clamp(0, T), ends_S=ends.clamp(0, T), indices_SK=torch.cat((clean, x.indices_SK), 1)
    )
    scores = torch.randn(S, T, generator=torch.Generator().manual_seed(6)).to(device)

    def everything(y: Inputs) -> dict[str, Tensor]:
        outputs = results(y, how)
        for k in (4, 80):  # rows longer and shorter than their candidates
            outputs[f"top-{k}"] = ops.select_topk(scores, k, y.starts_S, y.ends_S, backend=how)
        outputs["fused"] = ops.index_topk(y.q_SID, y.k_TD, y.w_SI, 4, y.starts_S, y.ends_S, backend=how)
        return outputs

    expected, actual = everything(meant), everything(given)
    for name, e in expected.items():
        assert torch.equal(actual[name], e), name


@pytest.mark.parametrize("device", SLOW_ON_CPU)
@pytest.mark.parametrize(("second", "broken"), [(110, 0), (128, 1)])
def test_nan_stays_where_it_is_seen(second: int, broken: int, device: str) -> None:
    """One document, and the keys that nobody sees, hold NaN: the other's results are those without any.

    But for what docs/kernels.md says: gradients of index scores by a block of queries that both have, here of 8, or by
    a tile of 128 keys that both see.
    """
    x = make(Case("broken document", (Document(0, 100, 14), Document(second, 40, 12)), keys=170, k=8, heads=2), device)
    x = x.to(torch.bfloat16) if device == "cuda" else x
    of_query = torch.arange(26, device=device) >= 14
    seen = x.visible_ST()
    bad_queries, bad_keys = of_query == broken, ~seen[of_query != broken].any(0)
    wrong = {"kv_TGE": bad_keys, "k_TD": bad_keys, "q_SHD": bad_queries, "q_SID": bad_queries, "w_SI": bad_queries}
    spoiled = {name: getattr(x, name).clone() for name in wrong}
    for name, rows in wrong.items():
        spoiled[name][rows] = math.nan
    block, tile = torch.arange(26, device=device) // 8, torch.arange(170, device=device) // 128
    safe_queries = ~torch.isin(block, block[bad_queries])
    safe_keys = ~bad_keys & ~torch.isin(tile, tile[seen[bad_queries].any(0)])
    assert safe_queries.any() and safe_keys.any()
    expected, actual = results(x, backend(device)), results(dataclasses.replace(x, **spoiled), backend(device))
    for name, e in expected.items():
        shared = name.startswith("index") and ": d " in name
        if name.endswith(("d kv", "d k_I", "d k", "d v")):
            unspoiled = safe_keys if shared else ~bad_keys
        else:
            unspoiled = safe_queries if shared else ~bad_queries
        if name.startswith("masked_attention"):  # walks a second time, whose sums nobody promises to the last bit
            tolerance = TOLERANCE["bfloat16" if device == "cuda" else "float32"]
            oracle.assert_close(actual[name][unspoiled].double(), e[unspoiled].double(), tolerance, 1.0, name)
        else:
            assert torch.equal(actual[name][unspoiled], e[unspoiled]), name
        assert not actual[name][bad_queries if len(e) == 26 else bad_keys & seen.any(0)].isfinite().all(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_target_that_does_not_sum_to_one(device: str) -> None:
    """With an lse from elsewhere, as of attention over more keys: value and gradients are still the reference's."""
    x = make(Case("part of the mass", causal(9, 12), keys=21, k=4, heads=2), device)
    x = x.to(torch.bfloat16) if device == "cuda" else x
    lse = torch.rand(21, 2, generator=torch.Generator().manual_seed(7)).to(device) + 2
    both = []
    for how, y in (("reference", x.to(torch.float64)), (backend(device), x)):
        inputs = leaves(y.q_SID, y.k_TD, y.w_SI)
        kl = ops.indexer_kl_dense(y.q_SHD, y.k_TGD, lse, y.scale, *inputs, y.starts_S, y.ends_S, backend=how)
        both.append((kl.detach(), *torch.autograd.grad(kl.sum(), inputs)))
    for e, a in zip(*both, strict=True):
        oracle.assert_close(a.double(), e, TOLERANCE["bfloat16" if device == "cuda" else "float32"], 1.0)


@pytest.mark.parametrize("device", SLOW_ON_CPU)
def test_a_second_run_has_the_same_bits(device: str) -> None:
    """Every op and every gradient, in the deterministic mode; the outputs' memory is poisoned before each run."""
    if device == "cuda":  # enough programs to meet in another order
        documents, sizes = (
            causal(700, 1, 1500, 66),
            {"keys": 2267, "k": 300, "heads": 64, "entry": 576, "d_k": 576, "d_v": 512},
        )
        sizes |= {"index_heads": 64, "index_dim": 128}
    else:
        documents, sizes = causal(4, 3), {"keys": 7, "k": 4, "heads": 2}
    x = make(Case("twice", documents, **sizes), device)
    x = x.to(torch.bfloat16) if device == "cuda" else x
    how, weight = backend(device), torch.rand(len(x.q_SHD), generator=torch.Generator().manual_seed(8)).to(device)

    def everything() -> dict[str, Tensor]:
        actual = results(x, how)
        inputs, lse = (
            leaves(x.q_SID, x.k_TD, x.w_SI),
            weight[:, None] + torch.ones_like(x.q_SHD[..., 0], dtype=torch.float32),
        )
        total = ops.indexer_kl_dense_sum(
            x.q_SHD, x.k_TGD, lse, x.scale, *inputs, x.starts_S, x.ends_S, weight, backend=how
        )
        actual["indexer_kl_dense_sum"] = total.detach()
        for what, y in zip(("q_I", "k_I", "w"), torch.autograd.grad(total, inputs), strict=True):
            actual[f"indexer_kl_dense_sum: d {what}"] = y
        scores = actual["index_scores: scores"]
        actual["select_topk"] = ops.select_topk(scores, x.k, x.starts_S, x.ends_S, backend=how)
        actual["index_topk"] = ops.index_topk(x.q_SID, x.k_TD, x.w_SI, x.k, x.starts_S, x.ends_S, backend=how)
        return actual

    first, second = everything(), everything()
    for name, e in first.items():
        assert torch.equal(second[name], e), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "width"), [(3, 16), (8, 32), (32, 128), (64, 128)])
def test_bits_of_a_score(heads: int, width: int, dtype: torch.dtype) -> None:
    """A score does not depend on its neighbours: all queries at once, one by one, a slice of the keys.

    Only a GPU can show it: the interpreter's products are numpy's, which sum the edges of a matrix in another way.
    """
    S, T, device = 67, 3000, "cuda"
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(S, heads, width, generator=g), torch.randn(T, width, generator=g)
    q, k, w = q.to(device, dtype), k.to(device, dtype), torch.randn(S, heads, generator=g).to(device)
    starts, ends = torch.zeros(S, device=device).int(), torch.full((S,), T, device=device).int()
    together = ops.index_scores(q, k, w, starts, ends, backend="triton")
    assert torch.equal(together, ops.index_scores(q, k, w, starts, ends, backend="triton"))
    for t in (0, 3, S - 1):
        one = slice(t, t + 1)
        alone = ops.index_scores(q[one], k, w[one], starts[one], ends[one], backend="triton")
        assert torch.equal(together[one], alone)
        fewer = ends[one] - 29 - 7
        moved = ops.index_scores(q[one], k[29:], w[one], starts[one], fewer, backend="triton")
        assert torch.equal(together[one, 29 : T - 7], moved[:, : T - 36])


def test_queries_of_tiles_hold_every_query_that_sees_a_key() -> None:
    from tokensieve.ops.triton.index import queries_of_tiles

    g = torch.Generator().manual_seed(4)
    T, tile = 90, 16
    starts = torch.randint(0, T, (40,), generator=g).int()
    ends = (starts + torch.randint(-3, 30, (40,), generator=g)).clamp(0, T).int()
    packed = make(Case("packs", causal(20, 1, 33), keys=60, k=4))
    for first, last, keys in ((starts, ends, T), (packed.starts_S, packed.ends_S, 60)):
        firsts, lasts = queries_of_tiles(first, last, keys, tile)
        for number, begin in enumerate(range(0, keys, tile)):
            sees = ((last > begin) & (first < min(begin + tile, keys)) & (last > first)).nonzero().flatten()
            if len(sees):
                assert firsts[number] <= sees[0] and sees[-1] < lasts[number]
    firsts, lasts = queries_of_tiles(packed.starts_S, packed.ends_S, 60, tile)
    assert lasts.sum() - firsts.sum() < 2.2 * 54  # of a pack about the queries of one document, not all


def test_scaled_keys() -> None:
    x = make(dataclasses.replace(CASES[0], documents=(Document(0, 70, 9),), keys=70))
    scale = torch.rand(70, generator=torch.Generator().manual_seed(5)) + 0.25
    both = []
    for how in ("interpreter", "reference"):
        q, k, w = leaves(x.q_SID, x.k_TD, x.w_SI)
        scores = ops.index_scores(q, k, w, x.starts_S, x.ends_S, scale, backend=how)
        scores = torch.where(x.visible_ST(), scores, 0.0)
        both.append((scores, *torch.autograd.grad(scores.square().sum(), (q, k, w))))
    for a, e in zip(*both, strict=True):
        oracle.assert_close(a, e, 1e-5)


def test_the_interpreter_is_never_picked_by_itself() -> None:
    for op, choices in ops.backends("cpu").items():
        names = [name for name, why_not in choices if why_not is None]
        assert names[0] != "interpreter" and "triton" not in dict(choices), op


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["warmup", "adapt"])
def test_a_model_trains_through_the_kernels(objective: str, monkeypatch) -> None:
    """Loss and every gradient of a step, packed documents included, as with the reference."""
    inputs = training.batch(2, 40, documents=True)
    by_name = {b.name: b for b in dispatch.BACKENDS}
    both = []
    for names in (("reference",), ("interpreter", "reference")):
        backends = [by_name[name] for name in names]
        monkeypatch.setattr(
            dispatch, "candidates", lambda op, device, those=backends: [b for b in those if b.has(op, device)]
        )
        x = inputs["input_ids"].float()
        module = dispatch.pick("index_topk", x, "auto", {"k": x})
        assert module.__name__.endswith("triton.backend" if "interpreter" in names else "reference")
        model = training.model()
        with tokensieve.training(model, objective):
            loss = model.train()(**inputs).loss
            loss.backward()
        both.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    expected, actual = both
    assert set(actual) == set(expected)
    for name, e in expected.items():
        oracle.assert_close(actual[name], e, 1e-4, float(e.abs().max()), name)
