"""The Hopper kernels over unions of selections against the float64 reference, with broken numbers, and in strips."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch

from tests.support import oracle
from tests.support.cases import Case, Document, Inputs, causal, make
from tests.support.op_results import SPARSE, results

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.triton import union_attention, unions

pytestmark = pytest.mark.gpu
TOLERANCE = {"float16": 4e-3, "bfloat16": 1.5e-2}  # as test_triton.py
LSE_TOLERANCE = 1e-4  # as test_hopper.py: of float32 sums
# Heads, groups and width of the shapes of benchmarks/gpu_few_heads.py, and groups of 32 heads.
SHAPES = [(32, 8, 128), (16, 2, 128), (9, 3, 64), (64, 2, 128)]
APART = {"entry": 208, "d_k": 128, "v_start": 144, "d_v": 64}  # another width of values, behind a gap
PACK = (Document(0, 0, 1), Document(0, 12, 12), *causal(300), Document(340, 300, 40))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that took a wide block, so that no test passes without them."""
    from tokensieve.ops.hopper import unions as on_hopper

    taken: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(on_hopper, f"union_{name}_kernel")

        class Counted:
            def __init__(self, kernel: object, name: str) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid: tuple[int, ...]) -> object:
                taken.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(on_hopper, f"union_{name}_kernel", Counted(kernel, name))
    yield taken
    assert {"forward", "backward"} <= set(taken)


def grouped(shape: tuple[int, int, int], name: str, dtype: str = "bfloat16", long: bool = False) -> Case:
    """long: lists of many steps, so that every buffer in shared memory is used again."""
    heads, groups, D = shape
    parts = {"heads": heads, "groups": groups, "entry": 2 * D, "d_k": D, "v_start": D, "d_v": D}
    documents, keys, k = (causal(1200), 1200, 300) if long else (PACK, 650, 40)
    return Case(name, documents, keys=keys, k=k, dtype=dtype, **parts)


def compare(x: Inputs, tolerance: float) -> None:
    expected, actual = results(x.to(torch.float64), "reference", SPARSE), results(x, "hopper", SPARSE)
    for name, e in expected.items():
        allowed = LSE_TOLERANCE if name.endswith(": lse") else tolerance
        oracle.assert_close(actual[name].double(), e, allowed, 1.0, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, int, int], dtype: str) -> None:
    x = make(grouped(shape, "unions", dtype), "cuda")
    x.indices_SK[100:200] = x.indices_SK[220]  # blocks that share every key, beside blocks that share few
    compare(x, TOLERANCE[dtype])


def test_values_of_another_width_behind_a_gap() -> None:
    x = make(dataclasses.replace(grouped(SHAPES[0], "apart"), **APART), "cuda")
    x.indices_SK[100:200] = x.indices_SK[220]
    compare(x, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_of_many_steps(shape: tuple[int, int, int]) -> None:
    x = make(grouped(shape, "many steps", long=True), "cuda")
    heads, groups, _ = shape
    for first in range(600, 1200, 8):  # four selections to a wide block of 32 queries
        x.indices_SK[first : first + 8] = x.indices_SK[first]
    wide = union_attention.levels(x.indices_SK, len(x.k_TD), union_attention.heads_padded(heads, groups))[0]
    assert int(wide.counts.max()) > 4 * 128
    compare(x, TOLERANCE["bfloat16"])


def test_in_order(counted: list[str]) -> None:
    """The portable kernels take the whole backward then."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        x = make(grouped(SHAPES[0], "in order"), "cuda")
        compare(x, TOLERANCE["bfloat16"])
        first, second = results(x, "hopper", SPARSE), results(x, "hopper", SPARSE)
    finally:
        torch.use_deterministic_algorithms(False)
    assert set(counted) == {"forward"}
    assert all(torch.equal(second[name], e) for name, e in first.items())
    results(x, "hopper", SPARSE)  # the backward again


def test_no_keys_at_all(counted: list[str]) -> None:
    case = dataclasses.replace(grouped(SHAPES[0], "no keys"), documents=(Document(0, 0, 40),), keys=0, k=2)
    for name, a in results(make(case, "cuda"), "hopper", SPARSE).items():
        assert (a == -math.inf if name.endswith(": lse") else a == 0).all(), name
    assert not counted
    results(make(grouped(SHAPES[0], "keys"), "cuda"), "hopper", SPARSE)


def test_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unions, "FIT", 2)
    x = make(grouped(SHAPES[0], "both levels"), "cuda")
    x.indices_SK[100:200] = x.indices_SK[220]
    wide, _narrow = union_attention.levels(x.indices_SK, len(x.k_TD), MP=4)
    assert (wide.counts < 0).any() and (wide.counts >= 0).any()
    compare(x, TOLERANCE["bfloat16"])


@pytest.mark.parametrize(("where", "value"), [("kv_TGE", math.nan), ("kv_TGE", math.inf), ("q_SHD", math.nan)])
def test_broken_numbers_reach_only_who_selected_them(where: str, value: float) -> None:
    x = make(grouped(SHAPES[0], "broken"), "cuda")
    spoiled = getattr(x, where).clone()
    of_keys = where == "kv_TGE"
    at = int(x.indices_SK[150, 3]) if of_keys else 150
    spoiled[at] = value
    expected = results(x, "hopper", SPARSE)
    actual = results(dataclasses.replace(x, **{where: spoiled}), "hopper", SPARSE)
    rows = torch.arange(len(x.indices_SK), device="cuda")
    hit = (x.indices_SK == at).any(1) if of_keys else rows == at
    chosen = torch.zeros(len(x.k_TD), dtype=torch.bool, device="cuda")
    chosen[x.indices_SK[hit][x.indices_SK[hit] >= 0].long()] = True
    assert hit.any() and not hit.all()
    for name, e in expected.items():
        kept = ~chosen if name.endswith(("d kv", "d k_I")) else ~hit
        oracle.assert_close(actual[name][kept].double(), e[kept].double(), TOLERANCE["bfloat16"], 1.0, name)
    assert not actual["sparse_attention: out"][hit].isfinite().all((1, 2)).any()


def test_strips_are_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(grouped(SHAPES[1], "strips"), "cuda")
    whole = results(x, "hopper", SPARSE)
    monkeypatch.setattr(unions, "STRIP_BYTES", 2**14)
    for name, a in results(x, "hopper", SPARSE).items():
        oracle.assert_close(a.double(), whole[name].double(), TOLERANCE["bfloat16"], 1.0, name)


def test_the_forward_has_the_same_bits_twice() -> None:
    x = make(grouped(SHAPES[2], "twice"), "cuda")
    first, second = results(x, "hopper", SPARSE), results(x, "hopper", SPARSE)
    for name in ("sparse_attention: out", "sparse_attention: lse"):
        assert torch.equal(first[name], second[name])
