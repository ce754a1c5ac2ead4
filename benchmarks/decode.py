"""One more token at a long context on the CPU, beside transformers: the model's own generation, and the engine with 1
and with 8 requests.

    python benchmarks/decode.py [--context 16384] [--rounds 8] [--threads 2] [--out FILE]

The bundled sparse model, float32, the same weights for all, the same text in every cache (transformers' is filled in
chunks). They take turns, a few tokens each, of which the first is not counted: it finds the processor's caches full of
another's data. Told are medians of a step, and tokens a second over all requests. Table to standard output, figures to
a JSON file.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

import tokensieve
from tokensieve.data import read_documents
from tokensieve.engine.runner import Runner
from tokensieve.model import LatentCache
from tokensieve.report.origin import environment

ROOT = Path(__file__).resolve().parents[1]
CHUNK, IN_A_ROW, TOKEN = 512, 5, 300
REQUESTS = (1, 8)


def text(tokens: int) -> list[int]:
    tokenizer, ids = tokensieve.load_tokenizer("sparse"), []
    for document in read_documents("python", "test", limit_bytes=20 * tokens):
        ids += tokenizer(document.text, add_special_tokens=False).input_ids
        if len(ids) >= tokens:
            return ids[:tokens]
    raise SystemExit(f"decode: the held-out text has only {len(ids)} tokens; ask for a shorter --context")


def filled(model: Any, cache: Any, ids: list[int]) -> Callable[[], Any]:
    """A step of one token on a cache that holds `ids`."""
    for chunk in torch.tensor([ids]).split(CHUNK, 1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return lambda: model(torch.tensor([[TOKEN]]), past_key_values=cache, use_cache=True, logits_to_keep=1)


def engine_steps(model: Any, ids: list[int]) -> dict[str, Callable[[], Any]]:
    """Every sequence has a copy of the same pages, so that none finds them in the processor's cache."""
    each = -(-(len(ids) + 1) // 64)
    runner = Runner(model, each * max(REQUESTS))
    for a in range(0, len(ids), CHUNK):
        runner.chunk(ids[a : a + CHUNK], a, range(each), "indexer")
    for pool in (*runner.pools.latent, *runner.pools.index):
        for b in range(1, max(REQUESTS)):
            pool[b * each : (b + 1) * each] = pool[:each]
    pages = [list(range(b * each, (b + 1) * each)) for b in range(max(REQUESTS))]
    return {
        f"engine, {B} at once": lambda B=B: runner.step([TOKEN] * B, [len(ids) + 1] * B, pages[:B], "indexer")
        for B in REQUESTS
    }


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of a step."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for i in range(IN_A_ROW):
                begin = time.perf_counter()
                step()
                if i:
                    found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = text(options.context)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        own = tokensieve.load("sparse")
        tokensieve.save(own, Path(folder) / "model")
        other = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
        steps = {"transformers": filled(other, DynamicCache(config=other.config), ids)}
        print("transformers' cache is full", file=sys.stderr)
        steps["tokensieve, generate"] = filled(own, LatentCache(reserve=len(ids) + 1024), ids)
        steps |= engine_steps(own, ids)
        seconds = in_turns(steps, options.rounds)
    table, rows = Table("", "ms a step", "tokens/s", "times transformers'"), []
    for name, step in seconds.items():
        rate = int(name.split()[1]) / step if name.startswith("engine") else 1 / step
        rows.append(
            {"name": name, "ms": 1000 * step, "tokens_per_second": rate, "times": rate * seconds["transformers"]}
        )
        table.add_row(name, f"{1000 * step:.1f}", f"{rate:.1f}", f"{rate * seconds['transformers']:.2f}")
    Console(width=120).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"run": environment(), "context": options.context, "rows": rows}
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
