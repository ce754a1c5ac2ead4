"""Adaptation by LoRA beside full adaptation: what each trains, needs and loses, on the same tokens and prompts.

    python benchmarks/lora.py [--steps 20] [--context 1024] [--top-k 128] [--ranks 8 16 64] [--out runs/lora]

The bundled base model is made sparse and warmed up once. From there full adaptation and LoRA of each rank train on the
same tokens. Then all of them, and the warmed-up model before them, predict the same held-out texts, with selection and
with dense attention, and answer the same questions for needles.

Intervals are of 95%. "beside full": the perplexity, with selection, divided by that of full adaptation on the same
texts. Memory: on a GPU the peak of the run; on a CPU what `tokensieve.cost` counts, without the process itself.
Seconds: of the training steps alone. About eight minutes on two CPU cores. Table to standard output, figures to
lora.json.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tokensieve
from tokensieve import cost, evals
from tokensieve.config import DataConfig, LoraConfig, OptimizerConfig, PhaseConfig, SourceConfig, TrainConfig
from tokensieve.demo import bundled_texts
from tokensieve.evals import intervals
from tokensieve.evals.intervals import Estimate
from tokensieve.model import DecoderForCausalLM
from tokensieve.report.origin import environment
from tokensieve.tasks import Documents, PlainEncoder
from tokensieve.tasks.retrieval import MAX_NEEDLES, Needles
from tokensieve.train import history, run
from tokensieve.train.lora import adapters_of

FULL = "full"
SOURCES = (SourceConfig("python", 0.6), SourceConfig("retrieval", 0.4))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of adaptation, one sequence each")
    parser.add_argument("--warmup-steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence, a text and a needle context")
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 16, 64])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--needle-contexts", type=int, default=2, help=f"of {MAX_NEEDLES} questions each")
    parser.add_argument("--lr", type=float, default=3e-5, help="of full adaptation")
    parser.add_argument("--lora-lr", type=float, default=3e-4, help="of the adapters")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    return parser.parse_args()


class Prompts:
    """What every model is asked: held-out texts, and a question for each needle."""

    def __init__(self, asked: argparse.Namespace):
        encode = PlainEncoder(tokensieve.load_tokenizer("base"))
        documents = bundled_texts()
        self.encode, self.texts = encode, evals.text_sequences(encode, documents, asked.context, asked.texts)
        self.task = Needles(encode, Documents(test=documents), context=asked.context)
        self.needles = self.task.examples("test", asked.needle_contexts * MAX_NEEDLES, seed=0)
        self.contexts = [place // MAX_NEEDLES for place in range(len(self.needles))]

    def ask(self, model: DecoderForCausalLM) -> dict[str, Any]:
        sparse = evals.perplexity(model, self.texts, model.top_k).by_text
        with tokensieve.selecting(model, "dense"):
            dense = evals.perplexity(model, self.texts, model.top_k).by_text
        found = [r.score.value for r in evals.evaluate(model, self.encode, self.task, self.needles).records]
        return {"sparse": sparse, "dense": dense, "needles": found, "contexts": self.contexts}


def train(config: TrainConfig, model: DecoderForCausalLM) -> dict[str, Any]:
    """Trains `model` in place; its trainable parameters, its memory in bytes, and the seconds of its steps."""
    cuda, counted = torch.cuda.is_available(), {}
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def count(step: int, figures: dict[str, float]) -> None:
        needed = cost.run_estimate(model.config, config, 1.0, adapters=adapters_of(model)).memory_bytes
        counted["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        counted["memory_bytes"] = torch.cuda.max_memory_allocated() if cuda else needed

    run(config, model, on_step=count, progress=False, rehearse=False)
    return counted | {"seconds": sum(row["seconds"] for row in history(config.out))}


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.out.exists():
        shutil.rmtree(asked.out)
    prompts, console = Prompts(asked), Console(width=None if sys.stdout.isatty() else 200)
    data = DataConfig(SOURCES, limit_bytes=12_000_000)
    warmup = TrainConfig(
        "warmup",
        "base",
        str(asked.out / "warmup"),
        (PhaseConfig(asked.warmup_steps, asked.context, 1),),
        data,
        OptimizerConfig(lr=1.5e-2, lr_end=0.1, warmup_steps=min(20, asked.warmup_steps // 3), beta1=0.7),
        track=(),
    )
    optimizer = OptimizerConfig(lr=asked.lr, lr_end=0.1, warmup_steps=2, indexer_lr=3e-4)
    full = replace(
        warmup, stage="adapt", phases=(PhaseConfig(asked.steps, asked.context, 1),), optimizer=optimizer, seed=1
    )
    arms = {FULL: full} | {
        f"LoRA r={rank}": replace(
            full, lora=LoraConfig(rank, merge=False), optimizer=replace(optimizer, lr=asked.lora_lr)
        )
        for rank in asked.ranks
    }

    console.print("[dim]warm-up[/dim]")
    warmed = tokensieve.sparsify(tokensieve.load("base"), asked.top_k, 8, 32)
    train(warmup, warmed)
    tokensieve.save(warmed, asked.out / "warmed")
    results = {"before": {"trainable": 0, "memory_bytes": 0, "seconds": 0.0} | prompts.ask(warmed)}
    for name, config in arms.items():
        console.print(f"[dim]{name}[/dim]")
        model = tokensieve.load(asked.out / "warmed", torch.float32)
        config = replace(config, out=str(asked.out / name.replace(" ", "-")))
        results[name] = train(config, model) | prompts.ask(model)
    show(console, results)
    (asked.out / "lora.json").write_text(
        json.dumps({"asked": vars(asked) | {"out": str(asked.out)}, "arms": results, "run": environment()}, indent=1)
    )


def show(console: Console, results: dict[str, dict[str, Any]]) -> None:
    table = Table("", "trains", "memory", "seconds", "ppl sparse", "ppl dense", "beside full", "needles")
    for name, row in results.items():
        beside = [a - b for a, b in zip(row["sparse"], results[FULL]["sparse"], strict=True)]
        table.add_row(
            name,
            f"{row['trainable'] / 1e6:.2f}M",
            f"{row['memory_bytes'] / 2**20:,.0f} MiB",
            f"{row['seconds']:.0f}",
            *(interval(intervals.ratio(row[kind]), 2) for kind in ("sparse", "dense")),
            "" if name == FULL else interval(intervals.ratio(beside), 4),
            interval(needles := intervals.clustered_share(row["needles"], row["contexts"]), 2)
            + f" of {needles.n} in {needles.clusters} contexts",
        )
    console.print(table)
    console.print(f"{len(results[FULL]['sparse'])} texts, of which the tokens that see more than k keys count")


def interval(found: Estimate, digits: int) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


if __name__ == "__main__":
    main()
