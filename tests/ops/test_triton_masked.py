"""Masked attention in Triton beyond the cases of test_triton.py: widths, bits, addresses, NaN.

In Triton's interpreter where there is no GPU, else on it; outputs are poisoned first, as in test_triton.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.cases import Document, causal
from tests.support.op_results import leaves
from tokensieve import ops
from tokensieve.ops import checks

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tokensieve.ops.triton.masked import selection_bits

TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 1.5e-2}  # as in test_triton.py
LSE_TOLERANCE = {"float32": 1e-5, "float16": 1e-4, "bfloat16": 1e-4}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SMALL, LARGE = causal(70, 1, 66), (*causal(700, 1, 1500), Document(2201, 90, 66))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Call:
    q_SHD: Tensor
    k_THD: Tensor
    v_THV: Tensor
    dout_SHV: Tensor
    dlse_SH: Tensor
    indices_SK: Tensor

    def to(self, dtype: torch.dtype) -> "Call":
        names = ("q_SHD", "k_THD", "v_THV", "dout_SHV")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def results(self, how: str = "") -> dict[str, Tensor]:
        inputs = leaves(self.q_SHD, self.k_THD, self.v_THV)
        how = how or ("triton" if self.q_SHD.is_cuda else "interpreter")
        out, lse = ops.masked_attention(*inputs, self.indices_SK, self.q_SHD.shape[2] ** -0.5, backend=how)
        gradients = torch.autograd.grad((out, lse), inputs, (self.dout_SHV, self.dlse_SH.to(lse.dtype)))
        return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def make(documents: tuple[Document, ...], k: int, D: int, V: int, H: int, dtype: str, device: str) -> Call:
    """Every query selects some k of what it sees, at random."""
    g = torch.Generator().manual_seed(D + V)
    ranges = torch.tensor([span for document in documents for span in document.ranges()])
    S, T = len(ranges), max(document.start + document.keys for document in documents) + 7
    keys = torch.arange(T)
    seen_ST = (keys >= ranges[:, :1]) & (keys < ranges[:, 1:])
    chosen_SK = torch.rand(S, T, generator=g).masked_fill(~seen_ST, -1.0).topk(min(k, T), 1).indices
    chosen_SK = torch.where(seen_ST.gather(1, chosen_SK), chosen_SK, T).sort(1).values
    sizes = ((S, H, D), (T, H, D), (T, H, V), (S, H, V), (S, H))
    x = Call(*(torch.randn(size, generator=g) for size in sizes), torch.where(chosen_SK < T, chosen_SK, -1).int())
    x = replace(x, dlse_SH=torch.where((x.indices_SK >= 0).any(1, keepdim=True), x.dlse_SH, 0.0))
    return replace(x, **{name: y.to(device) for name, y in vars(x).items()}).to(getattr(torch, dtype))


def assert_equals_the_reference(x: Call, dtype: str) -> None:
    actual = x.results()
    for name, e in x.to(torch.float64).results("reference").items():
        tolerance = (LSE_TOLERANCE if name == "lse" else TOLERANCE)[dtype]
        oracle.assert_close(actual[name].double(), e, tolerance, 1.0, name)


def kinds() -> list:
    """(D, V, dtype, device): every kind of tile; in `make test` those of the 671B model and of the bundled one."""
    found = []
    for D, V in ((192, 128), (48, 32), (80, 130), (200, 40), (256, 256)):
        often = [] if (D, V) in ((192, 128), (48, 32)) else [pytest.mark.slow]
        found.append(pytest.param(D, V, "float32", "cpu", marks=often))
        found += [pytest.param(D, V, dtype, "cuda", marks=pytest.mark.gpu) for dtype in ("float16", "bfloat16")]
    return [*found, pytest.param(48, 32, "float16", "cpu", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("D", "V", "dtype", "device"), kinds())
def test_every_kind_of_tile(D: int, V: int, dtype: str, device: str) -> None:
    documents, k, H = (LARGE, 300, 5) if device == "cuda" else (SMALL, 9, 1)
    assert_equals_the_reference(make(documents, k, D, V, H, dtype, device), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_run_has_the_same_bits(device: str) -> None:
    """In any mode: nothing is added atomically."""
    size = (LARGE, 300, 192, 128, 64, "bfloat16") if device == "cuda" else (causal(9, 3), 4, 24, 16, 2, "float32")
    x = make(*size, device)
    first = x.results()
    torch.use_deterministic_algorithms(False)
    for name, a in x.results().items():
        assert torch.equal(a, first[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_outside_the_keys_is_touched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index past the keys, or before them, counts as -1; what lies around the keys is NaN."""
    monkeypatch.setattr(checks, "indices", lambda *given: None)
    x = make(causal(20, 3), 6, 24, 16, 2, "bfloat16" if device == "cuda" else "float32", device)
    T, expected = len(x.k_THD), x.results()

    def among_nan(keys: Tensor) -> Tensor:
        surrounded = keys.new_full((3 * T, *keys.shape[1:]), math.nan)
        surrounded[T : 2 * T] = keys
        return surrounded[T : 2 * T]

    strays = torch.tensor([T, 2**31 - 1, -2, -(2**31), 2**32, -(2**32)], device=device).expand(len(x.q_SHD), -1)
    given = {"k_THD": among_nan(x.k_THD), "v_THV": among_nan(x.v_THV)}
    for indices in (torch.cat((strays[:, :4].int(), x.indices_SK), 1), torch.cat((x.indices_SK.long(), strays), 1)):
        actual = replace(x, indices_SK=indices, **given).results()
        for name, e in expected.items():
            assert torch.equal(actual[name], e), name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["q_SHD", "k_THD", "v_THV", "dout_SHV"])
def test_nan_stays_where_it_is_selected(where: str, broken: float, device: str) -> None:
    """All queries and keys share a tile. A key reaches those that selected it, and through them the gradients of
    theirs.
    """
    x = make(causal(12), 4, 24, 16, 1, "bfloat16" if device == "cuda" else "float32", device)
    t = torch.arange(12, device=device)
    indices = torch.stack(
        (t // 2, 7 + t // 4), 1
    ).int()  # one key for two queries, one for four; nobody selects the last
    x = replace(x, indices_SK=indices)
    clean = x.results()
    bad_query = (t == 4) | (t == 5)
    y = getattr(x, where).clone()
    y[[2, 18] if where in ("k_THD", "v_THV") else [4, 5], :, 3] = broken
    actual = replace(x, **{where: y}).results()
    its_keys = torch.isin(torch.arange(19, device=device), indices[bad_query])
    for name, e in clean.items():
        reached = bad_query if len(e) == 12 else its_keys
        tolerance = TOLERANCE["bfloat16" if device == "cuda" else "float32"]
        oracle.assert_close(actual[name][~reached].double(), e[~reached].double(), tolerance, 1.0, name)
        untouched = (where == "dout_SHV" and name in ("out", "lse")) or (where == "v_THV" and name == "lse")
        if untouched:
            oracle.assert_close(actual[name].double(), e.double(), tolerance, 1.0, name)
        elif math.isnan(broken):
            assert actual[name][reached].isnan().flatten(1).any(1).all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_any_indices_and_addresses(device: str) -> None:
    """Indices of 64 bits, no places at all, values cut out of wider ones, keys between two multiples of 16 bytes."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    x = make(causal(11, 3), 6, 24, 16, 2, dtype, device)
    expected = x.results()
    odd = x.k_THD.new_empty(x.k_THD.numel() + 1)[1:].view_as(x.k_THD).copy_(x.k_THD)
    values = torch.cat((x.k_THD, x.v_THV), -1)[..., 24:]
    for name, a in replace(x, indices_SK=x.indices_SK.long(), k_THD=odd, v_THV=values).results().items():
        oracle.assert_close(a.double(), expected[name].double(), TOLERANCE[dtype], 1.0, name)
    for name, a in replace(x, indices_SK=x.indices_SK[:, :0]).results().items():
        assert (a == (-math.inf if name == "lse" else 0)).all(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("one", [0, 1])
def test_the_gradient_of_one_output(one: int, device: str) -> None:
    dtype = "bfloat16" if device == "cuda" else "float32"
    x = make(causal(11, 3), 6, 24, 16, 2, dtype, device)
    both = []
    for y, how in ((x.to(torch.float64), "reference"), (x, "triton" if device == "cuda" else "interpreter")):
        inputs = leaves(y.q_SHD, y.k_THD, y.v_THV)
        output = ops.masked_attention(*inputs, y.indices_SK, 0.2, backend=how)[one]
        both.append(torch.autograd.grad(output.sum(), inputs, allow_unused=True))
    for e, a in zip(*both, strict=True):
        oracle.assert_close(a.double(), e, TOLERANCE[dtype], 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_bits_are_the_selection(device: str) -> None:
    """More places than a program reads at once, not in any order, some past the keys; lengths that fill no word."""
    g = torch.Generator().manual_seed(9)
    S, T = 37, 1500
    indices = torch.stack([torch.randperm(T + 40, generator=g)[:1100] for _ in range(S)]).int()
    indices[5], indices[6, 1:] = -1, T
    selected_ST = torch.zeros(S, T + 40, dtype=torch.bool).scatter_(1, indices.clamp_min(0).long(), True)[:, :T]
    selected_ST[5] = False
    for by_key in (False, True):
        words, firsts, ends = (x.cpu() for x in selection_bits(indices.to(device), T, by_key))
        bits = ((words[:, None] >> torch.arange(32)[None, :, None]) & 1).bool().flatten(0, 1)
        assert not bits[T if not by_key else S :].any()
        assert torch.equal(bits[:S] if by_key else bits[:T].t(), selected_ST)
    for t in range(S):
        keys = selected_ST[t].nonzero().flatten()
        assert (firsts[t], ends[t]) == ((keys[0], keys[-1] + 1) if len(keys) else (0, 0))
