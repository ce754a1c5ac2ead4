"""Rotary position embedding: YaRN frequencies, and the two layouts that must not be confused.

MLA rotates the last dims of q and the shared k_R in the INTERLEAVED layout: dims (0, 1), (2, 3), ... form the pairs. The indexer rotates
the first dims of q_I and k_I in the HALF-SPLIT layout: dims (0, d/2), (1, d/2 + 1), ... form the pairs. Swapping them does not crash; it
ruins retrieval. What we store: rotated MLA keys keep the interleaved order of the official demo (transformers stores them
de-interleaved; dot products agree, cache contents do not).

Sources: official demo, `precompute_freqs_cis` and `apply_rotary_emb`; YaRN, arXiv 2309.00071.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokensieve.ops.eager import is_single_token


class Rotation(NamedTuple):
    """cos and signed sin (N, 1, d) float32 of the N tokens' positions, laid out once per pass for either layout of d dims:

    rotated = x * cos + partner(x) * sin, where a pair's sines are (-sin, sin). For a token alone instead the matrix (d, d) of the same
    rotation: one product where the formula takes seven operators.
    """

    interleaved: tuple[Tensor, ...]
    half_split: tuple[Tensor, ...]

    def rows(self, rows: slice) -> "Rotation":
        """That of some of the tokens."""
        return Rotation(tuple(x[rows] for x in self.interleaved), tuple(x[rows] for x in self.half_split))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(rope: dict[str, Any], width: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies (width/2) float32 in radians per token, and the factor on cos and sin.

    `rope` is the config's rope_parameters. YaRN divides the slow frequencies (under beta_slow turns in the original context) by `factor`,
    keeps the fast ones (over beta_fast turns), and blends linearly in between.
    """
    theta = float(rope.get("rope_theta", 10000.0))
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / (theta**exponent)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return plain, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type {kind!r} is not supported; tokensieve implements 'default' and 'yarn'")
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / original

    def dim_with(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dim_with(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dim_with(rope.get("beta_slow") or 1)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = plain / factor * ramp + plain * (1 - ramp)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = (
            _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
        )
    return blended, float(attention_factor)


def softmax_scale(rope: dict[str, Any], qk_width: int, max_positions: int) -> float:
    """qk_width**-0.5, times the squared YaRN mscale where `mscale_all_dim` is set. The indexer does not share it."""
    scale = qk_width**-0.5
    if rope.get("rope_type", rope.get("type", "default")) != "default" and rope.get("mscale_all_dim"):
        factor = rope.get("factor") or max_positions / rope["original_max_position_embeddings"]
        scale *= _mscale(factor, rope["mscale_all_dim"]) ** 2
    return scale


def rotation(positions_N: Tensor, inverse_frequencies: Tensor, factor: float) -> Rotation:
    angle = positions_N[:, None, None].to(torch.float32) * inverse_frequencies
    cos, sin = angle.cos() * factor, angle.sin() * factor
    interleaved = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    r = Rotation(interleaved, (torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))
    if not is_single_token(positions_N):
        return r
    identity = torch.eye(interleaved[0].shape[-1])  # its rows rotated are the matrix's
    return Rotation((rotate_interleaved(identity, r)[0],), (rotate_half_split(identity, r)[0],))


def rotate_interleaved(x_NHD: Tensor, r: Rotation) -> Tensor:
    """Rotates pairs (2i, 2i+1) of the last axis; layout unchanged. For MLA."""
    return _rotate(x_NHD, r.interleaved, lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def rotate_half_split(x_NHD: Tensor, r: Rotation) -> Tensor:
    """Rotates pairs (i, i + d/2) of the last axis; layout unchanged. For the indexer."""
    return _rotate(x_NHD, r.half_split, lambda x: x.roll(x.shape[-1] // 2, -1))


def _rotate(x_NHD: Tensor, tables: tuple[Tensor, ...], partner: Callable[[Tensor], Tensor]) -> Tensor:
    x = x_NHD.float()
    if len(tables) == 1:
        return torch.matmul(x, tables[0]).to(x_NHD.dtype)
    cos, sin = tables
    return torch.addcmul(x * cos, partner(x), sin).to(x_NHD.dtype)
