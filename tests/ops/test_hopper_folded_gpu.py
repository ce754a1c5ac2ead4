"""The Hopper kernels with several queries in a program, for few heads of MLA, against the float64 reference."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, Case, Document, causal, make
from tests.support.op_results import SPARSE, results

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.hopper import folded
from tokensieve.ops.triton import unions

pytestmark = pytest.mark.gpu
TOLERANCE = {"float16": 4e-3, "bfloat16": 1.5e-2}  # as test_triton.py
LSE_TOLERANCE = 1e-4  # as test_hopper.py: of float32 sums
MLA = {"groups": 1, "entry": 576, "d_k": 576, "v_start": 0, "d_v": 512}
PACK = (Document(0, 0, 1), Document(0, 12, 12), *causal(301), Document(340, 300, 40))


@pytest.fixture(autouse=True)
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: the selections of most cases are drawn at random, and would go to the kernels of one query."""
    monkeypatch.setattr(folded, "keys_at_most", lambda B, K: B * K)


@pytest.fixture(params=["in order", "any order"])
def order(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.use_deterministic_algorithms(request.param == "in order", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def with_few_heads() -> list:
    cases = [Case(f"pack-{h}", PACK, keys=650, k=40, heads=h, **MLA) for h in (16, 32)]
    cases += [Case(f"many steps-{h}", causal(701), keys=701, k=300, heads=h, **MLA) for h in (16, 32)]
    parameters = [pytest.param(case, id=case.name) for case in cases]
    return parameters + [
        pytest.param(dataclasses.replace(case, heads=16, **MLA), id=str(case)) for case in CASES if case.magnitude <= 16
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", with_few_heads())
def test_values_and_gradients(case: Case, dtype: str, order: None) -> None:
    x = make(dataclasses.replace(case, dtype=dtype), "cuda")
    x = dataclasses.replace(x, w_SI=x.w_SI.float())
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, "hopper", SPARSE)
    for name, e in expected.items():
        assert actual[name].isfinite().eq(e.isfinite()).all(), name
        allowed = LSE_TOLERANCE if name.endswith(": lse") else TOLERANCE[dtype]
        oracle.assert_close(actual[name].double(), e, allowed, 1.0, name)


def test_blocks_beside_single_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folded, "keys_at_most", lambda B, K: 2 * K)
    x = make(Case("both", causal(701), keys=701, k=100, heads=16, dtype="bfloat16", **MLA), "cuda")
    x.indices_SK[400:600] = x.indices_SK[399]
    x = dataclasses.replace(x, w_SI=x.w_SI.float())
    found = folded.Inputs(x.q_SHD, x.kv_TGE, x.indices_SK)
    taken = found.choice([part.taken for part in found.parts(0)]).taken
    assert taken.any() and not taken.all()
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, "hopper", SPARSE)
    for name, e in expected.items():
        allowed = LSE_TOLERANCE if name.endswith(": lse") else TOLERANCE["bfloat16"]
        oracle.assert_close(actual[name].double(), e, allowed, 1.0, name)


@pytest.mark.parametrize(("where", "value"), [("kv_TGE", math.nan), ("kv_TGE", math.inf), ("q_SHD", math.nan)])
def test_broken_numbers_reach_only_who_selected_them(where: str, value: float) -> None:
    x = make(Case("broken", PACK, keys=650, k=40, heads=16, dtype="bfloat16", **MLA), "cuda")
    spoiled = getattr(x, where).clone()
    of_keys = where == "kv_TGE"
    at = int(x.indices_SK[150, 3]) if of_keys else 150
    spoiled[at] = value
    expected = results(x, "hopper", SPARSE)
    actual = results(dataclasses.replace(x, **{where: spoiled}), "hopper", SPARSE)
    hit = (x.indices_SK == at).any(1) if of_keys else torch.arange(len(x.indices_SK), device="cuda") == at
    chosen = torch.zeros(len(x.k_TD), dtype=torch.bool, device="cuda")
    chosen[x.indices_SK[hit][x.indices_SK[hit] >= 0].long()] = True
    assert hit.any() and not hit.all()
    for name, e in expected.items():
        kept = ~chosen if name.endswith(("d kv", "d k_I")) else ~hit
        oracle.assert_close(actual[name][kept].double(), e[kept].double(), TOLERANCE["bfloat16"], 1.0, name)
    for name in ("sparse_attention: out", "sparse_attention_kl: kl"):
        assert not actual[name][hit].isfinite().any(), name


def test_a_broken_gradient_reaches_only_what_its_query_selected() -> None:
    x = make(Case("broken gradient", causal(13), keys=13, k=3, heads=16, dtype="bfloat16", **MLA), "cuda")
    operands = (x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, *x.parts.values())
    out, lse = folded.sparse_attention(*operands)
    dlse = torch.zeros_like(lse)
    dlse[9] = math.nan
    dq, dkv = folded.sparse_attention_backward(torch.ones_like(out), dlse, out, lse, *operands)
    assert (~dq.isfinite().all((1, 2))).nonzero().tolist() == [[9]]
    assert (~dkv.isfinite().all((1, 2))).nonzero()[:, 0].tolist() == x.indices_SK[9].tolist()


def test_strips_are_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(Case("strips", PACK, keys=650, k=40, heads=16, dtype="bfloat16", **MLA), "cuda")
    whole = results(x, "hopper", SPARSE)
    monkeypatch.setattr(unions, "STRIP_BYTES", 2**18)
    for name, a in results(x, "hopper", SPARSE).items():
        oracle.assert_close(a.double(), whole[name].double(), TOLERANCE["bfloat16"], 1.0, name)


@pytest.fixture
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_second_run_has_the_same_bits(poisoned: None) -> None:
    x = make(Case("twice", causal(700, 1, 1500), keys=2201, k=300, heads=16, dtype="bfloat16", **MLA), "cuda")
    first, second = results(x, "hopper", SPARSE), results(x, "hopper", SPARSE)
    for name, e in first.items():
        assert torch.equal(second[name], e), name
