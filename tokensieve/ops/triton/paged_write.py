"""New tokens into both caches in Triton: what `quant.py` packs, to the bit, in one launch.

Legend: N tokens, G key-value groups, L and R widths of an entry's first and second part, D index width. A program
writes one token's entry of one group, the first group's program the index key too. Rounding to E4M3 works on bits, so
it is the same on every GPU, including those without FP8, and in the interpreter.

A NaN or an infinity that has to be quantized makes the scale NaN, and so every score and every logit of that token:
checking the tokens first would stop the queue. The selection refuses such scores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.triton.index import padded
from tokensieve.ops.triton.paged_attention import GROUP, latent_parts
from tokensieve.ops.triton.paged_index import PAGE, index_parts, inner_contiguous


@triton.jit
def e4m3(x):
    """float32 of at most 448, or NaN, to the bytes of E4M3, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Of 23 bits of the mantissa 3 stay, rounded to even, and the exponent's bias of 127 becomes 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (127 - 7) * 8
    # Below 2^-6 E4M3 numbers are multiples of 2^-9, the last place of float32 from 2^14 on: the addition rounds.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantized(x_GD):
    """Rows of float32 as E4M3 bytes, and for each row its scale, the smallest power of two that makes it fit."""
    size = x_GD.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(size, 1)  # compared as integers, so that NaN is the largest
    floor = tl.full(largest.shape, 1e-4, tl.float32).to(tl.int32, bitcast=True)
    broken = largest >= 0x7F800000
    largest = tl.maximum(largest, floor)
    # 448 = 1.75 * 2^8: the exponent is eight less, and one more if the mantissa is larger than 1.75
    exponent = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = tl.where(broken, float("nan"), (exponent << 23).to(tl.float32, bitcast=True))
    inverse = tl.where(broken, float("nan"), ((254 - exponent) << 23).to(tl.float32, bitcast=True))
    return e4m3(x_GD * inverse[:, None]), scale


@triton.jit
def sums_and_differences(x, half: tl.constexpr, D: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, (D // (2 * half), 2, half)), (0, 2, 1))
    upper, lower = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(upper + lower, upper - lower), (0, 2, 1)), (D,))


@triton.jit
def rotated(x, D: tl.constexpr, LEVELS: tl.constexpr):
    """x (D = 2^LEVELS) times the Hadamard matrix over sqrt(D), added up in the order of `quant.hadamard`."""
    for level in tl.static_range(0, LEVELS):
        x = sums_and_differences(x, 1 << level, D)
    return x * (D**-0.5)


@triton.jit
def _write_key(
    k_I, keys, key_scales, page, token, index_stride,
    D: tl.constexpr, DP: tl.constexpr, LEVELS: tl.constexpr, INDEX_FP8: tl.constexpr,
):  # fmt: skip
    """One index key to its place in a page, whose keys begin at `keys`."""
    d = tl.arange(0, DP)
    key = tl.load(k_I + d, mask=d < D)
    if INDEX_FP8:
        # rounded to the dtype in which `quant.hadamard` returns it
        key = rotated(key.to(tl.float32), D, LEVELS).to(k_I.dtype.element_ty).to(tl.float32)
        code, scale = quantized(key[None, :])
        tl.store(keys + token * D + d[None, :], code)
        tl.store(key_scales + page * (index_stride // 4) + token + tl.arange(0, 1), scale)
    else:
        tl.store(keys + token * D + d, key.to(keys.dtype.element_ty), mask=d < D)


@triton.jit
def _write_kernel(
    first, second, k_I, slots, values, scales, tails, keys, key_scales, places, page_stride, index_stride,
    G: tl.constexpr, L: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    LP: tl.constexpr, RP: tl.constexpr, DP: tl.constexpr,
    LEVELS: tl.constexpr, token_stride: tl.constexpr, LATENT_FP8: tl.constexpr, INDEX_FP8: tl.constexpr,
):  # fmt: skip
    i, g = tl.program_id(0).to(tl.int64), tl.program_id(1) if G > 1 else 0
    slot = tl.load(slots + i).to(tl.int64)
    if (slot >= 0) & (slot < places):
        page, token = slot // PAGE, slot % PAGE
        x, r = tl.arange(0, LP), tl.arange(0, RP)
        first += (i * G + g) * L
        tail = tl.load(second + (i * G + g) * R + r, mask=r < R)
        if LATENT_FP8:
            part, x = tl.arange(0, L // GROUP), tl.arange(0, GROUP)
            at = part[:, None] * GROUP + x[None, :]
            code, scale = quantized(tl.load(first + at).to(tl.float32))
            tl.store(values + page * page_stride + token * token_stride + at, code)
            tl.store(scales + page * (page_stride // 4) + token * (token_stride // 4) + part, scale)
            tails += page * (page_stride // 2) + token * (token_stride // 2)
        else:
            row = page * page_stride + token * token_stride + g * (L + R)
            tl.store(values + row + x, tl.load(first + x, mask=x < L).to(values.dtype.element_ty), mask=x < L)
            tails += row + L
        tl.store(tails + r, tail.to(tails.dtype.element_ty), mask=r < R)
        if g == 0:
            _write_key(
                k_I + i * D, keys + page * index_stride, key_scales, page, token, index_stride, D, DP, LEVELS, INDEX_FP8
            )


def write_caches(
    first: Tensor, second: Tensor, k_I: Tensor, entry_pages: Tensor, index_pages: Tensor, slots: Tensor
) -> None:
    (N, D), L, R = k_I.shape, first.shape[-1], second.shape[-1]
    G = first.shape[1] if first.dim() == 3 else 1
    if 0 in (N, entry_pages.shape[0]):
        return
    whole, index = inner_contiguous(entry_pages), inner_contiguous(index_pages)
    values, scales, tails = latent_parts(whole, R)
    keys, key_scales = index_parts(index)
    _write_kernel[(N, G)](
        first.contiguous(), second.contiguous(), k_I.contiguous(), slots.contiguous(), values, scales, tails,
        keys.view(torch.uint8) if key_scales is not None else keys, key_scales,
        whole.shape[0] * PAGE.value, values.stride(0), keys.stride(0),
        G=G, L=L, R=R, D=D, LP=padded(L), RP=padded(R), DP=padded(D), LEVELS=D.bit_length() - 1,
        token_stride=values[0, 0].numel(),
        LATENT_FP8=whole.dtype == torch.uint8, INDEX_FP8=index.dtype == torch.uint8, num_warps=1,
    )  # fmt: skip
    for pages, written in ((entry_pages, whole), (index_pages, index)):
        if written is not pages:
            pages.copy_(written)
