"""The one training loop: pretrain, warm-up and adaptation differ in a `Stage`, and in nothing else.

A step's batch, its gradients and its random numbers are functions of (config, step): cutting it into other micro-batches changes only
rounding, and resuming changes nothing at all.
"""

import contextlib
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tokensieve.config import TrainConfig, UserError, to_dict
from tokensieve.data import build_dataset
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM, check_tokenizer, load, load_tokenizer, model_path
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train import adapt, pretrain, warmup
from tokensieve.train.rehearsal import estimate
from tokensieve.train.schedule import check_phases, lr_share, place, total_steps
from tokensieve.train.stage import Stage, StepTotals, backward
from tokensieve.train.state import (
    CONFIG,
    RunState,
    checkpoints,
    decisive,
    read_state,
    restore_optimizer,
    save_state,
    what_differs,
)
from tokensieve.train.tracking import Tracker

log = logging.getLogger("tokensieve")

STAGES: dict[str, Stage] = {"pretrain": pretrain.STAGE, "warmup": warmup.STAGE, "adapt": adapt.STAGE}

DIVERGED = "nothing was changed; begin again from an earlier checkpoint with a lower learning rate"


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run has been saved; the message says where and how to go on."""


def run(
    config: TrainConfig,
    model: DecoderForCausalLM | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
) -> DecoderForCausalLM:
    """Trains and returns the model, in evaluation mode, its last checkpoint in `config.out`.

    `model`: trained in place of `config.model` (a path or bundled name). `resume` continues from the newest checkpoint of `config.out`,
    or begins where there is none. `on_step(step, figures)` is called after every step. Raises UserError on bad configs and data, a NaN
    loss or a full disk (the last checkpoint stays), and Interrupted after Ctrl-C.
    """
    check_phases(config.phases)
    out = Path(config.out)
    done = checkpoints(out)
    if done and not resume:
        raise UserError(
            f"{out} holds a run already (up to {done[-1].name}); add --resume to continue it, or name another folder"
        )
    device = torch.device(choose_device(config.device))
    if done:
        model, first = load(done[-1], torch.float32, device), read_state(done[-1]).step
    else:
        model, first = _start(config, model).to(device), 0
    stage = STAGES[config.stage]
    stage.prepare(model, config)
    model.model.gradient_checkpointing = config.activation_checkpointing
    model.model.backend = config.backend
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, model.config)
    _check_positions(config, model)
    datasets = [
        build_dataset(config.data, tokenizer, p.context, p.steps * p.sequences, config.seed + 1000 * i)
        for i, p in enumerate(config.phases)
    ]
    fingerprint = _fingerprint(config, [d.fingerprint for d in datasets])
    optimizer = _optimizer(config, model, device)
    torch.manual_seed(config.seed)
    if done:
        if read_state(done[-1]).fingerprint != fingerprint:
            raise UserError(
                f"{out}: {what_differs(out, to_dict(config))}; resume with the same, or name another folder"
            )
        restore_optimizer(done[-1], model, optimizer)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).write_text(json.dumps(to_dict(config), indent=2))
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); free space, or name another run folder"
        ) from error
    last = total_steps(config.phases)
    model.train()
    if first < last:
        log.info("%s: %s", config.stage, estimate(config, stage, model, device))
    if config.compile:
        for layer in model.model.layers:
            # An indexer's loss keeps a program from being whole, and a layer in pieces gains little over its feed-forward part.
            unit = layer if model.model.objective == "none" else cast(DecoderLayer, layer).mlp
            unit.compile()
    tracker = Tracker(config, first)
    stop = _StopSignal()
    try:
        # Each kind of layer is compiled anew for every phase; past the usual limit of programs torch would go on without compiling.
        many = torch._dynamo.config.patch(recompile_limit=64)
        with stop, many, _bar(progress, config.stage, first, last) as advance:
            for step, batch in _batches(config, datasets, first, last):
                model.model.use_yarn(config.phases[place(config.phases, step).phase].yarn)
                figures = _step(config, stage, model, optimizer, step, batch, device)
                if (step + 1) % config.log_every == 0 or step + 1 == last:
                    tracker.row(step + 1, figures)
                if on_step is not None:
                    on_step(step + 1, figures)
                advance(figures)
                due = config.save_every and (step + 1) % config.save_every == 0
                if due or stop.asked or step + 1 == last:
                    where = save_state(out, model, optimizer, RunState(step + 1, fingerprint), config.keep)
                if stop.asked:
                    raise Interrupted(f"saved {where} after step {step + 1} of {last}; continue with --resume")
    finally:
        tracker.close()
    model.train_for("none")
    model.model.backend = "auto"
    model.model.use_yarn(True)
    return model.eval()


def _start(config: TrainConfig, model: DecoderForCausalLM | None) -> DecoderForCausalLM:
    if model is not None:
        return model
    if config.stage == "pretrain" and config.shape:
        model = pretrain.new_model(config)
        model.folder = model_path(config.data.tokenizer)
        return model
    return load(config.model, torch.float32)


def _check_positions(config: TrainConfig, model: DecoderForCausalLM) -> None:
    longest = max(p.context for p in config.phases)
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"phases.context {longest} is past the model's {model.config.max_position_embeddings} positions; "
            "shorten it or choose another model"
        )


def _batches(
    config: TrainConfig, datasets: list, first: int, last: int
) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
    """(step, micro-batches) from `first` on; each phase reads its own dataset from where the step begins."""
    step = first
    while step < last:
        at = place(config.phases, step)
        phase = config.phases[at.phase]
        dataset = datasets[at.phase]
        rest = Subset(dataset, range(at.sequence, len(dataset)))
        loader = DataLoader(
            rest,
            batch_size=phase.micro_batch,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # the loader draws a seed, and would take it from the run's random state
        )
        micro: list[dict[str, Tensor]] = []
        for batch in loader:
            micro.append(batch)
            if len(micro) * phase.micro_batch == phase.sequences:
                yield step, micro
                micro, step = [], step + 1


def _leave_signals(worker: int) -> None:
    """Ctrl-C and many a SIGTERM reach every process of the run; the batches must go on until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _step(
    config: TrainConfig,
    stage: Stage,
    model: DecoderForCausalLM,
    optimizer: torch.optim.Optimizer,
    step: int,
    micro: list[dict[str, Tensor]],
    device: torch.device,
) -> dict[str, float]:
    begin = time.perf_counter()
    totals = StepTotals(labels=sum(_label_weight(b) for b in micro), queries=sum(b["input_ids"].numel() for b in micro))
    share = lr_share(config.optimizer, config.phases, step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    sums: dict[str, Tensor] = {}
    try:
        for batch in micro:
            losses = backward(stage, model, batch, totals, device)
            for name, value in (("loss", losses.total.detach()), ("lm", losses.lm), ("kl", losses.kl)):
                if value is not None:
                    sums[name] = sums[name] + value if name in sums else value
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise UserError(f"step {step + 1}: {error}; {DIVERGED}") from error  # the ops select and quantize no NaN
    indexers = [p for p in model.indexer_parameters() if p.grad is not None]
    own = {id(p) for p in indexers}
    trunk = [p for p in model.parameters() if p.grad is not None and id(p) not in own]
    norms = {
        "grad_norm": torch.nn.utils.clip_grad_norm_(trunk, config.optimizer.clip) if trunk else None,
        "indexer_grad_norm": torch.nn.utils.clip_grad_norm_(indexers, config.optimizer.indexer_clip)
        if indexers
        else None,
    }
    figures = {k: float(v) for k, v in (sums | {k: v for k, v in norms.items() if v is not None}).items()}
    if not all(math.isfinite(v) for v in figures.values()):
        raise UserError(
            f"step {step + 1}: the loss or a gradient is not finite ({', '.join(f'{k} {v:.3g}' for k, v in figures.items())}); {DIVERGED}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if stage.after_step is not None:
        stage.after_step(model, config)
    seconds = time.perf_counter() - begin
    return figures | {
        "lr": optimizer.param_groups[0]["lr"],
        "seconds": seconds,
        "tokens_per_second": totals.queries / seconds,
    }


def _label_weight(batch: dict[str, Tensor]) -> float:
    # In NumPy: so short a sum is not worth waking torch's threads for, whose cores the data's workers use.
    predicted = batch["labels"].numpy()[:, 1:] != -100
    weights = batch.get("loss_weights")
    return float(predicted.sum() if weights is None else weights.numpy()[:, 1:][predicted].sum(dtype="float64"))


def _optimizer(config: TrainConfig, model: DecoderForCausalLM, device: torch.device) -> torch.optim.AdamW:
    o = config.optimizer
    indexers = {id(p) for p in model.indexer_parameters()}
    groups: dict[tuple[float, float], list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            peak = o.indexer_lr if id(parameter) in indexers and o.indexer_lr is not None else o.lr
            groups.setdefault((peak, o.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), p in groups.items()],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        fused=device.type == "cuda",
    )


def _fingerprint(config: TrainConfig, data: list[str]) -> str:
    return hashlib.blake2b(
        json.dumps([decisive(to_dict(config)), data], sort_keys=True).encode(), digest_size=16
    ).hexdigest()


class _StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}  # handlers, as signal.signal gives them

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
                self.before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bar(show: bool, name: str, first: int, last: int) -> Iterator[Callable[[dict[str, float]], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), disable=not show) as bar:
        task = bar.add_task(name, total=last, completed=first, figures="")

        def advance(figures: dict[str, float]) -> None:
            text = "  ".join(f"{k} {figures[k]:.3f}" for k in ("lm", "kl") if k in figures)
            bar.update(task, advance=1, figures=text)

        yield advance
