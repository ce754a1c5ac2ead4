"""Sparse attention of one layer with few heads to a group, beside dense attention, on one GPU.

    python benchmarks/gpu_few_heads.py [--lengths 32768 65536 131072] [--hopper] [--out FILE]
    python benchmarks/gpu_few_heads.py --model sparse [--tokens 8192] [--hopper] [--out FILE]

Forward and backward with the indexer's loss, index and selection included, k = 2048 (512 at a head width of 64). The
peer is cuDNN's attention, forward and backward, in the same run. Selections are drawn, since random tensors select at
random:

near    neighbouring queries select nearly the same keys, as measured on real text (`NEAR`)
diffuse as in the layers where they differ most (`DIFFUSE`)
random  every query selects on its own, as no model does: the worst case

With `--model` selections are those of a sparse model's layers instead, on modules of Python itself (`TEXT`), and shapes
have its k.

Where a query sees fewer keys than the pools hold they are narrower, as selections on real text are. The sizes of the
unions that were drawn are printed. Results of the smallest length are compared with the kernels that take one query a
program, which are timed there too. With `--hopper` blocks of queries go to the kernels in Gluon, whose results are
compared alike. With `--kernels` the time of each kernel is printed, both ways together.
"""

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from gpu import long_milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokensieve
from tokensieve import ops
from tokensieve.config import KL_BLOCK
from tokensieve.model import load_tokenizer
from tokensieve.ops.hopper import selected as hopper_selected
from tokensieve.ops.triton import attention, attention_kl, union_attention, union_kl
from tokensieve.report.origin import environment

ROOT = Path(__file__).parents[1]

# Shares of a query's places, by the number of keys among which such a place changes from query to query; the others
# stay. Fitted to the unions of B neighbouring queries that were measured on real text, in units of k:
#     B        2     4     8     16    32    64    128
#     NEAR     1.17  1.36  1.59  1.82  2.15  2.57  3.21
#     DIFFUSE  1.67  2.70  4.02  5.30  6.50  7.60  8.57
NEAR = {2: 0.1869, 6: 0.0505, 16: 0.0131, 32: 0.0095, 256: 0.003, 512: 0.0088}
DIFFUSE = {4: 0.2734, 6: 0.3451, 8: 0.0422, 16: 0.0546, 32: 0.0652, 64: 0.0163, 128: 0.0011, 256: 0.0028, 512: 0.0059}
SELECTIONS = {"near": NEAR, "diffuse": DIFFUSE, "random": None}
TEXT = (argparse, typing, subprocess)  # modules
BLOCK = 128  # queries that draw from one pool
KEPT = 0.5  # of a pool, from block to block
DIFFERENCE = 1e-2  # both round probabilities to bf16, in another order of sums


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    groups: int
    width: int  # of keys and values; 576 is MLA's latent entry, whose first 512 are the value
    index_heads: int
    index_width: int
    k: int

    @property
    def is_mla(self) -> bool:
        return self.width == 576

    @property
    def parts(self) -> tuple[float, int, int, int]:
        """scale, d_k, v_start, d_v."""
        return (192**-0.5, 576, 0, 512) if self.is_mla else (self.width**-0.5, self.width, self.width, self.width)


SHAPES = (
    Shape("32 heads, 8 groups x 128", 32, 8, 128, 16, 128, 2048),
    Shape("16 heads, 2 groups x 128", 16, 2, 128, 8, 128, 2048),
    Shape("9 heads, 3 groups x 64", 9, 3, 64, 4, 64, 512),
    Shape("MLA, 16 heads", 16, 1, 576, 16, 128, 2048),
    Shape("MLA, 64 heads", 64, 1, 576, 32, 128, 2048),
)


def draw(S: int, k: int, places: dict[int, float] | None, device: torch.device) -> Tensor:
    """(S, k) int32 selections of a causal pack, ascending, then -1. places None: every query on its own."""
    generator = torch.Generator(device).manual_seed(0)
    counts = [round(share * k) for share in (places or {}).values()]
    width = torch.ones(k, dtype=torch.int64, device=device)  # keys of each place's pool
    width[: sum(counts)] = torch.repeat_interleave(
        torch.tensor(list(places or {1: 0}), device=device), torch.tensor(counts or [0], device=device)
    )
    most, margin = int(width.sum()), k // 64
    rounding = torch.arange(k, device=device) * 0.618 % 1  # of single places, which are even in the sum
    selected = torch.full((S, k), -1, dtype=torch.int32, device=device)
    pool = torch.empty(0, dtype=torch.int64, device=device)
    for first in range(0, S, BLOCK):
        rows = min(BLOCK, S - first)
        past = first + 1  # keys that all of the block's queries see
        if past < k:
            keys = torch.arange(k, device=device, dtype=torch.int32).expand(rows, k)
            own = torch.arange(first, first + rows, device=device)[:, None]
            selected[first : first + rows] = torch.where(keys <= own, keys, -1)
        elif places is None:
            scores = torch.rand(rows, past, generator=generator, device=device)
            selected[first : first + rows] = scores.topk(k, 1).indices.sort(1).values.int()
        else:
            part = min(1.0, max(0, past - k - margin) / (most - k))  # of the pools, if there are fewer keys
            now = 1 + ((width - 1) * part + rounding).long()
            size = int(now.sum())
            stays = torch.rand(len(pool), generator=generator, device=device) < KEPT
            fresh = torch.randperm(past, generator=generator, device=device)
            others = fresh[~torch.isin(fresh, pool)]
            more, others = others.split([size - len(pool), past - size])
            change = (~stays).nonzero()[: len(others), 0]  # drawn anew, from what the pool does not hold
            pool = torch.cat([pool.index_copy(0, change, others[: len(change)]), more])
            offset = (torch.rand(rows, k, generator=generator, device=device) * now).long()
            selected[first : first + rows] = pool[now.cumsum(0) - now + offset].sort(1).values.int()
    return selected


def captured(folder: str, tokens: int, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Selections of each layer of a sparse model, as `draw` gives them, and its k."""
    model, tokenizer = tokensieve.load(folder).to(device), load_tokenizer(folder)
    text = "".join(inspect.getsource(module) for module in TEXT)
    ids = torch.tensor([tokenizer.encode(text)[:tokens]], device=device)
    if ids.shape[1] < tokens:
        sys.exit(f"gpu_few_heads: the text has {ids.shape[1]} tokens; give --tokens so many at most")
    with torch.inference_mode():
        found = model(ids, return_selection=True, logits_to_keep=1).selection
    chosen = {f"layer {i}": s[0] for i, s in enumerate(found) if s is not None}
    last = torch.iinfo(torch.int32).max
    ordered = {name: torch.where(s < 0, last, s).sort(1).values for name, s in chosen.items()}
    return {name: torch.where(s == last, -1, s).int() for name, s in ordered.items()}, model.top_k


def unions(selected: Tensor, B: int) -> float:
    """Keys that B neighbouring queries select together, in units of k, in the second half."""
    S, k = selected.shape
    firsts = range(S // 2 // B * B, S - B + 1, max(B, S // 64 // B * B))
    return statistics.fmean(len(selected[a : a + B].unique()) / k for a in firsts)


@dataclass
class Row:
    """Milliseconds of one shape, length and kind of selection."""

    shape: str
    tokens: int
    selection: str
    unions: dict[int, float]  # keys that so many neighbouring queries select together, in units of k
    dense_forward: float
    dense: float  # both ways
    index: float  # scores and selection
    forward: float  # with the KL
    backward: float
    some: tuple[float, float]  # forward and backward with the KL at every fourth block of queries (`kl_every = 4`)
    one_query: tuple[float, float] | None = None  # forward and backward of the kernels that take one query a program

    @property
    def faster(self) -> float:
        return self.dense / (self.index + self.forward + self.backward)

    @property
    def faster_with_some(self) -> float:
        return self.dense / (self.index + sum(self.some))


def dense(shape: Shape, S: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of cuDNN's attention, forward, and both ways. MLA trains with heads expanded to 192 and 128."""
    D, V, G = (192, 128, shape.heads) if shape.is_mla else (shape.width, shape.width, shape.groups)
    sizes = ((shape.heads, D), (G, D), (G, V))
    q, k, v = (
        torch.randn(1, n, S, width, device=device, dtype=torch.bfloat16, requires_grad=True) for n, width in sizes
    )
    dout = torch.randn(1, shape.heads, S, V, device=device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return long_milliseconds(lambda: forward().detach()), long_milliseconds(
        lambda: torch.autograd.grad(forward(), (q, k, v), dout)
    )


def operands(shape: Shape, S: int, device: torch.device) -> tuple[Tensor, ...]:
    """q, kv, q_I, k_I, w, dout, dkl."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

    _, d_k, v_start, d_v = shape.parts
    q, dout = normal(S, shape.heads, d_k), normal(S, shape.heads, d_v)
    kv = normal(S, shape.groups, max(d_k, v_start + d_v))
    q_I, k_I = normal(S, shape.index_heads, shape.index_width), normal(S, shape.index_width)
    w = normal(S, shape.index_heads).float() / (shape.index_heads * shape.index_width) ** 0.5
    return q, kv, q_I, k_I, w, dout, torch.full((S,), 1 / S, device=device)


@dataclass(frozen=True)
class Way:
    """The modules of one way of attention: with the KL, and without."""

    kl: ModuleType
    alone: ModuleType


def ways(shape: Shape, hopper: bool) -> tuple[Way, Way]:
    """Blocks of queries, and one query a program."""
    if not shape.is_mla:
        in_blocks = Way(hopper_selected, hopper_selected) if hopper else Way(union_kl, union_attention)
        return in_blocks, Way(attention_kl, attention)
    from tokensieve.ops.hopper import attention as of_one_query
    from tokensieve.ops.hopper import attention_kl as kl_of_one_query
    from tokensieve.ops.hopper import folded

    one_query = Way(kl_of_one_query, of_one_query)
    return (Way(folded, folded) if hopper and shape.heads in (16, 32) else one_query), one_query


def sparse(way: Way, shape: Shape, selected: Tensor, given: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds forward and backward."""
    q, kv, q_I, k_I, w, dout, dkl = given
    operands = (q, kv, selected, *shape.parts, q_I, k_I, w)
    out, lse, _ = way.kl.sparse_attention_kl(*operands)
    return (
        long_milliseconds(lambda: way.kl.sparse_attention_kl(*operands)),
        long_milliseconds(lambda: way.kl.sparse_attention_kl_backward(dout, None, dkl, out, lse, *operands)),
    )


def kernel_times(way: Way, shape: Shape, selected: Tensor, given: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of each kernel of the index, one forward and one backward, the longest first."""
    q, kv, q_I, k_I, w, dout, dkl = given
    operands = (q, kv, selected, *shape.parts, q_I, k_I, w)
    ends = torch.arange(1, len(q) + 1, dtype=torch.int32, device=q.device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        out, lse, _ = way.kl.sparse_attention_kl(*operands)
        way.kl.sparse_attention_kl_backward(dout, None, dkl, out, lse, *operands)
        ops.index_topk(q_I, k_I, w, shape.k, torch.zeros_like(ends), ends)
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / 1e3 for event in profiler.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def sparse_with_some(way: Way, shape: Shape, selected: Tensor, given: tuple[Tensor, ...]) -> tuple[float, float]:
    """As `sparse`, with the KL at every fourth block of queries; the copies of the queries are not counted."""
    q, kv, q_I, k_I, w, dout, dkl = given
    taught = torch.arange(len(q), device=q.device) // KL_BLOCK % 4 == 0
    a, b = (tuple(x[rows] for x in (q, selected, q_I, w, dout, dkl)) for rows in (taught, ~taught))
    forward, backward = sparse(way, shape, a[1], (a[0], kv, a[2], k_I, a[3], a[4], a[5]))
    others = (b[0], kv, b[1], *shape.parts)
    out, lse = way.alone.sparse_attention(*others)
    return (
        forward + long_milliseconds(lambda: way.alone.sparse_attention(*others)),
        backward + long_milliseconds(lambda: way.alone.sparse_attention_backward(b[4], None, out, lse, *others)),
    )


def index(shape: Shape, S: int, given: tuple[Tensor, ...]) -> float:
    """Milliseconds of equations (1) and (2)."""
    _, _, q_I, k_I, w, _, _ = given
    starts = torch.zeros(S, dtype=torch.int32, device=q_I.device)
    ends = torch.arange(1, S + 1, dtype=torch.int32, device=q_I.device)
    return long_milliseconds(lambda: ops.index_topk(q_I, k_I, w, shape.k, starts, ends))


def compared(both: tuple[Way, Way], shape: Shape, selected: Tensor, given: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative differences of two ways' results."""
    q, kv, q_I, k_I, w, dout, dkl = given
    found = []
    for way in both:
        more = (q, kv, selected, *shape.parts, q_I, k_I, w)
        out, lse, kl = way.kl.sparse_attention_kl(*more)
        found.append((out, lse, kl, *way.kl.sparse_attention_kl_backward(dout, None, dkl, out, lse, *more)))
    names = ("out", "lse", "kl", "dq", "dkv", "dq_I", "dk_I", "dw")
    return {
        name: float((a.double() - b.double()).norm() / b.double().norm())
        for name, a, b in zip(names, *found, strict=True)
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--out", type=Path, help="of the figures (gpu_few_heads.json or gpu_few_heads_hopper.json)")
    parser.add_argument("--hopper", action="store_true", help="Hopper's own kernels of blocks")
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel")
    parser.add_argument("--shapes", type=int, nargs="+", choices=range(len(SHAPES)), default=range(len(SHAPES)))
    parser.add_argument("--model", help="a sparse model whose selections are taken")
    parser.add_argument("--tokens", type=int, default=8192, help="that --model reads")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    options = parser.parse_args()
    out = options.out or ROOT / "benchmarks" / "results" / f"gpu_few_heads{'_hopper' * options.hopper}.json"
    if not torch.cuda.is_available():
        print("gpu_few_heads: torch sees no CUDA device here", file=sys.stderr)
        return 2
    device, rows, wrong = torch.device("cuda"), list[Row](), False
    differences: dict[str, dict[str, float]] = {}
    shapes, lengths, names = [SHAPES[i] for i in options.shapes], options.lengths, list(options.selections)
    layers: dict[str, Tensor] = {}
    if options.model is not None:
        layers, k = captured(options.model, options.tokens, device)
        shapes, lengths, names = [replace(shape, k=k) for shape in shapes], [options.tokens], list(layers)
    for shape in shapes:
        for S in lengths:
            dense_ms = dense(shape, S, device)
            given, (in_blocks, one_query) = operands(shape, S, device), ways(shape, options.hopper)
            scored = index(shape, S, given)
            for name in names:
                selected = layers[name] if layers else draw(S, shape.k, SELECTIONS[name], device)
                found = {B: unions(selected, B) for B in (2, 8, 32)}
                some = sparse_with_some(in_blocks, shape, selected, given)
                whole = sparse(in_blocks, shape, selected, given)
                row = Row(shape.name, S, name, found, *dense_ms, scored, *whole, some)
                times = kernel_times(in_blocks, shape, selected, given) if options.kernels else {}
                for kernel, ms in times.items():
                    print(f"{ms:9.2f} ms  {kernel[:100]}")
                if min(lengths) == S and in_blocks != one_query:
                    row.one_query = sparse(one_query, shape, selected, given)
                    differences[f"{shape.name}, {name}"] = compared((in_blocks, one_query), shape, selected, given)
                rows.append(row)
                print(f"{row}\nfaster than dense: {row.faster:.2f}, with kl_every = 4 {row.faster_with_some:.2f}")
                figures = {"run": environment(), "rows": [asdict(row) for row in rows], "differences": differences}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for what, found in differences.items():
        too_large = [name for name, value in found.items() if not value <= DIFFERENCE]  # NaN is
        wrong = wrong or bool(too_large)
        print(f"{what}: {found}" + (f"  wrong: {', '.join(too_large)}" if too_large else ""))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
