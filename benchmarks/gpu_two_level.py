"""Selection in two levels (`index_topk_blocks`) beside selection in one (`index_topk`), on one GPU.

    python benchmarks/gpu_two_level.py [--out FILE] [--quick]

The last 4096 queries of 32K and of 128K keys, causal, 64 and 16 index heads of 128, FP8 and bf16, k = 2048. A query
looks into 64 blocks of 128 keys. One level is as `auto` has it; two levels are our portable kernels, with the time of
each stage. All are timed in CUDA graphs, in the same run. Keys, before they are rounded:

random    independent of one another, so that a block's mean says little about its keys: the worst case
drifting  x[s] = r x[s-1] + sqrt(1 - r^2) e[s], whose correlation falls to 1/e over eight blocks

IoU is the intersection over the union of a query's two selections, the mean of all queries. Compared are a few queries'
selections with the reference's, whose sums have another order (IoU too), and, with room for every block, with those of
one level, which must be equal. --quick is small, and runs on the CPU by the reference as well.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import quantized, replayed
from torch import Tensor

from tokensieve import ops
from tokensieve.report.origin import environment

ROOT = Path(__file__).parents[1]
WIDTH = 128
DRIFT = 8  # blocks over which drifting keys lose their correlation
FEW = 64  # queries that are compared
LEAST_IOU = 0.99  # with the reference: keys whose scores are within rounding of the k-th may differ


@dataclass(frozen=True)
class Sizes:
    queries: int
    lengths: tuple[int, ...]
    heads: tuple[int, ...]
    k: int
    block: int
    blocks: int


FULL = Sizes(4096, (32768, 131072), (64, 16), 2048, 128, 64)
QUICK = Sizes(FEW, (2048,), (4,), 64, 32, 8)


@dataclass
class Row:
    """Milliseconds of one shape and kind of keys, and how alike the selections are."""

    keys: str
    precision: str
    heads: int
    tokens: int
    one_level: float
    two_levels: float
    iou: float
    reference_iou: float
    same_with_all_blocks: bool
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def faster(self) -> float:
        return self.one_level / self.two_levels

    @property
    def wrong(self) -> bool:
        return not (self.same_with_all_blocks and self.reference_iou >= LEAST_IOU)


def drifting(noise_TD: Tensor, memory: float) -> Tensor:
    """The AR(1) process of unit variance that forgets over `memory` keys: partial sums, doubled in length each time."""
    r, T, step = math.exp(-1 / memory), len(noise_TD), 1
    x_TD = noise_TD * (1 - r * r) ** 0.5
    x_TD[0] = noise_TD[0]
    while step < T:
        x_TD = x_TD + r**step * F.pad(x_TD, (0, 0, step, 0))[:T]
        step *= 2
    return x_TD


def inputs(sizes: Sizes, kind: str, precision: str, heads: int, T: int, device: torch.device) -> tuple[Any, ...]:
    """q, k, w, starts, ends, k_scale."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, w = normal(sizes.queries, heads, WIDTH), normal(T, WIDTH), normal(sizes.queries, heads)
    k = drifting(k, DRIFT * sizes.block) if kind == "drifting" else k
    w = w / (heads * WIDTH) ** 0.5
    ends = torch.arange(T - sizes.queries + 1, T + 1, device=device, dtype=torch.int32)
    if precision == "fp8":
        q, k, w, k_scale = quantized(q, k, w)
        return q, k, w, torch.zeros_like(ends), ends, k_scale
    return q.bfloat16(), k.bfloat16(), w, torch.zeros_like(ends), ends, None


def overlap(a_SK: Tensor, b_SK: Tensor) -> float:
    """The mean over queries of the intersection over the union of two selections."""
    both = torch.cat((a_SK, b_SK), 1).sort(1).values
    common = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
    return float((common / ((both >= 0).sum(1) - common)).mean())


def milliseconds(step: Callable[[], Any], device: torch.device, quick: bool) -> float:
    if device.type == "cuda":
        return replayed(step, quick)
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def stages(sizes: Sizes, given: tuple[Any, ...], quick: bool) -> dict[str, float]:
    """Milliseconds of each stage of the portable kernels."""
    from tokensieve.ops.reference.two_level import candidates, inner_blocks
    from tokensieve.ops.triton import index, topk, two_level

    q, k, w, starts, ends, k_scale = given
    inner = inner_blocks(starts, ends, sizes.block)
    means, scale = two_level.block_means(k, k_scale, sizes.block)
    of_blocks = index.index_scores(q, means, w, *inner, scale)
    best = topk.select_topk(of_blocks, sizes.blocks - 2, *inner)
    found = candidates(best, starts, ends, sizes.block)
    of_keys = two_level.candidate_scores(q, k, w, k_scale, found, sizes.block)
    steps: dict[str, Callable[[], Any]] = {
        "means": lambda: two_level.block_means(k, k_scale, sizes.block),
        "scores of blocks": lambda: index.index_scores(q, means, w, *inner, scale),
        "best blocks": lambda: topk.select_topk(of_blocks, sizes.blocks - 2, *inner),
        "candidates": lambda: candidates(best, starts, ends, sizes.block),
        "scores of keys": lambda: two_level.candidate_scores(q, k, w, k_scale, found, sizes.block),
        "best keys": lambda: topk.select_topk(of_keys, sizes.k, found.firsts_S, found.lasts_S),
    }
    return {name: replayed(step, quick) for name, step in steps.items()}


def measured(sizes: Sizes, row: tuple[str, str, int, int], device: torch.device, quick: bool) -> Row:
    given = inputs(sizes, *row, device)
    T, how = row[-1], "triton" if device.type == "cuda" else "reference"
    q, k, w, starts, ends, k_scale = given

    def one_level(few: slice = slice(None), backend: str = "auto") -> Tensor:
        return ops.index_topk(q[few], k, w[few], sizes.k, starts[few], ends[few], k_scale, backend=backend)

    def two_levels(few: slice = slice(None), backend: str = how, blocks: int = sizes.blocks) -> Tensor:
        operands = (q[few], k, w[few], sizes.k, starts[few], ends[few], k_scale)
        return ops.index_topk_blocks(*operands, block=sizes.block, blocks=blocks, backend=backend)

    few = slice(0, sizes.queries, sizes.queries // FEW)
    found = two_levels()
    return Row(
        *row,
        one_level=milliseconds(one_level, device, quick),
        two_levels=milliseconds(two_levels, device, quick),
        iou=overlap(one_level(), found),
        reference_iou=overlap(two_levels(few, "reference"), found[few]),
        same_with_all_blocks=torch.equal(two_levels(few, blocks=T // sizes.block + 1), one_level(few, how)),
        stages=stages(sizes, given, quick) if device.type == "cuda" else {},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_two_level.json")
    parser.add_argument("--quick", action="store_true", help="small sizes, also without a GPU")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.quick):
        print("gpu_two_level: torch sees no CUDA device here; --quick runs without one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, rows = QUICK if options.quick else FULL, list[Row]()
    for heads in sizes.heads:
        for precision in ("fp8", "bf16"):
            for T in sizes.lengths:
                for kind in ("random", "drifting"):
                    row = measured(sizes, (kind, precision, heads, T), device, options.quick)
                    rows.append(row)
                    print(f"{row}\nfaster than one level: {row.faster:.2f}" + ("  wrong" if row.wrong else ""))
                    figures = {"run": environment(), "sizes": asdict(sizes), "rows": [asdict(row) for row in rows]}
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
