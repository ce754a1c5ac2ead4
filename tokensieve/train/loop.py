"""The one training loop: pretraining, warm-up and adaptation differ in a `Stage`, and in nothing else.

A step's batch, its gradients and its random numbers are functions of (config, step): cutting it into other
micro-batches changes only rounding, and resuming changes nothing at all.
"""

import contextlib
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tokensieve import cost
from tokensieve.config import TrainConfig, UserError, to_dict
from tokensieve.data import build_dataset
from tokensieve.files import locked, write_json
from tokensieve.machine import choose_device, rank_info
from tokensieve.model import DecoderForCausalLM, check_tokenizer, load, load_tokenizer, model_path
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train import adapt, lora, pretrain, warmup
from tokensieve.train.estimate import estimate, forecast
from tokensieve.train.learning import check_indexers, is_indexer, learning
from tokensieve.train.schedule import check_phases, extends, lr_share, position, total_steps
from tokensieve.train.stage import Stage, StepTotals, backward, options_of
from tokensieve.train.state import (
    CONFIG,
    RunState,
    began_as,
    checkpoints,
    decisive,
    newest,
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
    """Ctrl-C or SIGTERM. The run has been saved; the message names the checkpoint and the way to continue."""


class Run:
    """One training run: its model, its data and its progress.

    Raises UserError for bad configs and data, before anything is trained.
    """

    def __init__(
        self, config: TrainConfig, model: DecoderForCausalLM | None = None, resume: bool = False, rehearse: bool = True
    ):
        """model: trained in place of `config.model`.

        resume: continue from the newest checkpoint of `config.out`, if there is one.

        rehearse: time a pass before the first step, and say how long the run will take and what memory it needs.
        """
        if (size := rank_info().size) > 1:
            raise UserError(
                f"torchrun started {size} processes, and training runs in one so far; start it without torchrun"
            )
        check_phases(config.phases)
        if config.lora is not None:
            import peft  # noqa: F401  before anything takes long; the command names a package that is missing
        self.config, self.out = config, Path(config.out)
        self.resume, self._resumed = resume, newest(self.out, resume)
        self._rehearse = rehearse
        self.device = torch.device(choose_device(config.device))
        if self._resumed:
            self._state = read_state(self._resumed)
            if (self._resumed / lora.TENSORS).exists() != (config.lora is not None):
                raise self._other_run()
        self.first = self._state.step if self._resumed else 0
        if self._resumed and config.lora is None:
            self.model = load(self._resumed, torch.float32, self.device)
        else:
            self.model = _start(config, model).to(self.device)
        self.last = total_steps(config.phases)
        self.stage = STAGES[config.stage]
        self.options = options_of(self.stage, config)
        if self.stage.objective(config) != "none":
            check_indexers(self.model, config.stage)

    @contextlib.contextmanager
    def prepared(self) -> Iterator["Run"]:
        """Within the block the model trains. Afterwards only its weights have changed."""
        config, model = self.config, self.model
        was_training, checkpointing = model.training, model.model.gradient_checkpointing
        compiled: list[torch.nn.Module] = []
        learners = self.stage.learners(config)
        adapters = lora.adapted(model, config.lora, config.seed, config.model, learners == "all" and model.is_sparse)
        with locked(self.out), adapters as self.adapter, learning(model, learners):
            if newest(self.out, self.resume) != self._resumed:
                raise UserError(f"{self.out}: another run has trained there meanwhile; start again")
            model.model.gradient_checkpointing = config.activation_checkpointing
            try:
                self._load_data()
                self._restore()
                model.train()
                rehearsal = None
                if self._rehearse and self.first < self.last:
                    needed, rehearsal = estimate(config, self.stage, model, self.device)
                    log.info("%s: %s", config.stage, needed)
                self.forecast = forecast(config, model, self.first, rehearsal)
                if config.compile:
                    compiled = self._compile()
                yield self
            finally:
                for unit in compiled:
                    unit._compiled_call_impl = None
                model.model.gradient_checkpointing = checkpointing
                model.zero_grad(set_to_none=True)
                model.train(was_training)

    def _load_data(self) -> None:
        config = self.config
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(tokenizer, self.model.config)
        _check_positions(config, self.model)
        self.datasets = [
            build_dataset(config.data, tokenizer, p.context, p.steps * p.sequences, config.seed + 1000 * i)
            for i, p in enumerate(config.phases)
        ]
        self.fingerprint = _fingerprint(config, [d.fingerprint for d in self.datasets])

    def _restore(self) -> None:
        """Sets the optimizer and the random state, to those of a new run or of its last checkpoint."""
        self.optimizer = make_optimizer(self.config, self.model, self.device)
        torch.manual_seed(self.config.seed)
        if self._resumed is not None:
            self._check_same(self._state)
            if self.adapter is not None:
                lora.restore_adapter(self.adapter, self._resumed)
            restore_optimizer(self._resumed, self.model, self.optimizer)
        elif not began_as(self.out, to_dict(self.config)):
            raise self._other_run()
        write_json(self.out / CONFIG, to_dict(self.config))

    def _check_same(self, state: RunState) -> None:
        """UserError for other settings or data than the checkpoint's; further steps are none."""
        if state.fingerprint == self.fingerprint:
            return
        before = replace(self.config, phases=state.phases)
        prints = [dataset.fingerprint for dataset in self.datasets[: len(state.phases)]]
        if not extends(self.config.phases, state.phases) or state.fingerprint != _fingerprint(before, prints):
            raise self._other_run()
        log.info(
            "%s: extended from %d to %d steps; from step %d on, learning rates are those of the longer run",
            self.out,
            total_steps(state.phases),
            self.last,
            self.first + 1,
        )

    def _other_run(self) -> UserError:
        return UserError(
            f"{self.out}: {what_differs(self.out, to_dict(self.config))}; resume with the same, or name another folder"
        )

    def _compile(self) -> list[torch.nn.Module]:
        # An indexer's loss breaks a layer's program into pieces, which gain little over its feed-forward part alone.
        whole = self.stage.objective(self.config) == "none"
        units = [layer if whole else cast(DecoderLayer, layer).mlp for layer in self.model.model.layers]
        for unit in units:
            unit.compile()
        return units

    def batches(self) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """(step, micro-batches) from the first step that is left to do."""
        return _batches(self.config, self.datasets, self.first, self.last)

    def step(self, number: int, micro: list[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step. Returns its figures.

        UserError, before anything is changed, if a loss or a gradient is not finite.
        """
        config, model, optimizer = self.config, self.model, self.optimizer
        begin = time.perf_counter()
        totals = StepTotals(
            labels=sum(_label_weight(b) for b in micro), queries=sum(b["input_ids"].numel() for b in micro)
        )
        yarn = config.phases[position(config.phases, number).phase].yarn
        assert self.options.objective is not None
        objective = replace(self.options.objective, first=number % self.options.objective.every)
        share = lr_share(config.optimizer, config.phases, number)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        sums: dict[str, Tensor] = {}
        loads: tuple[Tensor, ...] = ()
        try:
            for batch in micro:
                options = replace(self.options, yarn=yarn, objective=objective)
                losses = backward(self.stage, model, batch, totals, options, self.device)
                for name, value in (("loss", losses.total.detach()), ("lm", losses.lm), ("kl", losses.kl)):
                    if value is not None:
                        sums[name] = sums[name] + value if name in sums else value
                loads = tuple(a + b for a, b in zip(loads, losses.loads, strict=True)) if loads else losses.loads
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            raise UserError(f"step {number + 1}: {error}; {DIVERGED}") from error  # the ops select and quantize no NaN
        with_gradient = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        indexers = [p for name, p in with_gradient if is_indexer(name)]
        trunk = [p for name, p in with_gradient if not is_indexer(name)]
        norms = {
            "grad_norm": torch.nn.utils.clip_grad_norm_(trunk, config.optimizer.clip) if trunk else None,
            "indexer_grad_norm": torch.nn.utils.clip_grad_norm_(indexers, config.optimizer.indexer_clip)
            if indexers
            else None,
        }
        figures = {k: float(v) for k, v in (sums | {k: v for k, v in norms.items() if v is not None}).items()}
        if not all(math.isfinite(v) for v in figures.values()):
            raise UserError(
                f"step {number + 1}: the loss or a gradient is not finite "
                f"({', '.join(f'{k} {v:.3g}' for k, v in figures.items())}); {DIVERGED}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.stage.after_step is not None:
            self.stage.after_step(model, config, loads)
        seconds = time.perf_counter() - begin
        return figures | {
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "tokens_per_second": totals.queries / seconds,
        }

    def save(self, done: int) -> Path:
        """Writes the checkpoint after `done` steps. UserError on a full disk, with everything older intact.

        From then on it is what the model comes from: a card that is written later takes this training over from it.
        """
        state = RunState(done, self.fingerprint, self.config.phases)
        folder = save_state(self.out, self.model, self.optimizer, state, self.config.keep, adapter=self.adapter)
        self.model.folder = folder
        return folder


def run(
    config: TrainConfig,
    model: DecoderForCausalLM | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
    rehearse: bool = True,
) -> DecoderForCausalLM:
    """Trains and returns the model, in evaluation mode, its last checkpoint in `config.out`.

    Under LoRA the adapter is merged into the model that is returned, and that is saved in `config.out`/merged.

    `model`: trained in place of `config.model` (a path or bundled name); if training fails, it has the weights of the
    last step and is otherwise as it was. Its `folder` is the last checkpoint, so that a save of it states this
    training. `resume`: continue from the newest checkpoint of `config.out`, or begin if there is none.
    `on_step(step, figures)` is called after every step. `rehearse`: time a pass first, and say what the run needs (a
    run of a few steps takes hardly longer than that). Raises UserError for bad configs and data, a NaN loss or a full
    disk (the last checkpoint stays), and Interrupted after Ctrl-C.
    """
    this = Run(config, model, resume, rehearse)
    with contextlib.ExitStack() as stack:
        stack.enter_context(this.prepared())
        tracker = stack.enter_context(contextlib.closing(Tracker(config, this.first)))
        # Each kind of layer is compiled anew for every phase; past the default limit torch would go on uncompiled.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        stop = stack.enter_context(_StopSignal())
        advance = stack.enter_context(_bar(progress, config.stage, this.first, this.last))
        for number, batch in this.batches():
            figures = this.step(number, batch)
            done = number + 1
            if done % config.log_every == 0 or done == this.last:
                tracker.row(done, figures)
            if on_step is not None:
                on_step(done, figures)
            this.forecast.advance()
            if done < this.last and (left := this.forecast.news()):
                log.info("%s: %s left, at the speed of the last steps", config.stage, left)
            advance(figures, this.forecast.seconds)
            due = config.save_every and done % config.save_every == 0
            if due or stop.requested or done == this.last:
                folder = this.save(done)
            if stop.requested:
                raise Interrupted(f"saved {folder} after step {done} of {this.last}; continue with --resume")
    if config.lora is not None and config.lora.merge:
        with locked(this.out):
            lora.save_merged(this.model, this.out, checkpoints(this.out)[-1])
    return this.model.eval()


def _start(config: TrainConfig, model: DecoderForCausalLM | None) -> DecoderForCausalLM:
    if model is not None:
        return model
    if config.stage == "pretrain" and config.shape and config.model:
        return pretrain.extended_model(config)
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
    """(step, micro-batches) from `first` on. Each phase reads its own dataset, from the first sequence of the step."""
    step = first
    while step < last:
        at = position(config.phases, step)
        phase = config.phases[at.phase]
        dataset = datasets[at.phase]
        rest = Subset(dataset, range(at.sequence, len(dataset)))
        loader = DataLoader(
            rest,
            batch_size=phase.micro_batch,
            num_workers=config.workers,
            prefetch_factor=4 if config.workers else None,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else the loader would draw its seed from the run's random state
        )
        micro: list[dict[str, Tensor]] = []
        for batch in loader:
            micro.append(batch)
            if len(micro) * phase.micro_batch == phase.sequences:
                yield step, micro
                micro, step = [], step + 1


def _leave_signals(worker: int) -> None:
    """Ignores Ctrl-C and SIGTERM, which may reach all processes: batches must keep coming until the loop has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _label_weight(batch: dict[str, Tensor]) -> float:
    # NumPy, since so short a sum is not worth waking torch's threads, whose cores the data workers use.
    predicted = batch["labels"].numpy()[:, 1:] != -100
    weights = batch.get("loss_weights")
    return float(predicted.sum() if weights is None else weights.numpy()[:, 1:][predicted].sum(dtype="float64"))


def make_optimizer(config: TrainConfig, model: DecoderForCausalLM, device: torch.device) -> torch.optim.AdamW:
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
        self.requested = False
        self.before: dict[int, Any] = {}  # handlers, as signal.signal gives them

    def __enter__(self) -> "_StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # outside the main thread signals cannot be handled
                self.before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _bar(show: bool, name: str, first: int, last: int) -> Iterator[Callable[[dict[str, float], float], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}"), disable=not show) as bar:
        task = bar.add_task(name, total=last, completed=first, figures="", left="")

        def advance(figures: dict[str, float], seconds: float) -> None:
            text = "  ".join(f"{k} {figures[k]:.3f}" for k in ("lm", "kl") if k in figures)
            bar.update(task, advance=1, figures=text, left=f"left {cost.duration(seconds)}" if seconds else "")

        yield advance
