"""Attention over selected entries for few heads on Hopper: a tile of neighbouring queries as one query of 64 heads.

Legend: S queries, T key tokens, H heads, K selected; B queries of a tile, C places of its list.

A program of `forward` and `dq` holds 64 heads. With 16 heads a query fills a quarter of it, and gathers its entries for
itself alone. Four neighbours fill it, and what they select together is little more than what one does. So they share a
list of keys (`unions`), of which each sees its own. B queries select at most B K keys, which take no longer than B
programs of one query each: nothing is lost if their selections differ.

Zero times NaN is NaN. So the kernels multiply finite numbers only. A mask beside them marks what was broken, and makes
the logits NaN of a query that has it or has selected it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.hopper.attention import delta_of, pitch_of
from tokensieve.ops.hopper.dkv import add_dkv
from tokensieve.ops.hopper.dq import probabilities_and_dq
from tokensieve.ops.hopper.forward import Tiled, forward
from tokensieve.ops.hopper.limits import aligned, whole
from tokensieve.ops.hopper.warps import BLOCK, KEY, VALUE
from tokensieve.ops.triton.attention import LOG2E
from tokensieve.ops.triton.in_order import add_in_order, wanted_in_order
from tokensieve.ops.triton.union_kl import index_gradients, kl_slopes, write_kl
from tokensieve.ops.triton.unions import Unions, strips, unions

ENABLED = False  # they compile and have never run: tests/ops/test_hopper_tiles_gpu.py


def pays(q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor) -> bool:
    """Whether a tile of queries fills what one leaves empty."""
    return ENABLED and q_SHD.shape[1] in (16, 32) and min(len(q_SHD), len(kv_TGE), indices_SK.shape[1]) > 0


def _breaks(x: Tensor) -> Tensor:
    """float32: 0, or NaN if not all numbers along the last axis are finite."""
    return torch.zeros(x.shape[:-1], dtype=torch.float32, device=x.device).masked_fill(~whole(x), torch.nan)


def _padded(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """(rows, ...) contiguous."""
    if len(x) == rows:
        return x.contiguous()
    return torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 1), 0, rows - len(x)), value=value)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


@dataclass
class Part:
    """A strip of queries: they and their tiles among all, the lists, and the lists with -1 past their ends."""

    queries: slice
    tiles: slice
    u: Unions
    keys: Tensor
    tiled: Tiled


class Tiles:
    """Inputs of both ways in tiles. S is padded to whole tiles; queries past the end select nothing."""

    def __init__(self, q: Tensor, kv: Tensor, indices: Tensor) -> None:
        (self.S, self.H, _), self.T, self.K = q.shape, kv.shape[0], indices.shape[1]
        self.B = BLOCK // self.H
        self.rows = triton.cdiv(self.S, self.B) * self.B
        self.q, self.kv = self.fold(_finite(q)), aligned(_finite(kv))
        self.indices = _padded(indices, self.rows, -1)
        self.key_breaks = _breaks(kv[:, 0])
        self.row_breaks = self.fold(_breaks(q))

    def fold(self, x: Tensor) -> Tensor:
        """(S, H, ...) as (tiles, 64, ...)."""
        return _padded(x, self.rows).view(-1, BLOCK, *x.shape[2:])

    def new(self, *widths: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows // self.B, BLOCK, *widths, dtype=dtype, device=self.q.device)

    def unfold(self, x: Tensor) -> Tensor:
        return x.view(self.rows, self.H, *x.shape[2:])[: self.S]

    def parts(self, kept: int) -> Iterator[Part]:
        """kept: bytes that a place of a tile's list needs besides the lists."""
        for rows in strips(self.rows, self.T, self.K, others=kept * self.K):
            (u,) = unions(self.indices[rows], self.T, self.B, self.B)
            tiles = slice(rows.start // self.B, rows.start // self.B + len(u))
            yield Part(rows, tiles, u, u.named(), Tiled(u.marks, self.key_breaks, self.row_breaks[tiles], self.H))


@triton.jit(do_not_specialize=["C"])
def _mass_kernel(
    p, top, lse, counts, mass, C, pitch, H: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, UNSCALED: tl.constexpr
):
    """The probabilities of one step of a tile's list, summed over the heads of each of its queries.

    Where a query has not selected the key it is 0, or NaN if the query has no keys at all: marks say what to read.
    """
    steps, head, n = pitch // BN, tl.arange(0, H), tl.arange(0, BN)
    tile, step = (tl.program_id(0) // steps).to(tl.int64), tl.program_id(0) % steps
    place = step * BN + n
    if step * BN >= tl.load(counts + tile):
        return
    for b in range(B):
        row = (tile * B + b) * H + head
        p_HN = tl.load(p + row[:, None] * pitch + place[None, :]).to(tl.float32)
        if UNSCALED:
            scale_H = tl.exp2(tl.load(top + row * steps + step) - tl.load(lse + row) * LOG2E)
            p_HN *= scale_H[:, None]
        tl.store(mass + (tile * B + b) * C + place, tl.sum(p_HN, 0), mask=place < C)


def _mass(part: Part, p: Tensor, H: int, top: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """(tiles, B, C) float32. What lies past a count is not defined."""
    u = part.u
    mass = torch.empty(len(u), u.B, u.C, dtype=torch.float32, device=p.device)
    _mass_kernel[(len(u) * (p.shape[2] // BLOCK),)](
        p, top, lse, u.counts, mass, u.C, p.shape[2], H=H, B=u.B, BN=BLOCK, UNSCALED=top is not None, num_warps=4
    )
    return mass


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    x = Tiles(q_SHD, kv_TGE, indices_SK)
    out, lse = x.new(VALUE, dtype=q_SHD.dtype), x.new(dtype=torch.float32)
    for part in x.parts(0):
        rows = part.tiles
        forward(x.q[rows], x.kv, part.keys, scale, out[rows], lse[rows], tiled=part.tiled)
    return x.unfold(out), x.unfold(lse)


def sparse_attention_kl(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
    q_I: Tensor, k_I: Tensor, w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x = Tiles(q_SHD, kv_TGE, indices_SK)
    out, lse = x.new(VALUE, dtype=q_SHD.dtype), x.new(dtype=torch.float32)
    q_I, k_I, w = (_padded(q_I, x.rows), k_I.contiguous(), _padded(w, x.rows))
    kl = torch.empty(x.rows, dtype=torch.float32, device=out.device)
    buffers = None  # every strip uses them, of which the first is the longest
    for part in x.parts(_kept(x, buffers=1)):
        rows, queries, n = part.tiles, part.queries, len(part.u)
        if buffers is None:
            pitch = pitch_of(part.u.C)
            buffers = out.new_empty(n, BLOCK, pitch), lse.new_empty(n, BLOCK, pitch // BLOCK)
        p, top = buffers[0][:n], buffers[1][:n]
        forward(x.q[rows], x.kv, part.keys, scale, out[rows], lse[rows], (p, top), part.tiled)
        mass = _mass(part, p, x.H, top, lse[rows])
        write_kl(part.u, mass, x.H, q_I[queries], k_I, w[queries], kl[queries])
    return x.unfold(out), x.unfold(lse), kl[: x.S]


def _kept(x: Tiles, buffers: int) -> int:
    """Bytes that a key of a query needs: its tile's probabilities, its own target and scores, and sums in order."""
    in_order = KEY * 4 if buffers > 1 and wanted_in_order() else 0
    return x.B * (buffers * x.H * x.q.element_size() + 2 * 4) + in_order


def _backward_by_parts(
    x: Tiles, dout_SHV: Tensor, dlse_SH: Tensor | None, out_SHV: Tensor, lse_SH: Tensor, scale: float, dq: Tensor,
    dkv: Tensor,
) -> Iterator[tuple[Part, Tensor]]:  # fmt: skip
    """Writes dq (tiles, 64, 576), adds to dkv (T, 576) float32, and yields the probabilities of each strip."""
    dout = dout_SHV.to(out_SHV.dtype).contiguous()
    dlse = None if dlse_SH is None else dlse_SH.contiguous()
    delta = x.fold(delta_of(dout, out_SHV.contiguous(), dlse))
    dout, lse = x.fold(_finite(dout)), x.fold(lse_SH)
    buffer = None  # every strip uses it, of which the first is the longest
    for part in x.parts(_kept(x, buffers=2)):
        rows, n = part.tiles, len(part.u)
        if buffer is None:
            buffer = dout.new_empty(2, n, BLOCK, pitch_of(part.u.C))
        p, ds = buffer[:, :n]
        probabilities_and_dq(
            dout[rows], x.q[rows], x.kv, part.keys, lse[rows], delta[rows], scale, dq[rows], p, ds, part.tiled
        )
        if wanted_in_order():
            sums = dkv.new_empty(n * part.u.C, KEY)
            add_dkv(p, ds, dout[rows], x.q[rows], part.keys, sums, x.T, in_order=True)
            add_in_order(dkv, part.keys, sums)
        else:
            add_dkv(p, ds, dout[rows], x.q[rows], part.keys, dkv, x.T)
        yield part, p


def sparse_attention_backward(
    dout_SHV: Tensor, dlse_SH: Tensor | None, out_SHV: Tensor, lse_SH: Tensor, q_SHD: Tensor, kv_TGE: Tensor,
    indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = Tiles(q_SHD, kv_TGE, indices_SK)
    dq, dkv = x.new(KEY, dtype=q_SHD.dtype), torch.zeros(x.T, KEY, dtype=torch.float32, device=q_SHD.device)
    for _ in _backward_by_parts(x, dout_SHV, dlse_SH, out_SHV, lse_SH, scale, dq, dkv):
        pass
    return x.unfold(dq), dkv.to(kv_TGE.dtype).view_as(kv_TGE)


def sparse_attention_kl_backward(
    dout_SHV: Tensor, dlse_SH: Tensor | None, dkl_S: Tensor, out_SHV: Tensor, lse_SH: Tensor, q_SHD: Tensor,
    kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
    q_I: Tensor, k_I: Tensor, w: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = Tiles(q_SHD, kv_TGE, indices_SK)
    dq, dkv = x.new(KEY, dtype=q_SHD.dtype), torch.zeros(x.T, KEY, dtype=torch.float32, device=q_SHD.device)
    q_I, k_I, w, dkl = _padded(q_I, x.rows), k_I.contiguous(), _padded(w, x.rows), _padded(dkl_S, x.rows)
    dq_I, dw = torch.empty_like(q_I), torch.empty_like(w)
    dk_I = torch.zeros(k_I.shape, dtype=torch.float32, device=k_I.device)
    for part, p in _backward_by_parts(x, dout_SHV, dlse_SH, out_SHV, lse_SH, scale, dq, dkv):
        queries = part.queries
        index = (q_I[queries], k_I, w[queries])
        slopes = kl_slopes(part.u, _mass(part, p, x.H), x.H, dkl[queries], *index)
        index_gradients(part.u, *index, slopes, dq_I[queries], dk_I, dw[queries])
    return x.unfold(dq), dkv.to(kv_TGE.dtype).view_as(kv_TGE), dq_I[: x.S], dk_I.to(k_I.dtype), dw[: x.S]
