"""Attention over selected entries for few heads on Hopper: a block of neighbouring queries, folded into one query of
128 heads.

Legend: S queries, T key tokens, H heads, K selected; B queries of a block, C places of its list.

A program of `forward` and `dq` holds 64 heads, and one of `dkv` sums over 128 before it adds. With 16 heads a query
fills a quarter of the first and an eighth of the second, and gathers its entries for itself alone. Eight neighbours
fill both, and what they select together is little more than what one does. So they share a list of keys (`unions`), of
which each sees its own.

Blocks cost more than they save if selections differ. So queries whose block selects more than `keys_at_most` go to the
kernels of one query a program. The device decides, and the host never waits: both run, each with the keys of its
queries alone, and a choice by query comes after.

Zero times NaN is NaN. So the kernels multiply finite numbers only. A mask beside them marks what was broken,
and makes the logits NaN of a query that has it or has selected it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokensieve.ops.hopper import attention, attention_kl
from tokensieve.ops.hopper.attention import delta_of, pitch_of
from tokensieve.ops.hopper.dkv import HEADS, add_dkv
from tokensieve.ops.hopper.dq import probabilities_and_dq
from tokensieve.ops.hopper.forward import Folded, forward
from tokensieve.ops.hopper.limits import aligned, whole
from tokensieve.ops.hopper.warps import KEY, TILE, VALUE
from tokensieve.ops.triton.attention import LOG2E
from tokensieve.ops.triton.in_order import add_in_order, wanted_in_order
from tokensieve.ops.triton.union_kl import index_gradients, kl_slopes, write_kl
from tokensieve.ops.triton.unions import Unions, fitting, strips

LONGEST = 2**20  # places of a list: the largest power of two that a program holds


def pays(q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor) -> bool:
    """Whether a block of queries fills what one leaves empty.

    Blocks look at all entries, so the queries select as many at least; and a list has a power of two of places that a
    program can hold.
    """
    (S, H, _), T, K = q_SHD.shape, len(kv_TGE), indices_SK.shape[1]
    if H not in (16, 32) or S < HEADS // H or T == 0 or K == 0:
        return False
    return S * K >= T and min(keys_at_most(HEADS // H, K), T) <= LONGEST


def keys_at_most(B: int, K: int) -> int:
    """Keys that a block of B queries may select together. With more, one query a program is faster: docs/kernels.md."""
    return int((1 + B / 4) * K)


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


@dataclass(frozen=True)
class Part:
    """A strip of queries: they and their blocks among all, the lists, and the lists with -1 past their ends.

    taken: (rows,) bool, whether a query's block is computed as one. Queries past the end are among them.
    """

    queries: slice
    blocks: slice
    u: Unions
    keys: Tensor
    taken: Tensor
    folded: Folded


@dataclass(frozen=True)
class Choice:
    """By query: taken (S,) bool, whether its block is computed as one; alone (S, K), its selection if not, else -1."""

    taken: Tensor
    alone: Tensor

    def choose(self, of_blocks: Tensor, of_one: Tensor) -> Tensor:
        """By query, (S, ...), in the place of `of_one`."""
        taken = self.taken.view(-1, *(1,) * (of_one.ndim - 1))
        return torch.where(taken, of_blocks[: len(of_one)], of_one, out=of_one)


class Inputs:
    """Inputs of both ways, folded. S is padded to whole blocks; queries past the end select nothing."""

    def __init__(self, q: Tensor, kv: Tensor, indices: Tensor) -> None:
        (self.S, self.H, _), self.T, self.K = q.shape, kv.shape[0], indices.shape[1]
        self.B = HEADS // self.H
        self.rows = triton.cdiv(self.S, self.B) * self.B
        self.q, self.kv = self.fold(_finite(q)), aligned(_finite(kv))
        self.indices = _padded(indices, self.rows, -1)
        self.key_marks = torch.where(whole(kv[:, 0]), 0, -(2**31)).int()  # the sign bit of what is broken
        self.row_breaks = self.fold(_breaks(q))

    def fold(self, x: Tensor) -> Tensor:
        """(S, H, ...) as (blocks, 128, ...)."""
        return _padded(x, self.rows).view(-1, HEADS, *x.shape[2:])

    def new(self, *widths: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows // self.B, HEADS, *widths, dtype=dtype, device=self.q.device)

    def unfold(self, x: Tensor) -> Tensor:
        return x.view(self.rows, self.H, *x.shape[2:])[: self.S]

    def parts(self, kept: int) -> Iterator[Part]:
        """kept: bytes that a place of a block's list needs besides the lists."""
        fit = keys_at_most(self.B, self.K)
        for rows in strips(self.rows, self.T, self.K, others=kept * fit // self.B):
            u = fitting(self.indices[rows], self.T, self.B, fit)
            blocks = slice(rows.start // self.B, rows.start // self.B + len(u))
            keys, taken = u.named(), (u.counts >= 0).repeat_interleave(self.B)
            marks = torch.where(keys >= 0, u.marks | self.key_marks[keys.clamp_min(0)], 0)
            yield Part(rows, blocks, u, keys, taken, Folded(marks, self.row_breaks[blocks], self.H))

    def choice(self, taken: list[Tensor]) -> Choice:
        """taken: of all parts."""
        mine = torch.cat(taken)[: self.S]
        return Choice(mine, self.indices[: self.S].masked_fill(mine[:, None], -1))


@triton.jit(do_not_specialize=["C"])
def _mass_kernel(
    p, top, lse, counts, mass, C, pitch, H: tl.constexpr, B: tl.constexpr, BN: tl.constexpr, UNSCALED: tl.constexpr
):
    """The probabilities of one tile of a block's list, summed over the heads of each of its queries.

    Where a query has not selected the key it is 0, or NaN if the query has no keys at all: marks say what to read.
    """
    tiles, head, b, n = pitch // BN, tl.arange(0, H), tl.arange(0, B), tl.arange(0, BN)
    block, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    if tile * BN >= tl.load(counts + block):
        return
    # Heads come first, so that a thread has all of them: the sum then needs no other thread.
    row_HB, place = (block * B + b)[None, :] * H + head[:, None], tile * BN + n
    p_HBN = tl.load(p + row_HB[:, :, None] * pitch + place[None, None, :]).to(tl.float32)
    if UNSCALED:
        scale_HB = tl.exp2(tl.load(top + row_HB * tiles + tile) - tl.load(lse + row_HB) * LOG2E)
        p_HBN *= scale_HB[:, :, None]
    tl.store(mass + (block * B + b)[:, None] * C + place[None, :], tl.sum(p_HBN, 0), mask=(place < C)[None, :])


def _mass(part: Part, p: Tensor, H: int, top: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """(blocks, B, C) float32. What lies past a count is not defined."""
    u = part.u
    mass = torch.empty(len(u), u.B, u.C, dtype=torch.float32, device=p.device)
    _mass_kernel[(len(u) * (p.shape[2] // TILE),)](
        p, top, lse, u.counts, mass, u.C, p.shape[2], H=H, B=u.B, BN=TILE, UNSCALED=top is not None, num_warps=2
    )
    return mass


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    x, taken = Inputs(q_SHD, kv_TGE, indices_SK), list[Tensor]()
    out, lse = x.new(VALUE, dtype=q_SHD.dtype), x.new(dtype=torch.float32)
    for part in x.parts(0):
        blocks = part.blocks
        forward(x.q[blocks], x.kv, part.keys, scale, out[blocks], lse[blocks], folded=part.folded)
        taken.append(part.taken)
    choice = x.choice(taken)
    of_one = attention.sparse_attention(q_SHD, kv_TGE, choice.alone, scale, d_k, v_start, d_v)
    return choice.choose(x.unfold(out), of_one[0]), choice.choose(x.unfold(lse), of_one[1])


def _forward_kl(
    x: Inputs, scale: float, q_I: Tensor, k_I: Tensor, w: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Choice]:
    """out, lse and kl of the blocks."""
    out, lse = x.new(VALUE, dtype=x.q.dtype), x.new(dtype=torch.float32)
    q_rows, k, w_rows = _padded(q_I, x.rows), k_I.contiguous(), _padded(w, x.rows)
    kl = torch.empty(x.rows, dtype=torch.float32, device=out.device)
    taken, buffers = list[Tensor](), None  # every strip uses the buffers, of which the first is the longest
    for part in x.parts(_kept(x, buffers=1)):
        blocks, queries, n = part.blocks, part.queries, len(part.u)
        if buffers is None:
            pitch = pitch_of(part.u.C)
            buffers = out.new_empty(n, HEADS, pitch), lse.new_empty(n, HEADS, pitch // TILE)
        p, top = buffers[0][:n], buffers[1][:n]
        forward(x.q[blocks], x.kv, part.keys, scale, out[blocks], lse[blocks], (p, top), part.folded)
        mass = _mass(part, p, x.H, top, lse[blocks])
        write_kl(part.u, mass, x.H, q_rows[queries], k, w_rows[queries], kl[queries])
        taken.append(part.taken)
    return (x.unfold(out), x.unfold(lse), kl), x.choice(taken)


def sparse_attention_kl(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
    q_I: Tensor, k_I: Tensor, w: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    of_blocks, choice = _forward_kl(Inputs(q_SHD, kv_TGE, indices_SK), scale, q_I, k_I, w)
    of_one = attention_kl.sparse_attention_kl(q_SHD, kv_TGE, choice.alone, scale, d_k, v_start, d_v, q_I, k_I, w)
    out, lse, kl = (choice.choose(a, b) for a, b in zip(of_blocks, of_one, strict=True))
    return out, lse, kl


def _kept(x: Inputs, buffers: int) -> int:
    """Bytes that a place of a list needs: probabilities, the queries' target and scores, and sums in order."""
    in_order = KEY * 4 if buffers > 1 and wanted_in_order() else 0
    return buffers * HEADS * x.q.element_size() + x.B * 2 * 4 + in_order


def _backward_by_parts(
    x: Inputs, dout_SHV: Tensor, dlse_SH: Tensor | None, out_SHV: Tensor, lse_SH: Tensor, scale: float, dq: Tensor,
    dkv: Tensor,
) -> Iterator[tuple[Part, Tensor]]:  # fmt: skip
    """Writes dq (blocks, 128, 576), adds to dkv (T, 576) float32, and yields the probabilities of each strip."""
    dout = dout_SHV.to(out_SHV.dtype).contiguous()
    dlse = None if dlse_SH is None else dlse_SH.contiguous()
    delta = x.fold(delta_of(dout, out_SHV.contiguous(), dlse))
    dout, lse = x.fold(_finite(dout)), x.fold(lse_SH)
    buffer = None  # every strip uses it, of which the first is the longest
    for part in x.parts(_kept(x, buffers=2)):
        blocks, n = part.blocks, len(part.u)
        if buffer is None:
            buffer = dout.new_empty(2, n, HEADS, pitch_of(part.u.C))
        p, ds = buffer[:, :n]
        probabilities_and_dq(
            dout[blocks], x.q[blocks], x.kv, part.keys, lse[blocks], delta[blocks], scale, dq[blocks], p, ds,
            part.folded,
        )  # fmt: skip
        if wanted_in_order():
            sums = dkv.new_empty(n * part.u.C, KEY)
            add_dkv(p, ds, dout[blocks], x.q[blocks], part.keys, sums, x.T, in_order=True)
            add_in_order(dkv, part.keys, sums)
        else:
            add_dkv(p, ds, dout[blocks], x.q[blocks], part.keys, dkv, x.T)
        yield part, p


def _backward(
    x: Inputs, dout_SHV: Tensor, dlse_SH: Tensor | None, out_SHV: Tensor, lse_SH: Tensor, scale: float, dkv: Tensor
) -> tuple[Tensor, Choice]:
    """dq of the blocks, whose share is added to dkv."""
    dq = x.new(KEY, dtype=x.q.dtype)
    parts = _backward_by_parts(x, dout_SHV, dlse_SH, out_SHV, lse_SH, scale, dq, dkv)
    choice = x.choice([part.taken for part, _ in parts])
    return x.unfold(dq), choice


def sparse_attention_backward(
    dout_SHV: Tensor, dlse_SH: Tensor | None, out_SHV: Tensor, lse_SH: Tensor, q_SHD: Tensor, kv_TGE: Tensor,
    indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, dkv = Inputs(q_SHD, kv_TGE, indices_SK), kv_TGE.new_zeros(len(kv_TGE), KEY, dtype=torch.float32)
    of_blocks, choice = _backward(x, dout_SHV, dlse_SH, out_SHV, lse_SH, scale, dkv)
    q, kv = q_SHD.contiguous(), aligned(kv_TGE)
    dq = torch.empty_like(q)
    for _ in attention.backward_by_strips(dout_SHV, dlse_SH, q, kv, choice.alone, out_SHV, lse_SH, scale, dq, dkv):
        pass
    return choice.choose(of_blocks, dq), dkv.to(kv.dtype).view_as(kv)


def _backward_kl(
    x: Inputs, dout_SHV: Tensor, dlse_SH: Tensor | None, dkl_S: Tensor, out_SHV: Tensor, lse_SH: Tensor, scale: float,
    q_I: Tensor, k_I: Tensor, w: Tensor, dkv: Tensor, dk_I: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], Choice]:  # fmt: skip
    """dq, dq_I and dw of the blocks, whose shares are added to dkv and dk_I."""
    taken = list[Tensor]()
    q_rows, w_rows, dkl_rows = _padded(q_I, x.rows), _padded(w, x.rows), _padded(dkl_S, x.rows)
    dq, dq_I, dw = x.new(KEY, dtype=x.q.dtype), torch.empty_like(q_rows), torch.empty_like(w_rows)
    for part, p in _backward_by_parts(x, dout_SHV, dlse_SH, out_SHV, lse_SH, scale, dq, dkv):
        queries = part.queries
        index = (q_rows[queries], k_I, w_rows[queries])
        slopes = kl_slopes(part.u, _mass(part, p, x.H), x.H, dkl_rows[queries], *index)
        index_gradients(part.u, *index, slopes, dq_I[queries], dk_I, dw[queries])
        taken.append(part.taken)
    return (x.unfold(dq), dq_I, dw), x.choice(taken)


def sparse_attention_kl_backward(
    dout_SHV: Tensor, dlse_SH: Tensor | None, dkl_S: Tensor, out_SHV: Tensor, lse_SH: Tensor, q_SHD: Tensor,
    kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int,
    q_I: Tensor, k_I: Tensor, w: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, q_I, k_I, w = Inputs(q_SHD, kv_TGE, indices_SK), aligned(q_I), aligned(k_I), aligned(w)
    dkv, dk_I = (a.new_zeros(a.shape[0], a.shape[-1], dtype=torch.float32) for a in (kv_TGE, k_I))
    of_blocks, choice = _backward_kl(x, dout_SHV, dlse_SH, dkl_S, out_SHV, lse_SH, scale, q_I, k_I, w, dkv, dk_I)
    q, kv = q_SHD.contiguous(), aligned(kv_TGE)
    dq = torch.empty_like(q)
    dq_I, dk_of_one, dw = attention_kl.gradients(
        dout_SHV, dlse_SH, dkl_S, out_SHV, lse_SH, q, kv, choice.alone, scale, q_I, k_I, w, dq, dkv
    )
    dq, dq_I, dw = (choice.choose(a, b) for a, b in zip(of_blocks, (dq, dq_I, dw), strict=True))
    return dq, dkv.to(kv.dtype).view_as(kv), dq_I, dk_I.add_(dk_of_one).to(k_I.dtype), dw
