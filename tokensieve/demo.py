"""The main job as a script: a dense long-context model becomes a sparse one, and a page shows what was lost and gained.

From the dense model: sparsify, warm the indexers up, adapt everything, and train the dense model on the same further
tokens, for a fair comparison. Then every arm answers the same prompts, one more token is timed, and the report is
written. The model is the bundled base, or any that tokensieve reads.
"""

import importlib.resources
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import tokensieve
from tokensieve import cost, evals, train
from tokensieve.config import DemoConfig, TrainConfig, UserError
from tokensieve.data import read_documents, sample_rows
from tokensieve.data.sample import CALIBRATION_BYTES
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM, index_init
from tokensieve.model.files import model_path
from tokensieve.model.positions import check_positions
from tokensieve.report import environment, show, show_long, show_short, write_run
from tokensieve.tasks import Document, Documents, PlainEncoder
from tokensieve.tasks.retrieval import MAX_NEEDLES, NeedleExample, Needles
from tokensieve.train.schedule import total_steps
from tokensieve.train.state import checkpoints

RUNS = ("warmup", "adapt", "adapt-dense")  # folders of the training runs, in the demo's own
MODELS = ("dense", "sparse")  # folders of models; dense: a GGUF file's
STAGES = {"warmup": "warm-up", "adapt": "adaptation"}  # as the report calls them
REHEARSED = 10  # steps: the estimate of a shorter run would take as long as the run

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """What every arm is asked: held-out texts, and a question for each needle of any needle contexts."""

    config: DemoConfig
    tokenizer: Any
    encode: PlainEncoder
    documents: list[Document]
    texts: Sequence[Tensor]
    task: Needles
    needles: list[NeedleExample]

    @classmethod
    def of(cls, config: DemoConfig) -> "Prompts":
        encode = PlainEncoder(tokenizer := tokensieve.load_tokenizer(config.model))
        documents = held_out(config)
        texts = evals.text_sequences(encode, documents, config.context, config.ppl_sequences)
        task = Needles(encode, Documents(test=documents), context=config.context)
        needles = task.examples("test", config.needle_contexts * MAX_NEEDLES, seed=config.seed)
        for length in config.heat_lengths:  # what cannot be asked is refused now rather than after the training
            task.examples("test", 1, length)
        if config.long is not None:
            evals.checked_tasks(encode, documents, config.long)
        return cls(config, tokenizer, encode, documents, texts, task, needles)

    def recall(self, model: DecoderForCausalLM) -> evals.Recall:
        return evals.recall(model, self.texts[: self.config.recall_sequences], queries=self.config.recall_queries)


def bundled_texts() -> list[Document]:
    """The documents of the package, which no training source reads."""
    return list(read_documents(str(importlib.resources.files("tokensieve") / "bundled" / "texts.jsonl"), "all"))


def held_out(config: DemoConfig) -> list[Document]:
    """The documents to evaluate on: those of the package, or those of another source; of a source that is trained on,
    the part that training leaves out.
    """
    if config.texts == "bundled":
        return bundled_texts()
    trained = {entry.source for stage in (config.warmup, config.adapt) for entry in stage.data.sources}
    if config.texts not in trained:
        return list(read_documents(config.texts, "all"))
    return list(read_documents(config.texts, "test", config.adapt.data.held_out_share))


def run(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Does all of it in the folder `config.out`: sparse/ (the checkpoint), metrics.json, details.json, report.html.

    Returns the metrics. The results of an earlier demo there are replaced. Raises UserError on bad configs and data,
    and train.Interrupted after Ctrl-C.
    """
    begin = time.perf_counter()
    console = console or Console()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/dim]  [bold]{text}[/bold]", highlight=False)

    # On the device of the training, in its precision: indexers that begin from the attention take a pass over text.
    name, base = config.model, tokensieve.load(config.model, torch.float32, choose_device(config.warmup.device))
    _check(config, base)
    prompts = Prompts.of(config)
    _clear(out := Path(config.out))
    config = _from_folder(config, base)
    size = sum(p.numel() for p in base.parameters())
    say(f"{name}: {size / 1e6:.1f}M parameters, {base.config.max_position_embeddings:,} positions, dense")
    questions = f", {len(prompts.needles)} questions" if prompts.needles else ""
    say(f"Held-out prompts of {config.context:,} tokens: {len(prompts.texts)} texts{questions}")

    say(f"Sparsify: an untrained indexer in every layer, {config.top_k} keys per query")
    sparse = _sparsified(config, base, prompts.encode)
    first = prompts.recall(sparse).overall
    history: list[Row] = [{"stage": STAGES["warmup"], "step": 0, "recall": first}]
    say("Warm up: attention stays dense, and the indexers learn where it looks")
    history += _train(replace(config.warmup, out=str(out / "warmup")), sparse, prompts)
    say("Adapt: selection is on, and everything trains")
    history += _train(replace(config.adapt, out=str(out / "adapt")), sparse, prompts)
    say("The dense model on the same further tokens, to compare with")
    dense = replace(config.adapt, selection=False, out=str(out / "adapt-dense"))
    train.run(dense, tokensieve.load(config.model), rehearse=total_steps(dense.phases) >= REHEARSED)
    tokensieve.save(sparse, out / "sparse")

    say("Compare: every arm on the same prompts")
    # Training is in float32. Measured is what will be used: the models as they are loaded, in bfloat16 on a GPU.
    base, dense_adapted, sparse = (
        tokensieve.load(folder, device=sparse.device)
        for folder in (config.model, checkpoints(Path(dense.out))[-1], out / "sparse")
    )
    pair = {"dense": base, "sparse": sparse}
    arms = evals.demo_arms(base, dense_adapted, sparse, untrained=_sparsified(config, base))
    scores, heat = _compare(config, arms, pair, prompts, console)
    last = prompts.recall(sparse)
    say(f"Time one more token, and a chunk of {evals.CHUNK}")
    decode_ms, chunk_ms = evals.context_ms(pair, prompts.texts[0], config.decode_contexts)

    at, timed = str(config.context), set(config.decode_contexts)
    layout: cost.Layout = "float32" if sparse.dtype == torch.float32 else "bf16"
    reads = evals.cache_reads(cost.shape_of(sparse.config), sorted({config.context, *timed}), layout)
    kl = [row["kl"] for row in history if row["stage"] == STAGES["warmup"] and "kl" in row]
    metrics: Row = {
        **evals.metrics_of(scores),
        "kl": {"first": kl[0], "last": kl[-1]},
        "recall": {"first": first, "last": last.overall},
        "decode_ms": decode_ms,
        "chunk_ms": chunk_ms,
        "kv_read_fraction": cost.kv_read_fraction(config.context, config.top_k),
        "bytes_read_fraction": reads["sparse"][at] / reads["dense"][at],
        "top_k": config.top_k,
        "context": config.context,
        "seconds": time.perf_counter() - begin,
    }
    details = {
        "base": name,
        "parameters": size,
        "questions": len(prompts.needles),
        "texts": {"all": len(prompts.texts), "shared": evals.shared_texts(scores)},
        "loss_by_position": evals.loss_by_position(scores),
        "heat": heat,
        "cache_reads": {name: {c: n for c, n in by.items() if int(c) in timed} for name, by in reads.items()},
        "recall": {"by_layer": last.by_layer, "held": last.held, "best": last.best},
        "run": environment(),
    }
    page = write_run(out, metrics, history, details)
    if config.long is not None or config.short is not None:
        say("Ask for what long and short prompts need")

        def keep(suites: Row) -> None:
            """Writes what has been measured, lest a long suite that is broken off lose it."""
            metrics.update(suites, seconds=time.perf_counter() - begin)
            write_run(out, metrics, history, details)

        _suites(config, arms, prompts, console, keep)
    console.print()
    show(console, metrics)
    if config.long is not None:
        console.print()
        show_long(console, metrics["long"])
    if config.short is not None:
        console.print()
        show_short(console, metrics["short"])
    console.print(f"\nDone in {cost.duration(metrics['seconds'])}. The report: {page}\nNext:", highlight=False)
    for command in (f"tokensieve eval {out / 'sparse'}", "tokensieve adapt --help", "tokensieve doctor"):
        console.print(f"  {command}", style="bold", highlight=False)
    return metrics


def _suites(
    config: DemoConfig, arms: dict[str, evals.Arm], prompts: Prompts, console: Console, keep: Callable[[Row], None]
) -> None:
    """Measures the suites "short" and "long", as far as the config asks for them, and has the figures kept.

    The first arm, beside which the others are put, is the dense model after the same further tokens.
    """
    sparse, dense = arms["sparse"].model, {name: arms[name] for name in ("dense_adapted", "dense")}
    with _progress(console) as bar:
        line = bar.add_task("")

        def on_progress(what: str, done: int, total: int) -> None:
            bar.update(line, description=what, completed=done, total=total)

        if config.short is not None:
            asked = dense | {"sparse": arms["sparse"]}
            short = evals.judge_short(asked, prompts.encode, prompts.documents, config.short, on_progress)
            keep({"short": short})
        if config.long is not None:
            k = config.top_k
            untrained = {"untrained_indexer": replace(arms["untrained_indexer"], top_k=k)}
            swept = {f"sparse k={n}": evals.Arm(sparse, "indexer", n) for n in config.long.top_k}
            chosen = {name: arm for name, arm in evals.long_arms(sparse, (k,)).items() if name != "dense"}
            evals.judge_long(
                # the two that are judged first: a run that is broken off later has its verdict
                {"dense_adapted": dense["dense_adapted"]} | chosen | untrained | {"dense": dense["dense"]} | swept,
                prompts.tokenizer,
                prompts.documents,
                config.long,
                on_progress,
                judged=("dense_adapted", f"sparse k={k}"),
                on_figures=lambda figures: keep({"long": figures}),
            )


def _compare(
    config: DemoConfig,
    arms: dict[str, evals.Arm],
    pair: dict[str, DecoderForCausalLM],
    prompts: Prompts,
    console: Console,
) -> tuple[dict[str, evals.ArmScores], Row]:
    """The scores of every arm, and for both models of `pair` the needles by depth and length."""
    with _progress(console) as bar:
        line = bar.add_task("")

        def on_progress(what: str, done: int, total: int) -> None:
            bar.update(line, description=what, completed=done, total=total)

        scores = evals.compare(
            arms,
            prompts.encode,
            prompts.texts,
            prompts.task,
            prompts.needles,
            config.top_k,
            on_progress,
            other_prompts=config.other_prompts,
        )
        heat = {
            name: evals.needle_heat(
                model,
                prompts.encode,
                prompts.documents,
                config.heat_lengths,
                seed=config.seed,
                known={config.context: known},
            )
            for name, model in pair.items()
            if (known := scores[name].needles) is not None
        }
    return scores, heat


def _check(config: DemoConfig, base: DecoderForCausalLM) -> None:
    """Refuses settings that would otherwise fail only after minutes, or after an earlier demo's models were removed."""
    if config.top_k < 1:
        raise UserError(f"top_k is {config.top_k}; it must be at least 1")
    if base.is_sparse:
        raise UserError(f"model {config.model} is sparse already; the demo starts from a dense one, for example base")
    if model_path(config.model).resolve() in {(Path(config.out) / folder).resolve() for folder in MODELS}:
        raise UserError(f"model {config.model} is one that this demo would replace; name another folder with --out")
    if config.heat_lengths and not config.needle_contexts:
        raise UserError(
            "heat_lengths asks for needles and needle_contexts is 0; set heat_lengths to [] or ask for some"
        )
    if config.long is not None and min(config.long.top_k, default=1) < 1:
        raise UserError(f"long.top_k is {list(config.long.top_k)}; each k must be at least 1")
    if config.context <= config.top_k:
        raise UserError(f"context {config.context} is not longer than top_k {config.top_k}; set a longer context")
    asked = () if config.long is None else config.long.contexts
    longest = max(config.context, *config.decode_contexts, *config.heat_lengths, *asked)
    limit, what = base.config.max_position_embeddings, f"a context of {longest} tokens is"
    check_positions(limit, longest, what, "shorten it")


def _from_folder(config: DemoConfig, base: DecoderForCausalLM) -> DemoConfig:
    """The config, whose training reads text by the model's own tokenizer.

    A GGUF file, which is slow to read, becomes the folder `dense` first, and is read from there.
    """
    if model_path(config.model).is_file():
        tokensieve.save(base, dense := Path(config.out) / "dense")
        config = replace(config, model=str(dense))
    warmup, adapt = (replace(s, data=replace(s.data, tokenizer=config.model)) for s in (config.warmup, config.adapt))
    return replace(config, warmup=warmup, adapt=adapt)


def _clear(out: Path) -> None:
    """Removes what an earlier demo left: its training runs, which a new one cannot continue, and its models, whose
    tokenizer and card a save would keep.
    """
    for name in RUNS:
        if (out / name / "metrics.jsonl").is_file():
            shutil.rmtree(out / name)
    for name in MODELS:
        if (out / name / "config.json").is_file():
            shutil.rmtree(out / name)


def _sparsified(
    config: DemoConfig, dense: DecoderForCausalLM, encode: PlainEncoder | None = None
) -> DecoderForCausalLM:
    """The dense model with indexers that begin as the config says. Without an encoder: from random weights."""
    sizes = config.top_k, config.index_heads, config.index_dim
    if encode is None or config.index_init == "random":
        return tokensieve.sparsify(dense, *sizes, seed=config.seed)
    documents = read_documents("python", "train", limit_bytes=CALIBRATION_BYTES)
    rows = sample_rows(encode, documents, index_init.ROWS, min(index_init.TOKENS, config.context))
    return tokensieve.sparsify(dense, *sizes, seed=config.seed, init="attention", calibration=rows)


def _train(config: TrainConfig, model: DecoderForCausalLM, prompts: Prompts) -> list[Row]:
    """Trains the model in place; returns the rows of its history, some with the recall on held-out text."""
    steps = total_steps(config.phases)
    measured: dict[int, float] = {}

    def on_step(step: int, figures: dict[str, float]) -> None:
        # The last step is always measured; a probe in the last third would cost as much and show nearly the same.
        if step == steps or (step in prompts.config.recall_steps and 3 * step <= 2 * steps):
            measured[step] = prompts.recall(model).overall

    train.run(config, model, on_step=on_step, rehearse=steps >= REHEARSED)
    rows = [{"stage": STAGES[config.stage], **row} for row in train.history(config.out)]
    return [row | {"recall": measured[row["step"]]} if row["step"] in measured else row for row in rows]


def _progress(console: Console) -> Progress:
    arm = TextColumn("        {task.description:<17}")
    return Progress(arm, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
