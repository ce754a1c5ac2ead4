"""Indexers that begin from the attention beside random ones: untrained, and in a warm-up of the same tokens.

    python benchmarks/index_init.py [--model base] [--index-heads 8] [--index-dim 32] [--top-k 512] [--context 4096]
        [--texts 6] [--seeds 3] [--lr 1e-3 1.5e-2] [--steps 50] [--warmup-context 2048] [--out runs/index-init]

Held-out texts of the source "python" are read at --context. "recall" is tokensieve.evals.recall at --top-k: the mass of
the selected keys as a share of the best set's. "KL" is equation (3), in nats. Both are means over layers and texts.

Arms: random weights, from --seeds seeds; "attention" from 8192 tokens of training text, and from as many random
tokens, of the same seeds; the last k keys (window). Then random and attention warm up on the same sequences, with each
--lr, and are measured on the first two texts after 0, 2, 5, 10, 20, 50, ... steps. Of several seeds: the mean, and the
lowest and highest. Tables to standard output, figures to index-init.json. About 20 minutes on two CPU cores.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tokensieve
from tokensieve import evals
from tokensieve.config import DataConfig, OptimizerConfig, PhaseConfig, SourceConfig, TrainConfig
from tokensieve.data import read_documents, sample_rows
from tokensieve.evals.evaluation import evaluating
from tokensieve.evals.mass import Recall
from tokensieve.model import DecoderForCausalLM, ForwardOptions, Objective, index_init
from tokensieve.model.selection import window
from tokensieve.report.origin import environment
from tokensieve.train import run

MARKS = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
HELD_OUT = 0.05
SOURCES = (SourceConfig("python", 0.5), SourceConfig("retrieval", 0.5))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base")
    parser.add_argument("--index-heads", type=int, default=8)
    parser.add_argument("--index-dim", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=512)
    parser.add_argument("--context", type=int, default=4096, help="tokens of a held-out text")
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--queries", type=int, default=64, help="whose recall is measured in each text and layer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-3, 1.5e-2])
    parser.add_argument("--steps", type=int, default=50, help="of warm-up, one sequence each; 0: none")
    parser.add_argument("--warmup-context", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--kl-every", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/index-init"))
    return parser.parse_args()


@dataclass(frozen=True)
class Figures:
    recall: float
    kl: float
    by_layer: tuple[float, ...]
    held: tuple[float, ...]
    best: tuple[float, ...]


class Bench:
    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.tokenizer = tokensieve.load_tokenizer(asked.model)
        self.dense = tokensieve.load(asked.model)
        held_out = read_documents("python", "test", HELD_OUT)
        self.texts = evals.text_sequences(self.tokenizer, held_out, asked.context, asked.texts)
        documents = read_documents("python", "train", HELD_OUT, limit_bytes=2_000_000)
        self.calibration = sample_rows(self.tokenizer, documents, index_init.ROWS, index_init.TOKENS)

    def sparse(self, init: str, seed: int = 0) -> DecoderForCausalLM:
        sizes = self.asked.top_k, self.asked.index_heads, self.asked.index_dim
        text = self.calibration if init == "attention" else None
        begin = time.perf_counter()
        kind = "random" if init == "random" else "attention"
        model = tokensieve.sparsify(self.dense, *sizes, seed=seed, init=kind, calibration=text)
        self.seconds = time.perf_counter() - begin
        return model

    def measure(self, model: DecoderForCausalLM, texts: int) -> Figures:
        found = evals.recall(model, self.texts[:texts], self.asked.top_k, self.asked.queries)
        options = ForwardOptions(objective=Objective("warmup", every=16, first=15))
        with evaluating(model):
            kls = [float(model(input_ids=ids[None], options=options).loss) for ids in self.texts[:texts]]
        return Figures(found.overall, fmean(kls), found.by_layer, found.held, found.best)

    def warm_up(self, init: str, seed: int, lr: float) -> dict[int, Figures]:
        model, asked = self.sparse(init, seed), self.asked
        curve = {0: self.measure(model, 2)}

        def measure(step: int, figures: dict[str, float]) -> None:
            if step in MARKS or step == asked.steps:
                curve[step] = self.measure(model, 2)

        config = TrainConfig(
            "warmup",
            asked.model,
            str(asked.out / f"{init}-{seed}-{lr:g}"),
            (PhaseConfig(asked.steps, asked.warmup_context, 1),),
            DataConfig(SOURCES, held_out_share=HELD_OUT, limit_bytes=12_000_000),
            OptimizerConfig(lr=lr, lr_end=0.1, warmup_steps=asked.steps // 5),
            kl_every=asked.kl_every,
            save_every=0,
            track=(),
        )
        run(config, model, on_step=measure, progress=False, rehearse=False)
        return curve


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.out.exists():
        shutil.rmtree(asked.out)
    asked.out.mkdir(parents=True)
    bench, console, seeds = Bench(asked), Console(width=None if sys.stdout.isatty() else 160), range(asked.seeds)
    rows = {"random": [bench.measure(bench.sparse("random", seed), asked.texts) for seed in seeds]}
    rows["attention"] = [bench.measure(bench.sparse("attention"), asked.texts)]
    seconds = bench.seconds
    rows["attention, random tokens"] = [bench.measure(bench.sparse("noise", seed), asked.texts) for seed in seeds]
    last = evals.recall(bench.sparse("random"), bench.texts, asked.top_k, asked.queries, window)
    untrained(console, rows, last, seconds)
    curves: dict[str, list[dict[int, Figures]]] = {}
    for lr in asked.lr if asked.steps else ():
        curves[f"attention, lr {lr:g}"] = [bench.warm_up("attention", 0, lr)]
        curves[f"random, lr {lr:g}"] = [bench.warm_up("random", seed, lr) for seed in seeds]
        trained(console, curves, asked)
    figures: dict[str, Any] = {"asked": vars(asked) | {"out": str(asked.out)}, "run": environment(), "seconds": seconds}
    figures |= {"untrained": {name: [vars(x) for x in found] for name, found in rows.items()}, "window": vars(last)}
    figures["warmup"] = {
        name: [{step: vars(x) for step, x in c.items()} for c in found] for name, found in curves.items()
    }
    (asked.out / "index-init.json").write_text(json.dumps(figures, indent=1))


def spread(found: list[Figures], value: Callable[[Figures], float]) -> str:
    values = [value(x) for x in found]
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def untrained(console: Console, rows: dict[str, list[Figures]], last: Recall, seconds: float) -> None:
    table = Table("untrained", "recall", "KL", *(f"layer {i}" for i in range(len(last.by_layer))))
    for name, found in rows.items():
        layers = [f"{fmean(x.held[i] for x in found):.3f}" for i in range(len(last.by_layer))]
        table.add_row(name, spread(found, lambda x: x.recall), spread(found, lambda x: x.kl), *layers)
    table.add_row("window", f"{last.overall:.3f}", "", *(f"{x:.3f}" for x in last.held))
    table.add_row("best set", "1", "", *(f"{x:.3f}" for x in last.best))
    console.print(table)
    console.print(f"layers: the mass held; making the indexers from text took {seconds:.0f} s")


def trained(console: Console, curves: dict[str, list[dict[int, Figures]]], asked: argparse.Namespace) -> None:
    steps = sorted(next(iter(curves.values()))[0])
    table = Table("warm-up", "", *(f"{step} steps" for step in steps))
    for name, found in curves.items():
        table.add_row(name, "recall", *(spread([c[step] for c in found], lambda x: x.recall) for step in steps))
        table.add_row("", "KL", *(spread([c[step] for c in found], lambda x: x.kl) for step in steps))
    console.print(table)
    console.print(f"{asked.warmup_context} tokens a step, kl_every {asked.kl_every}; two texts")


if __name__ == "__main__":
    main()
