"""Sparse attention on the CPU beside transformers: prefill, decode and memory, the same weights in the same run.

    make bench, or: python benchmarks/cpu.py [--model sparse] [--context 8192] [--threads 2] [--out FILE] [--quick]

The bundled sparse model (or the base with an untrained indexer, which costs the same) is saved to a temporary folder
and opened from there by both programs. Times are medians; the programs take turns, so that a machine that slows down
slows both. Memory is measured in a process of its own for each: the peak of the resident set during one prefill, less
the resident set after loading and a warm-up. transformers' cache is filled in chunks, since one pass over the context
needs several GB. Decode takes turns of five tokens, of which the first is not counted. The server's own share of a
request is that of /health, over a connection that is used again and over a new one. The table goes to standard output
and the figures to a JSON file, with the acceptance bounds; exit status 1 when one is missed.
"""

import argparse
import gc
import http.client
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import tokensieve
from tokensieve.engine import Engine, EngineConfig, Service
from tokensieve.machine import processor
from tokensieve.serve import server
from tokensieve.serve.settings import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("argparse", "ast", "inspect", "typing", "tarfile", "subprocess", "datetime", "pathlib", "decimal")
CHUNK = 1024  # tokens of one pass that fills a cache
SAMPLE_SECONDS = 0.001  # between two looks at the resident set
INDEXER = {"top_k": 128, "index_heads": 8, "index_dim": 32}  # of the demo, where no sparse model is bundled

# Tokens come one after the other: the first of a turn finds the processor's caches full of the other program's data.
TOKENS = {"in_a_row": 5, "cold": 1}

Step = Callable[[], Any]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="", help="sparse checkpoint or bundled name; empty: sparse, else base sparsified"
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens of the comparison")
    parser.add_argument("--short", type=int, default=2048, help="tokens of our own short decode")
    parser.add_argument("--long", type=int, default=16384, help="tokens of our own long decode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="prefills; decode takes ten times as many steps")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    parser.add_argument("--quick", action="store_true", help="small sizes and no bounds: does it run?")
    parser.add_argument("--memory-of", choices=("tokensieve", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.context, options.short, options.long, options.rounds = 512, 256, 1024, 1
    return options


# the two programs


def bundled_or_sparsified(name: str) -> tuple[Any, str]:
    if name:
        return tokensieve.load(name), name
    bundled = ROOT / "tokensieve" / "bundled" / "sparse"
    if bundled.is_dir():
        return tokensieve.load("sparse"), "sparse"
    return tokensieve.sparsify(tokensieve.load("base"), **INDEXER), "base with an untrained indexer"


def real_text(folder: Path, tokens: int) -> Tensor:
    """The first tokens (S,) of a few modules of the standard library."""
    encode, ids = tokensieve.load_tokenizer(folder), []
    while len(ids) < tokens:
        for name in TEXT:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None
            ids += encode(Path(spec.origin).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:tokens])


def ours(folder: Path) -> tuple[Any, Callable[[int], Any]]:
    return tokensieve.load(folder), lambda tokens: tokensieve.LatentCache(reserve=tokens)


def theirs(folder: Path) -> tuple[Any, Callable[[int], Any]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, lambda tokens: DynamicCache(config=model.config)


PROGRAMS = {"tokensieve": ours, "transformers": theirs}


def read(model: Any, ids_S: Tensor, cache: Any, chunk: int) -> Tensor:
    """Fills the cache; returns the last token's logits (V)."""
    out = None
    for part in ids_S[None].split(chunk, dim=1):
        out = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    assert out is not None
    return out.logits[0, -1]


def decode_step(model: Any, cache: Any, token: Tensor) -> None:
    model(token.view(1, 1), past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.crop(-1)


# time


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def in_turns(steps: dict[Any, Step], rounds: int, in_a_row: int = 1, cold: int = 0) -> dict[Any, float]:
    """Median seconds of each step. The steps take turns, each `in_a_row` times; the first `cold` of each turn do not
    count.
    """
    taken: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            taken[name] += [seconds(step) for _ in range(in_a_row)][cold:]
    return {name: statistics.median(times) for name, times in taken.items()}


@torch.inference_mode()
def times(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    ids = real_text(folder, options.long)
    prompt, token = ids[: options.context], ids[:1]
    programs = {name: program(folder) for name, program in PROGRAMS.items()}
    last = {name: read(model, prompt[:64], room(64), 64) for name, (model, room) in programs.items()}
    difference = float((last["tokensieve"] - last["transformers"]).abs().max())

    def prefill(model: Any, room: Callable[[int], Any]) -> Step:
        return lambda: read(model, prompt, room(options.context), options.context)

    progress(f"prefill of {options.context:,} tokens (transformers takes minutes)")
    prefills = in_turns({name: prefill(*both) for name, both in programs.items()}, options.rounds)

    progress("decode")
    caches = {}
    for name, (model, room) in programs.items():
        caches[name] = room(options.context + 64)
        read(model, prompt, caches[name], CHUNK)
    decodes = in_turns(
        {name: lambda m=model, c=caches[name]: decode_step(m, c, token) for name, (model, _) in programs.items()},
        4 * options.rounds,
        **TOKENS,
    )

    model, room = programs["tokensieve"]
    own = {}
    for tokens in (options.short, options.context, options.long):
        own[tokens] = room(tokens + 64)
        read(model, ids[:tokens], own[tokens], CHUNK)
    growth = in_turns(
        {n: lambda c=c: decode_step(model, c, token) for n, c in own.items()}, 8 * options.rounds, **TOKENS
    )
    return {
        "logits_difference": difference,
        "prefill_seconds": prefills,
        "decode_ms": {name: 1000 * value for name, value in decodes.items()},
        "own_decode_ms": {str(tokens): 1000 * value for tokens, value in growth.items()},
    }


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """Host and port of the model's server, in a thread."""
    tokenizer = tokensieve.load_tokenizer(folder)
    service = Service(Engine(tokensieve.load(folder), tokenizer, EngineConfig(pages=16, running=1)))
    with server.listen("127.0.0.1", 0) as listening:
        ready = threading.Event()
        running = server.make(service, tokenizer, ServeConfig("model"), ready.set)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert ready.wait(60), "the server does not start"
            yield listening.getsockname()
        finally:
            running.should_exit = True
            thread.join()


def request_ms(folder: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds of a request that asks nothing of the model."""

    def health(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", "/health")
        connection.getresponse().read()

    def new_connection() -> None:
        connection = http.client.HTTPConnection(*at)
        health(connection)
        connection.close()

    with serving(folder) as at:
        kept = http.client.HTTPConnection(*at)
        taken = in_turns({"kept": lambda: health(kept), "new": new_connection}, rounds, in_a_row=10, cold=5)
        kept.close()
    return {name: 1000 * value for name, value in taken.items()}


# memory


class PeakResident:
    """The largest resident set, in bytes, seen between enter and exit."""

    def __enter__(self) -> "PeakResident":
        self.process, self.peak, self.done = psutil.Process(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *failure: object) -> None:
        self.done.set()
        self.thread.join()


@torch.inference_mode()
def memory_of(name: str, folder: Path, context: int) -> dict[str, int]:
    """Bytes: resident after loading, and the peak above it during one prefill."""
    ids = real_text(folder, context)
    model, room = PROGRAMS[name](folder)
    read(model, ids[:64], room(64), 64)
    gc.collect()
    loaded = psutil.Process().memory_info().rss
    with PeakResident() as seen:
        read(model, ids, room(context), context)
    return {"loaded": loaded, "above": max(0, seen.peak - loaded)}


def measured_alone(name: str, folder: Path, options: argparse.Namespace) -> dict[str, int]:
    progress(f"memory of {name}")
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        name,
        "--folder",
        str(folder),
        "--threads",
        str(options.threads),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [*command, "--context", str(options.context)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout.splitlines()[-1])


# report


def criteria(figures: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to hold, as ratios: each row says at least (or at most) which bound."""
    prefill, decode, memory = figures["prefill_seconds"], figures["decode_ms"], figures["memory_bytes"]
    own = figures["own_decode_ms"]
    rows = [
        (
            f"prefill of {options.context:,} tokens, times faster",
            prefill["transformers"] / prefill["tokensieve"],
            ">=",
            4,
        ),
        (
            f"decode after {options.context:,} tokens, times faster",
            decode["transformers"] / decode["tokensieve"],
            ">=",
            5,
        ),
        (
            "peak memory of that prefill, share of transformers'",
            memory["tokensieve"]["above"] / max(1, memory["transformers"]["above"]),
            "<=",
            1 / 3,
        ),
        (
            f"own decode after {options.long:,} tokens, times that after {options.short:,}",
            own[str(options.long)] / own[str(options.short)],
            "<=",
            1.3,
        ),
        ("a request over a connection that is used again, ms", figures["request_ms"]["kept"], "<=", 5),
    ]
    return [
        {
            "name": name,
            "value": value,
            "bound": f"{sign} {bound:.3g}",
            "met": value >= bound if sign == ">=" else value <= bound,
        }
        for name, value, sign, bound in rows
    ]


def show(figures: dict[str, Any], options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(
        "float32, batch 1", "transformers", "tokensieve", title=f"{figures['model']}, {options.threads} threads"
    )
    both = ("transformers", "tokensieve")
    table.add_row(f"prefill of {options.context:,} tokens", *(f"{figures['prefill_seconds'][n]:.2f} s" for n in both))
    table.add_row(f"decode after {options.context:,}, per token", *(f"{figures['decode_ms'][n]:.1f} ms" for n in both))
    memory = figures["memory_bytes"]
    table.add_row("prefill, peak above the loaded model", *(f"{memory[n]['above'] / 2**20:,.0f} MiB" for n in both))
    for tokens, value in figures["own_decode_ms"].items():
        table.add_row(f"decode after {int(tokens):,}, per token", "", f"{value:.1f} ms")
    for connection, value in figures["request_ms"].items():
        table.add_row(f"/health over a {connection} connection", "", f"{value:.2f} ms")
    console.print(table)
    bounds = Table("to hold", "measured", "bound", "")
    for row in figures["criteria"]:
        bounds.add_row(row["name"], f"{row['value']:.2f}", row["bound"], "met" if row["met"] else "missed")
    if figures["criteria"]:
        console.print(bounds)
    console.print(f"largest difference of a logit: {figures['logits_difference']:.1e}; figures in {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("tokensieve").setLevel(logging.ERROR)  # that engines with kernels cannot open it is not news here
    if options.memory_of:
        print(json.dumps(memory_of(options.memory_of, options.folder, options.context)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model, name = bundled_or_sparsified(options.model)
        tokensieve.save(model, folder)
        config = model.config
        del model
        figures: dict[str, Any] = {
            "model": name,
            "top_k": config.index_topk,
            "context": options.context,
            "threads": options.threads,
            "machine": {"processor": processor(), "cores": os.cpu_count()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokensieve": tokensieve.__version__,
            },
            "memory_bytes": {who: measured_alone(who, folder, options) for who in PROGRAMS},
        }
        figures["request_ms"] = request_ms(folder, options.rounds)
        figures |= times(folder, options)
    figures["criteria"] = [] if options.quick else criteria(figures, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    show(figures, options)
    return 0 if all(row["met"] for row in figures["criteria"]) else 1


if __name__ == "__main__":
    sys.exit(main())
