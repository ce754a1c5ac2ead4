"""Index queries for quantized pages: rotated, rounded, their scales in w.

The kernel and the reference are compared with a plain computation.
"""

import math

import pytest
import torch

from tests.ops.test_triton_paged import DEVICES, backend
from tests.support import oracle
from tokensieve import ops
from tokensieve.ops import quant


def drawn(S: int, H: int, R: int | None, dtype: torch.dtype, exact: bool = True) -> list[torch.Tensor]:
    """With `exact`, products and sums of the rotation are exact, so that no order of operations changes a bit."""
    g = torch.Generator().manual_seed(S * H)
    q = torch.randint(-64, 65, (S, H, 128), generator=g).to(dtype) / 16
    w = torch.randn(S, H, generator=g)
    if R is None:
        return [q, w]
    if exact:
        return [q, w, *(torch.randint(-2, 3, (2, S, 1, R), generator=g).float() / 2)]
    angle = torch.randn(S, 1, R // 2, generator=g) * 100
    return [q, w, torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)]


@pytest.mark.parametrize("R", [None, 64, 16])
def test_the_reference_is_what_the_equation_says(R: int | None) -> None:
    q, w, *tables = drawn(5, 3, R, torch.float32, exact=False)
    values, weights = ops.quantize_queries(q, w, *tables, backend="reference")
    x = q.double()
    if R is not None:
        a, b = x[..., : R // 2], x[..., R // 2 : R]
        cos, sin = (t.double()[..., : R // 2] for t in tables)
        x = torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., R:]), -1)
    matrix = torch.ones(1, 1).double()
    for _ in range(7):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    turned = x @ matrix / math.sqrt(128)
    scale = weights / w
    assert torch.equal(scale.log2(), scale.log2().round())
    # E4M3 keeps three bits after the first, and is coarser below 2^-6 of the scale
    step = torch.maximum(turned.abs() / 16, scale.double()[..., None] * 2**-9)
    assert ((values.double() * scale.double()[..., None] - turned).abs() <= step * 1.01).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("R", [None, 64, 128])
@pytest.mark.parametrize(("S", "H"), [(1, 64), (3, 20), (7, 1), (0, 4)])
def test_the_kernel_has_the_references_bits(S: int, H: int, R: int | None, device: str) -> None:
    for dtype in (torch.float32, torch.float16) if device == "cpu" else (torch.float32, torch.bfloat16):
        given = drawn(S, H, R, dtype)
        expected = ops.quantize_queries(*given, backend="reference")
        actual = ops.quantize_queries(*(x.to(device) for x in given), backend=backend(device))
        assert torch.equal(actual[0].cpu().view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(actual[1].cpu(), expected[1])
        if R and S:
            given = drawn(S, H, R, dtype, exact=False)
            expected = ops.quantize_queries(*given, backend="reference")
            actual = ops.quantize_queries(*(x.to(device) for x in given), backend=backend(device))
            numbers = [
                values.cpu().float() * (weights.cpu() / given[1])[..., None] for values, weights in (actual, expected)
            ]
            # a last bit of the rotation may move a number by a step of E4M3, an eighth, but seldom
            oracle.assert_close(*numbers, 0.13)
            assert (numbers[0] != numbers[1]).float().mean() < 0.01


@pytest.mark.parametrize("device", DEVICES)
def test_a_broken_query_breaks_its_head_alone(device: str) -> None:
    q, w = drawn(2, 3, None, torch.float32)
    q[1, 2, 5] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        ops.quantize_queries(q, w, backend="reference")
    weights = ops.quantize_queries(q.to(device), w.to(device), backend=backend(device))[1].cpu()
    assert weights.isnan().tolist() == [[False] * 3, [False, False, True]]


def test_what_is_refused() -> None:
    q, w, cos, sin = drawn(2, 3, 16, torch.float32)
    for wrong, says in (
        ((q[..., :64], w), "128"),
        ((q, w[:1]), r"w must be \(S, H_I\)"),
        ((q, w, cos), "both of cos and sin"),
        ((q, w, cos[:1], sin), "cos and sin must be"),
        ((q, w, cos.double(), sin), "float32"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.quantize_queries(*wrong)


def test_it_is_the_indexers_rotation() -> None:
    """The tables and the layout are those of `rope`: half-split, the first dims."""
    from tokensieve.model.rope import frequencies, rotate_half_split, tables

    r = tables(torch.arange(3, 9), *frequencies({"rope_theta": 10000.0}, 32, 64), interleaved=False)
    q, w = drawn(6, 2, None, torch.float32)
    turned = torch.cat((rotate_half_split(q[..., :32], r), q[..., 32:]), -1)
    values, scales = quant.quantize_e4m3(quant.hadamard(turned), scale_format="ue8m0")
    actual = ops.quantize_queries(q, w, *r, backend="reference")
    assert torch.equal(actual[0].float(), values.float()) and torch.equal(actual[1], w * scales[..., 0])
