"""A pool of cache pages and a decode step that reads it, for the tests of the paged ops.

Every pool has its physical pages in a random order, two sequences that share their first page, and 0xFF (NaN in FP8, in
bfloat16, float16 and float32) wherever no token was written: in unused pages and after a sequence's last token.

Legend: as in cases.py; B sequences, n queries of each, P pages that a row of the page table names.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tests.support import interpreter  # noqa: F401  # makes it faster
from tokensieve import ops
from tokensieve.ops import quant

LENGTHS = (0, 1, 63, 64, 65, 150, 129)  # the last two begin alike
P = 4
K = 6
SCALE = 0.125
KINDS = ("fp8", "bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Layout:
    """Widths of an entry's two parts and of an index key. groups: None for MLA's entries, which have no group axis.

    Under MLA the key is the whole entry and the value its first part, else the two are key and value.
    """

    first: int
    second: int
    index: int
    groups: int | None = None

    @property
    def entry(self) -> int:
        return self.first + self.second

    @property
    def split(self) -> dict[str, int]:
        """How an entry is read: d_k, v_start and d_v."""
        if self.groups is None:
            return {"d_k": self.entry, "v_start": 0, "d_v": self.first}
        return {"d_k": self.first, "v_start": self.first, "d_v": self.second}

    @property
    def axes(self) -> tuple[int, ...]:
        return () if self.groups is None else (self.groups,)


PLAIN = Layout(24, 8, 16)
FP8 = Layout(quant.LATENT_WIDTH, quant.ROPE_WIDTH, quant.INDEX_WIDTH)


def layout_of(kind: str) -> Layout:
    return FP8 if kind == "fp8" else PLAIN


@dataclass(frozen=True)
class Pool:
    """A decode step of a batch. `entries` and `keys` are what the pages hold of each sequence, in float32."""

    q: Tensor
    entry_pages: Tensor
    indices: Tensor
    q_I: Tensor
    index_pages: Tensor
    w: Tensor
    page_table: Tensor
    lengths: Tensor
    split: dict[str, int]
    n: int
    entries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]

    def index_arguments(self) -> tuple[Tensor, ...]:
        return self.q_I, self.index_pages, self.w, self.page_table, self.lengths

    def scores(self, **how) -> Tensor:
        return ops.index_scores_paged(*self.index_arguments(), **how)

    def attention(self, **how) -> tuple[Tensor, Tensor]:
        arguments = self.q, self.entry_pages, self.indices, self.page_table, self.lengths, SCALE
        return ops.sparse_attention_paged(*arguments, **self.split, **how)

    @property
    def d_v(self) -> int:
        return self.split["d_v"]

    def to(self, device: str) -> "Pool":
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def queries(self) -> list[tuple[int, int, int]]:
        """(query, sequence, tokens that it sees), counted one by one."""
        each = [(b, j) for b in range(len(self.lengths)) for j in range(self.n)]
        return [(t, b, max(0, int(self.lengths[b]) - self.n + 1 + j)) for t, (b, j) in enumerate(each)]


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    width = torch.empty((), dtype=dtype).element_size()
    return torch.full((*shape[:-1], shape[-1] * width), 0xFF, dtype=torch.uint8).view(dtype)


def empty_pools(pages: int, kind: str, layout: Layout = PLAIN) -> tuple[Tensor, Tensor]:
    if kind == "fp8":
        return garbage(pages, 64, 656, dtype=torch.uint8), garbage(pages, 8448, dtype=torch.uint8)
    dtype = getattr(torch, kind)
    entries = garbage(pages, 64, *layout.axes, layout.entry, dtype=dtype)
    return entries, garbage(pages, 64, layout.index, dtype=dtype)


def fill(pool: Tensor, page: int, count: int, first: Tensor, second: Tensor) -> Tensor:
    """Writes `count` tokens of a page of entries; returns what it holds of them, in float32."""
    if pool.dtype != torch.uint8:
        pool[page, :count] = torch.cat((first, second), -1).to(pool.dtype)
        return pool[page, :count].float()
    room = torch.zeros(1, 64 - count, 576).split((512, 64), -1)
    packed = quant.pack_latent_page(*(torch.cat((x[None], r), 1) for x, r in zip((first, second), room, strict=True)))
    pool[page, :count] = packed[0, :count]
    return torch.cat(quant.unpack_latent_page(packed, torch.float32), -1)[0, :count]


def fill_index(pool: Tensor, page: int, count: int, k_I: Tensor) -> tuple[Tensor, Tensor | None]:
    if pool.dtype != torch.uint8:
        pool[page, :count] = k_I.to(pool.dtype)
        return pool[page, :count].clone(), None
    packed = quant.pack_index_page(torch.cat((k_I, torch.zeros(64 - count, 128)))[None])
    pool[page, : 128 * count] = packed[0, : 128 * count]
    pool[page, 8192 : 8192 + 4 * count] = packed[0, 8192 : 8192 + 4 * count]
    keys, scales = quant.unpack_index_page(packed)
    return keys[0, :count], scales[0, :count]


def make(
    kind: str = "float32",
    n: int = 1,
    lengths: tuple[int, ...] = LENGTHS,
    dtype: str = "float32",
    heads: int = 3,
    places: int = K,
    P: int = P,
    layout: Layout | None = None,
) -> Pool:
    g = torch.Generator().manual_seed(len(kind) + n)
    layout = layout or layout_of(kind)
    B, H, D = len(lengths), heads, layout.split["d_k"]
    pages = B * P + 3
    entry_pages, index_pages = empty_pools(pages, kind, layout)
    table = torch.full((B, P), 1 << 30, dtype=torch.int32)  # what no sequence reads names no page
    free = torch.randperm(pages, generator=g).tolist()
    entries, keys, scales = [], [], []
    for b, length in enumerate(lengths):
        held: list[list] = [[], [], []]
        for i in range(math.ceil(length / 64)):
            count = min(64, length - 64 * i)
            shared = b > 0 and i == 0 and length > 64 and lengths[b - 1] > 64
            table[b, i] = table[b - 1, 0] if shared else free.pop()
            if shared:
                parts = entries[b - 1][:64], keys[b - 1][:64], None if scales[b - 1] is None else scales[b - 1][:64]
            else:
                shapes = (*layout.axes, layout.first), (*layout.axes, layout.second), (layout.index,)
                drawn = [torch.randn(count, *shape, generator=g) for shape in shapes]
                written = fill(entry_pages, int(table[b, i]), count, *drawn[:2])
                parts = written, *fill_index(index_pages, int(table[b, i]), count, drawn[2])
            for pieces, part in zip(held, parts, strict=True):
                pieces.append(part)
        entries.append(torch.cat(held[0]) if length else torch.zeros(0, *layout.axes, layout.entry))
        keys.append(torch.cat(held[1]) if length else torch.zeros(0, layout.index))
        scales.append(torch.cat(held[2]) if length and kind == "fp8" else None)
    S = B * n
    draw = torch.randn(S, H, D + layout.index + 1, generator=g).to(getattr(torch, dtype))
    pool = Pool(
        q=draw[..., :D],
        entry_pages=entry_pages,
        indices=torch.full((S, places), -1, dtype=torch.int32),
        q_I=draw[..., D:-1],
        index_pages=index_pages,
        w=draw[..., -1] * 0.1,
        page_table=table,
        lengths=torch.tensor(lengths, dtype=torch.int32),
        split=layout.split,
        n=n,
        entries=tuple(entries),
        keys=tuple(keys),
        scales=tuple(scales),
    )
    for t, _, seen in pool.queries():
        chosen = torch.randperm(seen, generator=g)[:places].sort().values
        pool.indices[t, : len(chosen)] = chosen.int()
    return pool


def new_tokens(N: int, kind: str, seed: int = 0, layout: Layout | None = None) -> tuple[Tensor, ...]:
    """first, second and k_I of N tokens."""
    g = torch.Generator().manual_seed(seed)
    layout = layout or layout_of(kind)
    shapes = (*layout.axes, layout.first), (*layout.axes, layout.second), (layout.index,)
    return tuple(torch.randn(N, *shape, generator=g) for shape in shapes)


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
