"""The engine on this machine: many requests at once, and how long each waits.

    python benchmarks/engine.py [--model NAME] [--requests 1 8 32] [--prompt 512] [--new 64] [--out FILE]

Requests arrive all at once, with prompts from Python's standard library that share no beginning. Told are generated
tokens a second, the time to a request's first token and between its tokens (median and 99th percentile), and the
pages that were used. Table to standard output, figures to a JSON file.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import tokensieve
from tokensieve.data import read_documents
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.machine import choose_device
from tokensieve.report.where import environment

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    requests: int
    prompt: int
    new: int
    seconds: float
    tokens_per_second: float
    first_p50: float  # seconds to the first token
    first_p99: float
    next_p50: float  # seconds between two tokens of a request
    next_p99: float
    pages: int


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def prompts(model: str, count: int, length: int) -> list[tuple[int, ...]]:
    tokenizer, ids = tokensieve.load_tokenizer(model), []
    for document in read_documents("python", "held_out", limit_bytes=100 * count * length):
        ids += tokenizer(document.text, add_special_tokens=False).input_ids
        if len(ids) >= count * length:
            break
    return [tuple(ids[i * length : (i + 1) * length]) for i in range(count)]


def measure(engine: Engine, given: list[tuple[int, ...]], new: int) -> Row:
    begin = time.perf_counter()
    for i, prompt in enumerate(given):
        engine.add(Request(str(i), prompt, Sampling(max_tokens=new, ignore_eos=True)))
    said: dict[str, list[float]] = {str(i): [] for i in range(len(given))}
    pages = 0
    while engine.busy:
        outputs = engine.step()
        now = time.perf_counter() - begin
        pages = max(pages, engine.scheduler.pool.used)
        for output in outputs:
            said[output.id].append(now)
    seconds = time.perf_counter() - begin
    first = [times[0] for times in said.values()]
    between = [b - a for times in said.values() for a, b in itertools.pairwise(times)]
    return Row(
        len(given),
        len(given[0]),
        new,
        seconds,
        sum(map(len, said.values())) / seconds,
        statistics.median(first),
        percentile(first, 0.99),
        statistics.median(between),
        percentile(between, 0.99),
        pages,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="sparse")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine.json")
    options = parser.parse_args()
    device = choose_device("auto")
    model = tokensieve.load(options.model, torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    engine = Engine(model, tokensieve.load_tokenizer(options.model), EngineConfig(prefix_cache=False))
    given = prompts(options.model, max(options.requests), options.prompt)
    measure(engine, given[:1], 4)  # what runs once
    rows = []
    for count in options.requests:
        rows.append(measure(engine, given[:count], options.new))
        print(f"{count} requests: {rows[-1].seconds:.1f} s", file=sys.stderr)
    table = Table("requests", "tokens/s", "first, p50 and p99 s", "next, p50 and p99 ms", "pages")
    for row in rows:
        table.add_row(
            str(row.requests), f"{row.tokens_per_second:.0f}", f"{row.first_p50:.2f}  {row.first_p99:.2f}",
            f"{1000 * row.next_p50:.0f}  {1000 * row.next_p99:.0f}", str(row.pages),
        )  # fmt: skip
    Console(width=120).print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"run": environment(), "model": options.model, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
