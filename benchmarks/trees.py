"""Two checkouts of this project beside each other: whether a change has made anything slower.

    python benchmarks/trees.py BEFORE AFTER [--starts 5] [--threads 1]

BEFORE and AFTER are folders, made by `git worktree add FOLDER COMMIT`. One process for either tree holds the bundled
sparse model in float32. They take turns, call by call, so that a slow minute of the host falls on both. One process
can be a tenth faster than another of the same tree for as long as it lives, so that both are started several times.
Measured are a forward of 2048 tokens, a step of transformers' `generate` behind 2048 tokens, and in the engine a chunk
of 512 tokens and a step of one and of eight requests. The table shows medians over all calls, then for every start the
median of after / before over the pairs of neighbouring calls, and the geometric mean of these. Compare a tree with
itself to see what the host adds.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

CONTEXT, CHUNK, PAGE, TOKEN = 2048, 512, 64, 300
PAIRS = {
    "forward, 2048 tokens": 4,
    "generate, a step": 100,
    "engine, a chunk of 512": 10,
    "engine, a step of 1": 100,
    "engine, a step of 8": 50,
}


def calls(threads: int) -> dict[str, Callable[[], Any]]:
    import torch

    import tokensieve
    from tokensieve.engine.runner import Runner
    from tokensieve.model import LatentCache

    torch.set_num_threads(threads)
    model = tokensieve.load("sparse")
    ids = torch.randint(50, 4000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = LatentCache(reserve=CONTEXT + PAGE)
    pages = list(range(CONTEXT // PAGE + 1))
    runner = Runner(model, len(pages))

    def generate() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(CONTEXT)

    def chunk(begin: int = CONTEXT - CHUNK) -> None:
        runner.chunk(ids[0, begin : begin + CHUNK].tolist(), begin, pages, "indexer")

    def step(requests: int) -> None:
        runner.step([TOKEN] * requests, [CONTEXT + 1] * requests, [pages] * requests, "indexer")

    model(ids, past_key_values=cache, use_cache=True)
    for begin in range(0, CONTEXT, CHUNK):
        chunk(begin)
    return dict(zip(PAIRS, (lambda: model(ids), generate, chunk, lambda: step(1), lambda: step(8)), strict=True))


def answer(threads: int) -> None:
    """Runs the call that a line of standard input names, and prints its seconds."""
    import torch

    with torch.inference_mode():
        known = calls(threads)
        for line in sys.stdin:
            begin = time.perf_counter()
            known[line.strip()]()
            print(time.perf_counter() - begin, flush=True)


class Tree:
    def __init__(self, folder: Path, threads: int):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--answer", "--threads", str(threads)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def milliseconds(self, name: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        return 1e3 * float(self._process.stdout.readline() or sys.exit("trees: a tree failed; its error stands above"))

    def end(self) -> None:
        self._process.communicate()


def pair(trees: list[Tree], name: str, first: int) -> tuple[float, float]:
    """Milliseconds of both, `first` measured first."""
    found = {i: trees[i].milliseconds(name) for i in (first, 1 - first)}
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, metavar="BEFORE AFTER")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        return answer(options.threads)
    if len(options.trees) != 2:
        parser.error("name two folders")
    starts = [measured(options.trees, options.threads) for _ in range(options.starts)]
    print("| milliseconds | before | after | after / before | geometric mean |\n|---|---|---|---|---|")
    for name in PAIRS:
        before, after = (median(pair[i] for start in starts for pair in start[name]) for i in range(2))
        ratios = [median(b / a for a, b in start[name]) for start in starts]
        told = ", ".join(f"{x:.2f}" for x in ratios)
        print(f"| {name} | {before:.1f} | {after:.1f} | {told} | {geometric_mean(ratios):.3f} |")


def measured(folders: list[Path], threads: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of both trees, call by call, from processes of their own."""
    trees = [Tree(folder, threads) for folder in folders]
    found = {}
    for name, pairs in PAIRS.items():
        pair(trees, name, 0)  # not counted
        found[name] = [pair(trees, name, first=i % 2) for i in range(pairs)]
    for tree in trees:
        tree.end()
    return found


if __name__ == "__main__":
    main()
