"""FP8 blocks, Hadamard rotation and cache pages, against byte-level and float64 arithmetic written here."""

import math
import struct

import numpy as np
import pytest
import torch

from tokensieve.ops import quant


def e4m3_value(byte: int) -> float:
    """Decode one E4M3 byte by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3_TABLE = np.array([e4m3_value(byte) for byte in range(256)])


def is_power_of_two(x: torch.Tensor) -> bool:
    return bool((torch.frexp(x)[0] == 0.5).all())


def wide_values(*shape: int) -> torch.Tensor:
    """Normal values of magnitudes from 1e-6 to 1e4, and whole blocks of zeros."""
    x = torch.randn(shape) * 10.0 ** (torch.rand(shape[:-1]) * 10 - 6)[..., None]
    x[0] = 0
    return x


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize(("width", "block"), [(128, 128), (300, 128), (512, 128), (5, 128), (7, 1), (48, 16)])
def test_round_trip_error_is_within_half_a_step(width: int, block: int, scale_format: quant.ScaleFormat) -> None:
    torch.manual_seed(0)
    x = wide_values(40, width)
    values, scales = quant.quantize_e4m3(x, block, scale_format)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == (40, math.ceil(width / block))
    back = quant.dequantize_e4m3(values, scales, block, torch.float64)
    # Three mantissa bits: half a step is 2^-4 of the value where E4M3 is normal, 2^-10 of the scale where it is not.
    step = scales.double().repeat_interleave(block, -1)[:, :width]
    bound = torch.maximum(x.double().abs() * 2**-4, step * 2**-10)
    slack = 1 + 2**-20 if scale_format == "float32" else 1  # x / s rounds unless s is a power of two
    assert bool(((back - x.double()).abs() <= bound * slack).all())


def test_the_scale_is_the_definition() -> None:
    torch.manual_seed(1)
    x = wide_values(64, 256)
    amax = x.view(64, 2, 128).abs().amax(-1).clamp_min(1e-4)
    _, exact = quant.quantize_e4m3(x)
    assert torch.equal(exact, amax / 448)
    _, power = quant.quantize_e4m3(x, scale_format="ue8m0")
    assert is_power_of_two(power)
    assert bool((amax.double() <= 448 * power.double()).all()) and bool((amax.double() > 224 * power.double()).all())


@pytest.mark.parametrize("exponent", [-20, -13, -1, 0, 1, 7, 60])
def test_power_of_two_scale_at_the_very_edge(exponent: int) -> None:
    edge = torch.tensor([448.0 * 2.0**exponent])
    above = torch.nextafter(edge, torch.tensor(torch.inf))
    assert quant.quantize_e4m3(edge, 1, "ue8m0", 1e-30)[1].item() == 2.0**exponent
    assert quant.quantize_e4m3(above, 1, "ue8m0", 1e-30)[1].item() == 2.0 ** (exponent + 1)


def test_amax_floor() -> None:
    for x in (torch.zeros(128), torch.full((128,), 1e-11)):
        assert quant.quantize_e4m3(x)[1].item() == pytest.approx(1e-4 / 448, rel=1e-6)
        assert quant.quantize_e4m3(x, scale_format="ue8m0")[1].item() == 2.0**-22
        assert bool((quant.quantize_e4m3(x)[0].float() == 0).all())


def test_saturation_and_huge_magnitudes() -> None:
    x = torch.tensor([3.0e38, -3.0e38, 1.0, 0.0])
    for scale_format in ("float32", "ue8m0"):
        values, scales = quant.quantize_e4m3(x, 4, scale_format)
        assert bool(values.float().isfinite().all()) and bool((values.float().abs() <= 448).all())
        assert bool(quant.dequantize_e4m3(values, scales, 4)[:2].isfinite().all())
    # Every float32 amax puts its largest value at exactly +-448, never beyond.
    amax = torch.rand(4096, 1) * 1000 + 1e-3
    assert bool((quant.quantize_e4m3(-amax, 1)[0].float() == -448).all())


def test_bad_input_raises() -> None:
    for bad in (math.nan, math.inf):
        x = torch.zeros(2, 130)
        x[1, 129] = bad
        with pytest.raises(ValueError, match="NaN or an infinity"):
            quant.quantize_e4m3(x)
        with pytest.raises(ValueError, match="NaN or an infinity"):
            quant.quantize_weight(x)
    with pytest.raises(ValueError, match="scale_format"):
        quant.quantize_e4m3(torch.ones(4), scale_format="e5m2")
    with pytest.raises(ValueError, match="block"):
        quant.quantize_e4m3(torch.ones(4), block=0)
    values, scales = quant.quantize_e4m3(torch.ones(4, 256))
    with pytest.raises(ValueError, match="do not fit"):
        quant.dequantize_e4m3(values, scales[:, :1])


def test_bfloat16_input_is_quantized_from_its_own_values() -> None:
    torch.manual_seed(2)
    x = torch.randn(4, 256, dtype=torch.bfloat16)
    a, b = quant.quantize_e4m3(x), quant.quantize_e4m3(x.float())
    assert torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 5), (1, 129), (300, 200)])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_weight_blocks(shape: tuple[int, int], scale_format: quant.ScaleFormat) -> None:
    torch.manual_seed(3)
    weight = torch.randn(shape) * 0.02
    weight[:1] = 0
    values, scale_inv = quant.quantize_weight(weight, scale_format=scale_format)
    assert values.shape == weight.shape
    assert scale_inv.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    back = quant.dequantize_weight(values, scale_inv, dtype=torch.float32)
    table = E4M3_TABLE[values.view(torch.uint8).numpy()]
    for i in range(scale_inv.shape[0]):  # block by block, in float64, from the bytes
        for j in range(scale_inv.shape[1]):
            at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            want = table[at] * scale_inv[i, j].item()
            np.testing.assert_allclose(back.numpy()[at], want, rtol=2**-23)
            bound = np.maximum(np.abs(weight.numpy()[at]) * 2**-4, scale_inv[i, j].item() * 2**-10) * (1 + 2**-20)
            assert (np.abs(want - weight.numpy()[at]) <= bound).all()
    assert quant.dequantize_weight(values, scale_inv).dtype == torch.bfloat16


def test_weight_blocks_of_zeros_and_of_other_sizes() -> None:
    values, scale_inv = quant.quantize_weight(torch.zeros(3, 3))
    assert scale_inv.item() == 1.0 and bool((values.float() == 0).all())
    values, scale_inv = quant.quantize_weight(torch.arange(12.0).view(3, 4), (2, 3))
    assert scale_inv.shape == (2, 2)
    assert torch.allclose(scale_inv * 448, torch.tensor([[6.0, 7.0], [10.0, 11.0]]))
    with pytest.raises(ValueError, match="does not fit"):
        quant.dequantize_weight(values, scale_inv)


def sylvester(width: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / math.sqrt(width)


@pytest.mark.parametrize("width", [1, 2, 8, 64, 128, 512])
def test_hadamard_is_the_sylvester_matrix(width: int) -> None:
    torch.manual_seed(4)
    matrix, x = sylvester(width), torch.randn(3, 5, width, dtype=torch.float64)
    assert torch.allclose(quant.hadamard(x), x @ matrix, atol=1e-13, rtol=0)
    assert torch.allclose(quant.hadamard(quant.hadamard(x)), x, atol=1e-13, rtol=0)  # its own inverse
    assert torch.allclose(quant.hadamard(torch.eye(width, dtype=torch.float64)), matrix, atol=1e-13, rtol=0)
    y = torch.randn(3, 5, width, dtype=torch.float64)
    assert torch.allclose((quant.hadamard(x) * quant.hadamard(y)).sum(-1), (x * y).sum(-1), atol=1e-11, rtol=0)


def test_hadamard_dtypes_widths_and_gradient() -> None:
    torch.manual_seed(5)
    x = torch.randn(6, 128)
    assert torch.allclose(quant.hadamard(x), (x.double() @ sylvester(128)).float(), atol=1e-5)
    half = quant.hadamard(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, quant.hadamard(x.bfloat16().float()).bfloat16())
    for width in (0, 3, 96):
        with pytest.raises(ValueError, match="power-of-two"):
            quant.hadamard(torch.zeros(2, width))
    leaf = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quant.hadamard, (leaf,))


def test_latent_page_bytes() -> None:
    torch.manual_seed(7)
    latent, k_rope = torch.randn(3, 64, 512) * 5, torch.randn(3, 64, 64)
    latent[0, 1] = 0
    page = quant.pack_latent_page(latent, k_rope)
    assert page.dtype == torch.uint8 and page.shape == (3, 64, 656)
    back, rope_back = quant.unpack_latent_page(page, torch.float32)
    for p, t in [(0, 0), (0, 1), (1, 17), (2, 63)]:
        raw = bytes(page[p, t].tolist())
        scales = struct.unpack("<4f", raw[512:528])
        assert all(math.frexp(scale)[0] == 0.5 for scale in scales)
        want = E4M3_TABLE[np.frombuffer(raw[:512], np.uint8)] * np.repeat(scales, 128)
        np.testing.assert_array_equal(back[p, t].numpy(), want)
        bound = np.maximum(np.abs(latent[p, t].numpy()) * 2**-4, np.repeat(scales, 128) * 2**-10)
        assert (np.abs(want - latent[p, t].numpy()) <= bound).all()
        upper_half = np.frombuffer(raw[528:], "<u2").astype(np.uint32)  # bfloat16 is the upper half of a float32
        rope = (upper_half << 16).view(np.float32)
        np.testing.assert_array_equal(rope_back[p, t].numpy(), rope)
        np.testing.assert_array_equal(rope, k_rope[p, t].bfloat16().float().numpy())
    again = quant.pack_latent_page(back, rope_back)  # what was stored once is stored the same again, up to its scale
    assert torch.equal(quant.unpack_latent_page(again, torch.float32)[0], back)
    assert quant.unpack_latent_page(page)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_index_page_bytes(scale_format: quant.ScaleFormat) -> None:
    torch.manual_seed(8)
    k_I = torch.randn(2, 64, 128)
    page = quant.pack_index_page(k_I, scale_format)
    assert page.dtype == torch.uint8 and page.shape == (2, 8448)
    values, scales = quant.unpack_index_page(page)
    for p in range(2):
        raw = bytes(page[p].tolist())
        table = E4M3_TABLE[np.frombuffer(raw[:8192], np.uint8)].reshape(64, 128)
        np.testing.assert_array_equal(values[p].float().numpy(), table)
        stored = struct.unpack("<64f", raw[8192:])
        np.testing.assert_array_equal(scales[p].numpy(), np.array(stored, np.float32))
        assert scale_format == "float32" or is_power_of_two(scales)
        bound = np.maximum(np.abs(k_I[p].numpy()) * 2**-4, np.array(stored)[:, None] * 2**-10) * (1 + 2**-20)
        assert (np.abs(table * np.array(stored)[:, None] - k_I[p].numpy()) <= bound).all()


def test_pages_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"latent must be \(P, 64, 512\)"):
        quant.pack_latent_page(torch.zeros(1, 64, 256), torch.zeros(1, 64, 64))
    with pytest.raises(ValueError, match=r"k_rope must be \(P, 64, 64\)"):
        quant.pack_latent_page(torch.zeros(1, 64, 512), torch.zeros(1, 63, 64))
    with pytest.raises(ValueError, match=r"k_I must be \(P, 64, 128\)"):
        quant.pack_index_page(torch.zeros(64, 128))
    with pytest.raises(ValueError, match="uint8"):
        quant.unpack_index_page(torch.zeros(1, 8448))
    with pytest.raises(ValueError, match="656"):
        quant.unpack_latent_page(torch.zeros(1, 64, 655, dtype=torch.uint8))
