"""Blocks of queries that share a union, for few heads to a group: both levels, broken numbers, strips, the lists."""

import dataclasses
import math
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import oracle
from tests.support.cases import Case, Document, Inputs, causal, make
from tests.support.op_results import SPARSE, results
from tokensieve.ops import checks

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.triton import union_attention, unions

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# As in test_triton.py: float32 in the interpreter, bf16 on a GPU.
TOLERANCE = {"cpu": 1e-5, "cuda": 1.5e-2}
# Three heads to a group, padded to four: wide blocks have 32 queries, narrow ones four.
GROUPED = {"heads": 6, "groups": 2, "entry": 32, "d_k": 16, "v_start": 16, "d_v": 16}
DOCUMENTS = (Document(0, 0, 1), Document(0, 12, 12), *causal(40))
PACK = Case("a wide block and narrow ones", DOCUMENTS, keys=41, k=6, **GROUPED)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def given(case: Case, device: str) -> tuple[Inputs, str]:
    x = make(case, device)
    return (x.to(torch.bfloat16), "triton") if device == "cuda" else (x, "interpreter")


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_of_both_levels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unions, "FIT", 1)
    x, how = given(PACK, device)
    x.indices_SK[32:] = x.indices_SK[45]  # so that the second wide block's union fits into its list
    assert union_attention.pays(x.q_SHD, x.kv_TGE, *x.parts.values())
    wide, narrow = union_attention.levels(x.indices_SK, len(x.k_TD), MP=4)
    assert (wide.counts < 0).any() and (wide.counts >= 0).any()
    assert ((narrow.counts < 0) == (wide.counts >= 0).repeat_interleave(8)[: len(narrow)]).all()
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, how, SPARSE)
    for name, e in expected.items():
        oracle.assert_close(actual[name].double(), e, TOLERANCE[device], 1.0, name)


@pytest.mark.parametrize("device", DEVICES)
def test_lists_hold_every_selected_key_once(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.stack([torch.randperm(300, generator=generator)[:20].sort().values for _ in range(70)])
    selected[5, 7:] = -1
    selected[64:] = -1
    for u in unions.unions(selected.int().to(device), 300, wide=32, narrow=4):
        for block, count in enumerate(u.counts.tolist()):
            rows = selected[block * u.B : (block + 1) * u.B]
            wanted = sorted(set(rows.flatten().tolist()) - {-1})
            if count < 0:
                assert (u.B == 32 and len(wanted) > u.C) or (u.B == 4 and len(wanted) <= u.C)
                continue
            assert u.keys[block, :count].tolist() == wanted
            for b, row in enumerate(rows):
                marked = (u.marks[block, :count].cpu() >> b) & 1
                assert u.keys[block, :count].cpu()[marked != 0].tolist() == [key for key in row.tolist() if key >= 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("kv_TGE", math.nan),
        ("q_SHD", math.nan),
        pytest.param("k_TD", math.nan, marks=pytest.mark.slow),
        pytest.param("q_SID", math.nan, marks=pytest.mark.slow),
        pytest.param("w_SI", math.nan, marks=pytest.mark.slow),
        pytest.param("kv_TGE", math.inf, marks=pytest.mark.slow),
    ],
)
def test_broken_numbers_reach_only_who_selected_them(where: str, value: float, device: str) -> None:
    """Though a program multiplies the queries of a block with the keys of all of them."""
    case = Case("broken", (Document(0, 20, 6), Document(20, 30, 7)), keys=50, k=5, **GROUPED)
    x, how = given(case, device)
    of_keys = where in ("kv_TGE", "k_TD")
    spoiled = getattr(x, where).clone()
    at = int(x.indices_SK[2, 1]) if of_keys else 2
    spoiled[at] = value
    expected = results(x, how, SPARSE)
    actual = results(dataclasses.replace(x, **{where: spoiled}), how, SPARSE)
    hit = (x.indices_SK == at).any(1) if of_keys else torch.arange(13, device=device) == at
    chosen = torch.zeros(50, dtype=torch.bool, device=device)
    chosen[x.indices_SK[hit].long().flatten()] = True
    chosen[at] |= of_keys
    assert hit.any() and not hit.all()
    for name, e in expected.items():
        if where in ("k_TD", "q_SID", "w_SI") and "kl" not in name:
            continue
        rows = ~chosen if name.endswith(("d kv", "d k_I")) else ~hit
        oracle.assert_close(actual[name][rows].double(), e[rows].double(), TOLERANCE[device], 1.0, name)
    reached = "sparse_attention_kl: kl" if where in ("k_TD", "q_SID", "w_SI") else "sparse_attention: out"
    assert not actual[reached][hit].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_gradient_reaches_only_what_its_query_selected(device: str) -> None:
    x, _ = given(Case("broken gradient", causal(13), keys=13, k=3, **GROUPED), device)
    operands = (x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, *x.parts.values())
    out, lse = union_attention.sparse_attention(*operands)
    dlse = torch.zeros_like(lse)
    dlse[9] = math.nan
    dq, dkv = union_attention.sparse_attention_backward(torch.ones_like(out), dlse, out, lse, *operands)
    assert (~dq.isfinite().all((1, 2))).nonzero().tolist() == [[9]]
    assert (~dkv.isfinite().all((1, 2))).nonzero()[:, 0].tolist() == x.indices_SK[9].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_does_not_overflow_before_it_must(device: str) -> None:
    """A query times its weight is past 65504 here, though every result is far below."""
    case = Case("large weights", causal(13), keys=13, k=3, dtype="float16", **GROUPED)
    x = make(case, device)
    x = dataclasses.replace(x, q_SID=x.q_SID * 64, k_TD=x.k_TD / 64, w_SI=x.w_SI.float() * 2048)
    how = "triton" if device == "cuda" else "interpreter"
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, how, SPARSE)
    name = "sparse_attention_kl: d k_I"
    assert (x.q_SID.float() * x.w_SI[..., None]).abs().max() > 65504
    oracle.assert_close(actual[name].double(), expected[name], 4e-3, 1.0, name)


@pytest.mark.parametrize(("places", "units"), [("NEAR", (1.17, 1.59)), ("DIFFUSE", (1.67, 4.02)), (None, None)])
def test_the_benchmark_draws_what_was_measured(
    places: str | None, units: tuple[float, float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    drawing = runpy.run_path(str(benchmarks / "gpu_few_heads.py"))
    selected = drawing["draw"](4096, 128, drawing[places] if places else None, torch.device("cpu"))
    for t, row in enumerate(selected.tolist()):
        keys = [key for key in row if key >= 0]
        assert len(keys) == min(t + 1, 128) and keys == sorted(set(keys)) and keys[-1] <= t
    if units:
        assert [drawing["unions"](selected, B) for B in (2, 8)] == pytest.approx(units, rel=0.05)


def test_no_keys_at_all() -> None:
    x, how = given(Case("no keys", (Document(0, 0, 5),), keys=0, k=2, **GROUPED), "cpu")
    for name, a in results(x, how, SPARSE).items():
        assert (a == -math.inf if name.endswith(": lse") else a == 0).all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_strips_are_one_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, how = given(PACK, device)
    whole = results(x, how, SPARSE)
    monkeypatch.setattr(unions, "STRIP_BYTES", 1)
    assert len(list(unions.strips(len(x.q_SHD), len(x.k_TD), x.k))) == 2
    for name, a in results(x, how, SPARSE).items():
        if name.endswith(("d kv", "d k_I")):  # added strip by strip
            oracle.assert_close(a.double(), whole[name].double(), TOLERANCE[device], 1.0, name)
        else:
            assert torch.equal(a, whole[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_strays_are_no_keys(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an index past the keys counts as -1, at whatever place."""
    monkeypatch.setattr(checks, "indices", lambda *given: None)
    x, how = given(Case("strays", causal(9), keys=9, k=4, **GROUPED), device)
    strays = torch.tensor([9, 2**31 - 1, -2, -(2**31)], device=device).int().expand(9, -1)
    meant = dataclasses.replace(x, indices_SK=torch.cat((torch.full_like(strays, -1), x.indices_SK), 1))
    expected = results(meant, how, SPARSE)
    actual = results(dataclasses.replace(x, indices_SK=torch.cat((strays, x.indices_SK), 1)), how, SPARSE)
    for name, e in expected.items():
        assert torch.equal(actual[name], e), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_run_has_the_same_bits(device: str) -> None:
    sizes = GROUPED | ({"d_k": 128, "entry": 256, "v_start": 128, "d_v": 128} if device == "cuda" else {})
    lengths = (700, 1, 900) if device == "cuda" else (9,)
    case = Case("twice", causal(*lengths), keys=sum(lengths), k=6, **sizes)
    x, how = given(case, device)
    first, second = (results(x, how, SPARSE) for _ in range(2))
    for name, e in first.items():
        assert torch.equal(second[name], e), name
