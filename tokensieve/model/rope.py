"""Rotary position embedding: scaled frequencies, and the two layouts that must not be confused.

MLA rotates the last dims of q and the shared k_R in the INTERLEAVED layout: dims (0, 1), (2, 3), ... form the pairs.
The indexer rotates the first dims of q_I and k_I in the HALF-SPLIT layout: dims (0, d/2), (1, d/2 + 1), ... form the
pairs; GLM-5's interleaves them too. Swapping the layouts does not crash; it ruins retrieval. The cache stores rotated
MLA keys in the interleaved order of the official demo (transformers stores them de-interleaved; dot products agree,
cache contents do not).

Sources: official demo, `precompute_freqs_cis` and `apply_rotary_emb`; YaRN, arXiv 2309.00071; linear interpolation,
arXiv 2306.15595; Llama 3.1's scaling, `apply_scaling` of its reference implementation.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokensieve.families.rope_fields import rope_type
from tokensieve.ops.eager import is_single_token

Rows = slice | Tensor | None  # some of a pass's tokens: a slice, their indices, or None for all


def taken(x: Tensor, rows: Rows) -> Tensor:
    return x if rows is None else x[rows]


Tables = tuple[Tensor, ...]
"""cos and signed sin (N, 1, d) float32 of the N tokens' positions, for one layout of pairs:

rotated = x * cos + partner(x) * sin, with sines (-sin, sin) in a pair. If N = 1, the matrix (d, d) of the same rotation
instead: one product replaces seven operators.
"""


class Rotation(NamedTuple):
    """The rotations of one pass: for the attention and for the indexer, each in the family's layout.

    `softmax_factor` is the factor on the softmax scale that belongs to these frequencies (YaRN's mscale squared).
    """

    attention: Tables
    indexer: Tables
    softmax_factor: float = 1.0

    def index_rows(self, rows: Rows) -> Tables:
        """The indexer's tables of the tokens in `rows`."""
        return self.indexer if rows is None or len(self.indexer) == 1 else tuple(x[rows] for x in self.indexer)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(rope: dict[str, Any], width: int, max_positions: int) -> tuple[Tensor, float]:
    """Inverse frequencies (width/2) float32 in radians per token, and the factor on cos and sin.

    `rope` is the config's rope_parameters. A scaled type divides the slow frequencies by `factor`, keeps the fast ones,
    and blends linearly in between. They differ in which are slow: all of them ("linear"), those under low_freq_factor
    turns in the original context, the blend reaching to high_freq_factor turns ("llama3"), or those under beta_slow
    turns, the blend reaching to beta_fast turns ("yarn"). "llama3" blends by turns. "yarn" blends by dims, from and to
    whole ones unless `truncate` is false, and alone has a factor on cos and sin other than 1.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / (_theta(rope) ** exponent)
    kind = rope_type(rope)
    if kind == "default":
        return plain, 1.0
    if kind not in _SLOW:
        raise ValueError(f"rope_type {kind!r} is not supported; tokensieve implements default, {', '.join(_SLOW)}")
    factor = rope.get("factor") or max_positions / rope["original_max_position_embeddings"]
    slow = _SLOW[kind](rope, plain)
    return plain / factor * slow + plain * (1 - slow), _attention_factor(rope, factor) if kind == "yarn" else 1.0


def _theta(rope: dict[str, Any]) -> float:
    return float(rope.get("rope_theta", 10000.0))


def _slow_in_llama3(rope: dict[str, Any], plain: Tensor) -> Tensor:
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return 1 - ((turns - low) / (high - low)).clamp(0, 1)


def _slow_in_yarn(rope: dict[str, Any], plain: Tensor) -> Tensor:
    original, width = rope["original_max_position_embeddings"], 2 * len(plain)

    def dim_with(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(_theta(rope)))

    low, high = dim_with(rope.get("beta_fast") or 32), dim_with(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)


# type: the share (width/2) of each frequency that is divided by the factor
_SLOW: dict[str, Callable[[dict[str, Any], Tensor], Tensor]] = {
    "linear": lambda rope, plain: torch.ones_like(plain),
    "llama3": _slow_in_llama3,
    "yarn": _slow_in_yarn,
}


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)


def softmax_factor(rope: dict[str, Any], max_positions: int) -> float:
    """A factor on width**-0.5: the squared YaRN mscale if `mscale_all_dim` is set, else 1. The indexer has none."""
    if rope_type(rope) == "default" or not rope.get("mscale_all_dim"):
        return 1.0
    factor = rope.get("factor") or max_positions / rope["original_max_position_embeddings"]
    return _mscale(factor, rope["mscale_all_dim"]) ** 2


def tables(positions_N: Tensor, inverse_frequencies: Tensor, factor: float, interleaved: bool) -> Tables:
    """The tables of tokens at these positions, for either layout of pairs."""
    angle = positions_N[:, None, None].to(torch.float32) * inverse_frequencies
    cos, sin = angle.cos() * factor, angle.sin() * factor
    cos_sin: Tables
    if interleaved:
        cos_sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        cos_sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    if not is_single_token(positions_N):
        return cos_sin
    identity = torch.eye(cos_sin[0].shape[-1])  # its rotated rows are the rows of the matrix
    return ((rotate_interleaved if interleaved else rotate_half_split)(identity, cos_sin)[0],)


def rotate_interleaved(x_NHD: Tensor, tables: Tables) -> Tensor:
    """Rotates pairs (2i, 2i+1) of the last axis; layout unchanged. For MLA."""
    return _rotate(x_NHD, tables, lambda x: x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))


def rotate_half_split(x_NHD: Tensor, tables: Tables) -> Tensor:
    """Rotates pairs (i, i + d/2) of the last axis; layout unchanged. For the indexer, and for grouped attention."""
    return _rotate(x_NHD, tables, lambda x: x.roll(x.shape[-1] // 2, -1))


def _rotate(x_NHD: Tensor, tables: Tables, partner: Callable[[Tensor], Tensor]) -> Tensor:
    x = x_NHD.float()
    if len(tables) == 1:
        return torch.matmul(x, tables[0]).to(x_NHD.dtype)
    cos, sin = tables
    return torch.addcmul(x * cos, partner(x), sin).to(x_NHD.dtype)
