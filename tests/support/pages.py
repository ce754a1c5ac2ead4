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

LENS = (0, 1, 63, 64, 65, 150, 129)  # the last two begin alike
P = 4
K = 6
SCALE = 0.125
KINDS = ("fp8", "bfloat16", "float16", "float32")
PLAIN = {"latent": 24, "rope": 8, "index": 16}
FP8 = {"latent": quant.LATENT_WIDTH, "rope": quant.ROPE_WIDTH, "index": quant.INDEX_WIDTH}


@dataclass(frozen=True)
class Pool:
    """A decode step of a batch. `entries` and `keys` are what the pages hold of each sequence, in float32."""

    q: Tensor
    latent_pages: Tensor
    indices: Tensor
    q_I: Tensor
    index_pages: Tensor
    w: Tensor
    page_table: Tensor
    lens: Tensor
    d_v: int
    n: int
    entries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]

    def index_arguments(self) -> tuple[Tensor, ...]:
        return self.q_I, self.index_pages, self.w, self.page_table, self.lens

    def scores(self, **how) -> Tensor:
        return ops.index_scores_paged(*self.index_arguments(), **how)

    def attention(self, **how) -> tuple[Tensor, Tensor]:
        arguments = self.q, self.latent_pages, self.indices, self.page_table, self.lens, SCALE
        return ops.sparse_attention_paged(*arguments, d_v=self.d_v, **how)

    def to(self, device: str) -> "Pool":
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def queries(self) -> list[tuple[int, int, int]]:
        """(query, sequence, tokens that it sees), counted one by one."""
        each = [(b, j) for b in range(len(self.lens)) for j in range(self.n)]
        return [(t, b, max(0, int(self.lens[b]) - self.n + 1 + j)) for t, (b, j) in enumerate(each)]


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    width = torch.empty((), dtype=dtype).element_size()
    return torch.full((*shape[:-1], shape[-1] * width), 0xFF, dtype=torch.uint8).view(dtype)


def empty_pools(pages: int, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "fp8":
        return garbage(pages, 64, 656, dtype=torch.uint8), garbage(pages, 8448, dtype=torch.uint8)
    dtype = getattr(torch, kind)
    return garbage(pages, 64, 32, dtype=dtype), garbage(pages, 64, 16, dtype=dtype)


def fill(pool: Tensor, page: int, count: int, latent: Tensor, rope: Tensor) -> Tensor:
    """Writes `count` tokens of a latent page, whole pages at a time; returns what it holds of them, in float32."""
    if pool.dtype != torch.uint8:
        pool[page, :count] = torch.cat((latent, rope), -1).to(pool.dtype)
        return pool[page, :count].float()
    room = torch.zeros(1, 64 - count, 576).split((512, 64), -1)
    packed = quant.pack_latent_page(*(torch.cat((x[None], r), 1) for x, r in zip((latent, rope), room, strict=True)))
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
    lens: tuple[int, ...] = LENS,
    dtype: str = "float32",
    heads: int = 3,
    places: int = K,
    P: int = P,
) -> Pool:
    g = torch.Generator().manual_seed(len(kind) + n)
    widths = FP8 if kind == "fp8" else PLAIN
    B, H, E = len(lens), heads, widths["latent"] + widths["rope"]
    pages = B * P + 3
    latent_pages, index_pages = empty_pools(pages, kind)
    table = torch.full((B, P), 1 << 30, dtype=torch.int32)  # what no sequence reads names no page
    free = torch.randperm(pages, generator=g).tolist()
    entries, keys, scales = [], [], []
    for b, length in enumerate(lens):
        own: list[list] = [[], [], []]
        for i in range(math.ceil(length / 64)):
            count = min(64, length - 64 * i)
            shared = b > 0 and i == 0 and length > 64 and lens[b - 1] > 64
            table[b, i] = table[b - 1, 0] if shared else free.pop()
            if shared:
                parts = entries[b - 1][:64], keys[b - 1][:64], None if scales[b - 1] is None else scales[b - 1][:64]
            else:
                drawn = [torch.randn(count, width, generator=g) for width in widths.values()]
                held = fill(latent_pages, int(table[b, i]), count, *drawn[:2])
                parts = held, *fill_index(index_pages, int(table[b, i]), count, drawn[2])
            for kept, part in zip(own, parts, strict=True):
                kept.append(part)
        entries.append(torch.cat(own[0]) if length else torch.zeros(0, E))
        keys.append(torch.cat(own[1]) if length else torch.zeros(0, widths["index"]))
        scales.append(torch.cat(own[2]) if length and kind == "fp8" else None)
    S = B * n
    draw = torch.randn(S, H, E + widths["index"] + 1, generator=g).to(getattr(torch, dtype))
    made = Pool(
        q=draw[..., :E],
        latent_pages=latent_pages,
        indices=torch.full((S, places), -1, dtype=torch.int32),
        q_I=draw[..., E:-1],
        index_pages=index_pages,
        w=draw[..., -1] * 0.1,
        page_table=table,
        lens=torch.tensor(lens, dtype=torch.int32),
        d_v=widths["latent"],
        n=n,
        entries=tuple(entries),
        keys=tuple(keys),
        scales=tuple(scales),
    )
    for t, _, seen in made.queries():
        chosen = torch.randperm(seen, generator=g)[:places].sort().values
        made.indices[t, : len(chosen)] = chosen.int()
    return made


def new_tokens(N: int, kind: str, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, width, generator=g) for width in (FP8 if kind == "fp8" else PLAIN).values())


def raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)
