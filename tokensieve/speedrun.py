"""The whole road as a script: a base model from nothing, its indexers, its adaptation, and the figures of each of them.

It has four parts, and each starts from what the one before left: base/ (dense), sparse/ (the same trunk with warmed-up
indexers beside it), adapted/ (everything trained with selection on), and the figures. metrics.json says which parts are
done, so the same command continues where it was stopped: by Ctrl-C, by a kill, or with `until`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import tokensieve
from tokensieve import cost, evals, train
from tokensieve.config import SpeedrunConfig, TrainConfig, UserError, to_dict
from tokensieve.data import read_documents, text_source
from tokensieve.evals import OnProgress
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.loading import save_indexers
from tokensieve.model.positions import check_positions
from tokensieve.report import environment, show, show_criteria
from tokensieve.run_record import Clock, RunRecord
from tokensieve.tasks import Document, encoder
from tokensieve.train.figures import summary
from tokensieve.train.pretrain import new_model
from tokensieve.train.schedule import check_phases
from tokensieve.train.state import decisive

PARTS = {
    "pretrain": "Pretrain: a dense model from random weights",
    "warmup": "Warm up: the model is frozen and attends densely, and the indexers learn where it looks",
    "adapt": "Adapt: selection is on, and everything trains",
    "evaluate": "Evaluate: the base model's use of its context, and both sparse models against it",
}
MADE = {"pretrain": "base", "warmup": "sparse", "adapt": "adapted"}  # the folder of a part's model
LEAVES = {part: (part, MADE[part]) if part in MADE else () for part in PARTS}  # its training run, and its model

OnStep = Callable[[int, dict[str, float]], None]  # of train.run: the step, and its figures


def run(
    config: SpeedrunConfig, resume: bool = False, until: str = "evaluate", console: Console | None = None
) -> dict[str, Any]:
    """Does the parts up to `until` in the folder `config.out`; with `resume` those that it does not hold yet.

    Returns what metrics.json holds: {"pretrain", "warmup", "adapt": a run's figures; "evaluate": {"base", "sparse",
    "adapted"}; "seconds": of each part, added up over all the times it was run; "settings": digests; "run": the
    machine}. Raises UserError on bad configs and data, and train.Interrupted after Ctrl-C.
    """
    begin = time.perf_counter()
    console = console or Console()
    out, runs = Path(config.out), _runs(config)
    record = RunRecord.of(out, LEAVES, resume, "speedrun")
    _check(config, runs)
    record.match(_settings(config, runs))
    if until == "evaluate":
        _check_texts(config)
    try:
        for part in list(PARTS)[: list(PARTS).index(until) + 1]:
            if part in MADE and part in record.figures:
                continue
            console.print(
                f"[dim]{time.perf_counter() - begin:5.0f} s[/dim]  [bold]{PARTS[part]}[/bold]", highlight=False
            )
            with record.timing(part) as clock:
                if part == "evaluate":
                    _evaluate(config, record.figures.setdefault(part, {}), clock, console)
                else:
                    TRAIN[part](config, runs[part], clock.on_step)
                    record.figures[part] = summary(runs[part]) | {"bytes": _size(out / MADE[part])}
    except KeyboardInterrupt as error:
        raise train.Interrupted(f"what was done is kept in {out}; continue with --resume") from error
    record.figures["run"] = environment()
    record.write()
    _show(config, record.figures, console)
    return record.figures


def _pretrain(config: SpeedrunConfig, run: TrainConfig, on_step: OnStep) -> None:
    model = train.run(run, resume=True, on_step=on_step)
    tokensieve.save(model, Path(config.out) / "base", torch.bfloat16)


def _warmup(config: SpeedrunConfig, run: TrainConfig, on_step: OnStep) -> None:
    """The indexers learn from the base model as it was saved, rounded: that is the one they will select for."""
    base = tokensieve.load(Path(config.out) / "base", torch.float32)
    untrained = tokensieve.sparsify(base, config.top_k, config.index_heads, config.index_dim, seed=run.seed)
    model = train.run(run, untrained, resume=True, on_step=on_step)
    save_indexers(model, Path(config.out) / "sparse", "../base", torch.bfloat16)


def _adapt(config: SpeedrunConfig, run: TrainConfig, on_step: OnStep) -> None:
    warmed_up = tokensieve.load(Path(config.out) / "sparse", torch.float32)
    model = train.run(run, warmed_up, resume=True, on_step=on_step)
    tokensieve.save(model, Path(config.out) / "adapted", torch.bfloat16)


TRAIN: dict[str, Callable[[SpeedrunConfig, TrainConfig, OnStep], None]] = {
    "pretrain": _pretrain,
    "warmup": _warmup,
    "adapt": _adapt,
}


def _evaluate(config: SpeedrunConfig, figures: dict[str, Any], clock: Clock, console: Console) -> None:
    """Measures what `figures` lacks, and prints all of it. On a GPU in bfloat16, as the models are stored."""
    device = choose_device(config.adapt.device)
    out, sizes = Path(config.out), config.evaluate
    tokenizer, documents = tokensieve.load_tokenizer(out / "base"), _held_out(config)

    @cache
    def model(name: str) -> DecoderForCausalLM:
        return tokensieve.load(out / name, device=device)

    @contextmanager
    def watched(title: str) -> Iterator[OnProgress]:
        with console.status(title) as status:

            def on_progress(what: str, done: int, total: int) -> None:
                status.update(f"{title}: {what}, {done} of {total}")
                clock.tick()

            yield on_progress
        clock.note()

    if "base" not in figures:
        with watched("base") as on_progress:
            figures["base"] = evals.acceptance(model("base"), tokenizer, documents, sizes.base, on_progress)
    console.print("\n[bold]base[/bold]", highlight=False)
    show_criteria(console, evals.acceptance_criteria(figures["base"]))
    for name in ("sparse", "adapted"):
        known = figures.setdefault(name, {})
        for context in sizes.sparse.lengths(config.top_k):
            title = f"{name}, prompts of {context:,} tokens"
            if str(context) not in known:
                with watched(title) as on_progress:
                    known[str(context)] = evals.judge_sparse(
                        model(name),
                        tokenizer,
                        documents,
                        context,
                        sizes.sparse,
                        dense=model("base"),
                        on_progress=on_progress,
                    )
            console.print(f"\n[bold]{title}[/bold]", highlight=False)
            show(console, known[str(context)])


def _runs(config: SpeedrunConfig) -> dict[str, TrainConfig]:
    """The three training runs, each in its folder. All of them read with pretraining's tokenizer."""
    out, tokenizer = Path(config.out), config.pretrain.data.tokenizer
    runs = {"pretrain": config.pretrain, "warmup": config.warmup, "adapt": config.adapt}
    return {
        part: replace(run, out=str(out / part), model="", data=replace(run.data, tokenizer=tokenizer))
        for part, run in runs.items()
    }


def _check(config: SpeedrunConfig, runs: dict[str, TrainConfig]) -> None:
    """Refuses settings that would otherwise fail only after minutes."""
    for part, run in runs.items():
        if run.stage != part:
            raise UserError(f'config {part}: its stage is {run.stage}; write stage = "{part}"')
        check_phases(run.phases)
    model = tokensieve.sparsify(new_model(runs["pretrain"]), config.top_k, config.index_heads, config.index_dim)
    base, sparse = config.evaluate.base, config.evaluate.sparse
    trained = [phase.context for run in runs.values() for phase in run.phases]
    contexts = sparse.lengths(config.top_k)
    longest, limit = max(*trained, *base.contexts, base.long, *contexts), model.config.max_position_embeddings
    remedy = "shorten it, or raise max_position_embeddings in pretrain.shape"
    check_positions(limit, longest, f"a context of {longest} tokens is", remedy)
    if contexts and min(contexts) <= config.top_k:
        raise UserError(
            f"evaluate.sparse.contexts: {min(contexts)} tokens are not longer than top_k {config.top_k}, and "
            "nothing would be selected; set longer ones"
        )


def _held_out(config: SpeedrunConfig) -> list[Document]:
    data = config.pretrain.data
    return list(read_documents(text_source(data), "test", data.held_out_share, data.limit_bytes))


def _check_texts(config: SpeedrunConfig) -> None:
    """UserError now, rather than after the training, if the text or the tokenizer do not suffice to measure."""
    base, sparse = config.evaluate.base, config.evaluate.sparse
    encode, documents = encoder(tokensieve.load_tokenizer(config.pretrain.data.tokenizer)), _held_out(config)
    if base.answers:
        encode.chat()
    evals.text_sequences(encode, documents, base.long, base.sequences)
    if sparse.contexts:
        evals.text_sequences(encode, documents, max(sparse.lengths(config.top_k)), sparse.texts)


def _settings(config: SpeedrunConfig, runs: dict[str, TrainConfig]) -> dict[str, str]:
    """A digest for each part of all that decides its result: its own settings, and those of every part before it.

    Sizes of the evaluation that have their default value are left out: new ones do not make older runs others.
    """
    digest, digests = hashlib.blake2b(digest_size=8), {}
    indexer = [config.top_k, config.index_heads, config.index_dim]
    evaluate = {f.name: _without_defaults(getattr(config.evaluate, f.name)) for f in fields(config.evaluate)}
    settings_of = {part: [decisive(to_dict(run))] + (indexer if part == "warmup" else []) for part, run in runs.items()}
    for part, settings in (settings_of | {"evaluate": [evaluate]}).items():
        digest.update(json.dumps(settings, sort_keys=True).encode())
        digests[part] = digest.hexdigest()
    return digests


def _without_defaults(config: Any) -> dict[str, Any]:
    return {f.name: value for f in fields(config) if (value := getattr(config, f.name)) != f.default}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _show(config: SpeedrunConfig, figures: dict[str, Any], console: Console) -> None:
    out, seconds = Path(config.out), figures["seconds"]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("part", "seconds", "MiB", "loss", ""):
        table.add_column(column, justify="right" if column in ("seconds", "MiB") else "left", no_wrap=True)
    for part in (part for part in PARTS if part in figures):
        # the KL if there is one: one batch's own loss says little in an adaptation of a few steps
        name = next((name for name in ("kl", "lm") if name in figures[part]), None)
        loss = f"{name} {figures[part][name]['first']:.3f} -> {figures[part][name]['last']:.3f}" if name else ""
        size = f"{figures[part]['bytes'] / 2**20:.1f}" if part in MADE else ""
        where = str(out / MADE[part]) if part in MADE else str(out / "metrics.json")
        table.add_row(part, f"{seconds[part]:.0f}", size, loss, where)
    console.print()
    console.print(table)
    spent = cost.duration(sum(seconds.values()))
    if "evaluate" not in figures:
        console.print(f"\n{spent} so far. Next: the same command with --resume does the rest", highlight=False)
        return
    console.print(f"\nDone in {spent}. Next:", highlight=False)
    for command in (f"tokensieve generate {out / 'base'} --chat 'Who are you?'", f"tokensieve eval {out / 'adapted'}"):
        console.print(f"  {command}", style="bold", highlight=False)
