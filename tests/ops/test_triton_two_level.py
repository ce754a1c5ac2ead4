"""The kernels of index_topk_blocks against the reference, in Triton's interpreter without a GPU, else on it."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.ops.test_two_level import exact_inputs, least_blocks, spans
from tests.support import interpreter  # noqa: F401  # makes it faster
from tests.support.cases import Case, make
from tokensieve import ops
from tokensieve.ops import checks
from tokensieve.ops.quant import quantize_e4m3
from tokensieve.ops.reference import two_level as by_reference

pytest.importorskip("triton", reason="Triton has no build for this machine")

from tests.ops.test_triton import backend, places
from tokensieve.ops.triton import topk, two_level

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FP8 = torch.float8_e4m3fn
SETTINGS = [(16, 4, 34), (32, 5, 20), (128, 3, 130), pytest.param(64, 2, 2, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def given(device: str, S: int = 17, T: int = 500, heads: int = 3, width: int = 16) -> tuple[Tensor, ...]:
    """q, k, w, starts, ends of which every product and every sum is exact: in float32, on a GPU in bf16."""
    q, keys, w = exact_inputs(S, T, heads, width)
    q, keys, w = (x.mul(2).round().clamp(-4, 4) for x in (q, keys, 8 * w))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tuple(x.to(device) for x in (q.to(dtype), keys.to(dtype), w, *spans(S, T)))


def run(how: str, x: tuple[Tensor, ...], k: int, block: int, blocks: int) -> Tensor:
    q, keys, w, starts, ends, *scale = x
    if how == "interpreter":  # which takes E4M3 too, though `backend` does not admit it
        return two_level.index_topk_blocks(q, keys, w, k, starts, ends, *(scale or [None]), block, blocks)
    return ops.index_topk_blocks(q, keys, w, k, starts, ends, *scale, block=block, blocks=blocks, backend=how)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "blocks", "k"), SETTINGS)
def test_selects_as_the_reference(block: int, blocks: int, k: int, device: str) -> None:
    """Every score is exact, and many are equal."""
    x = given(device)
    expected = run("reference", x, k, block, blocks)
    assert torch.equal(run(backend(device), x, k, block, blocks), expected)
    assert not torch.equal(expected, ops.index_topk(*x[:3], k, *x[3:]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "blocks", "k"), SETTINGS)
def test_quantized_keys(block: int, blocks: int, k: int, device: str) -> None:
    """Scales are powers of two here: then means, too, are the reference's to the bit."""
    q, keys, w, starts, ends = given(device)
    scale = torch.exp2(torch.arange(len(keys), device=device) % 5 - 2.0)
    x = q.to(FP8), keys.to(FP8), w, starts, ends, scale
    means = [module.block_means(x[1], scale, block) for module in (two_level, by_reference)]
    assert all(torch.equal(a.float(), e.float()) for a, e in zip(*means, strict=True))
    assert torch.equal(run(backend(device), x, k, block, blocks), run("reference", x, k, block, blocks))


@pytest.mark.parametrize("device", DEVICES)
def test_means_of_any_keys(device: str) -> None:
    """In any order of sums; one that is not finite stays so, also if it has to be quantized."""
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(300, 24, generator=g).to(device)
    values, scales = quantize_e4m3(keys, 24)
    scale = scales[:, 0]
    keys[40, 3], scale[45] = math.nan, math.inf
    kinds = (keys, None, 1e-6), (keys, scale, 1e-6), (keys.half(), None, 1e-3), (values, scale, 0.13)
    for k, k_scale, tolerance in kinds:
        for block in (16, 64):
            both = [module.block_means(k, k_scale, block) for module in (two_level, by_reference)]
            a, e = (x.double() if of_x is None else x.double() * of_x[:, None] for x, of_x in both)
            assert torch.equal(a.isfinite(), e.isfinite()) and not e[40 // block].isfinite().all()
            size = float(e[e.isfinite()].abs().max())
            assert torch.allclose(a, e, rtol=tolerance, atol=tolerance * size / 10, equal_nan=True)


@pytest.mark.parametrize(("case", "device", "dtype"), places(("T < k", "no key tokens", "empty rows", "equal keys")))
def test_every_case(case: Case, device: str, dtype: str) -> None:
    x = make(dataclasses.replace(case, dtype=dtype), device)
    w = x.w_SI.float()
    operands, blocks = (x.q_SID, x.k_TD, w, x.k, x.starts_S, x.ends_S), least_blocks(x.k, 16)
    actual = ops.index_topk_blocks(*operands, block=16, blocks=blocks, backend=backend(device))
    if case.content != "normal" or device == "cpu":  # scores are the same to the last bit, or nearly so
        assert torch.equal(actual, ops.index_topk_blocks(*operands, block=16, blocks=blocks, backend="reference"))
    blocks = max(blocks, len(x.k_TD) // 16 + 1)
    whole = ops.index_topk_blocks(*operands, block=16, blocks=blocks, backend=backend(device))
    assert torch.equal(whole, ops.index_topk(*operands, backend=backend(device)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
@pytest.mark.parametrize(("heads", "width"), [(3, 16), (8, 32), (16, 128), (64, 128), (128, 128)])
def test_few_blocks_select_as_one_level_does(heads: int, width: int, dtype: torch.dtype) -> None:
    """To the bit, though scores are full of rounding: product and sum are those of `index_scores`, in their order.

    Only a GPU can show it: the interpreter's products are numpy's, which sum the edges of a matrix in another way.
    """
    g = torch.Generator().manual_seed(3)
    S, T = 67, 5000
    q, keys = (torch.randn(*shape, generator=g).to("cuda", dtype) for shape in ((S, heads, width), (T, width)))
    w, scale = torch.randn(S, heads, generator=g).cuda(), (torch.rand(T, generator=g) + 0.25).cuda()
    starts, ends = (x.cuda() for x in spans(S, T))
    for k_scale in (scale, None):
        for block, blocks in ((16, 70), (128, 40), (1024, 3)):
            last = torch.minimum(ends, (starts // block + blocks) * block)
            x = q, keys, w, 200, starts, last, k_scale
            actual = ops.index_topk_blocks(*x, block=block, blocks=blocks, backend="triton")
            assert torch.equal(actual, ops.index_topk(*x, backend="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_however_a_prompt_is_cut_on_a_gpu(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(4)
    S, T = 500, 6000
    q, keys = (torch.randn(*shape, generator=g).to("cuda", dtype) for shape in ((S, 16, 128), (T, 128)))
    w, ends = torch.randn(S, 16, generator=g).cuda(), torch.arange(T - S + 1, T + 1).int().cuda()
    starts = torch.where(ends > 5700, 5600, 40).int()
    levels = {"block": 64, "blocks": 9, "backend": "triton"}
    whole = ops.index_topk_blocks(q, keys, w, 400, starts, ends, **levels)
    assert torch.equal(whole, ops.index_topk_blocks(q, keys, w, 400, starts, ends, **levels))
    for a in (0, 3, 250, 499):
        for b in (a + 1, min(a + 130, S)):
            part = slice(a, b)
            alone = ops.index_topk_blocks(q[part], keys[: T - S + b], w[part], 400, starts[part], ends[part], **levels)
            assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_outside_the_keys_is_touched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a range is cut to the keys. Around them, and in blocks past a range's ends, lies NaN."""
    monkeypatch.setattr(checks, "ranges", lambda *given: None)
    lowest, highest, T = -(2**31), 2**31 - 1, 250
    q, keys, w, *_ = given(device, S=6, T=T)
    surrounded = keys.new_full((3 * T, 16), math.nan)
    surrounded[T : 2 * T] = keys
    surrounded[T + 100 : T + 110] = math.nan
    starts = torch.tensor([lowest, -3, 110, highest, T, 120], device=device).int()
    ends = torch.tensor([100, 96, highest, lowest, T + 9, 110], device=device).int()
    actual = run(backend(device), (q, surrounded[T : 2 * T], w, starts, ends), 20, 16, 4)
    meant = [x.clamp(0, T) for x in (starts, ends)]
    assert torch.equal(actual, run("reference", (q, keys, w, *meant), 20, 16, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_strips_of_queries_do_not_meet(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, w, starts, ends = x = given(device, S=7)
    expected = run(backend(device), x, 20, 16, 4)
    monkeypatch.setattr(topk, "SCORES", 3 * 64)
    assert torch.equal(run(backend(device), x, 20, 16, 4), expected)
    starts[:5], ends[:5] = 400, 450
    starts[5], ends[5] = 0, 300
    for s in (100, 299):  # a block's score, and a key's
        broken = keys.clone()
        broken[s] = math.nan
        with pytest.raises(ValueError, match="query 5 contain NaN"):
            run(backend(device), (q, broken, w, starts, ends), 20, 16, 4)
