"""The one training loop: pretraining, warm-up and adaptation differ in a `Stage`, and in nothing else.

A step's batch, its gradients and its random numbers are functions of (config, step): cutting it into other
micro-batches changes only rounding, and resuming changes nothing at all.
"""

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tokensieve.config import TrainConfig, UserError, to_dict
from tokensieve.data import build_dataset
from tokensieve.files import LOCK, locked, seen, write_json
from tokensieve.machine import choose_device, code_digest, rank_info
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM, check_tokenizer, load, load_tokenizer, model_path
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train import adapt, lora, pretrain, warmup
from tokensieve.train.batches import batches, step_totals
from tokensieve.train.budget import budget_texts, learn_budget
from tokensieve.train.estimate import estimate, forecast
from tokensieve.train.learning import check_indexers, is_indexer, learning
from tokensieve.train.parallelize import (
    Root,
    check_model,
    clip,
    divide,
    empty_model,
    gather_forward_only,
    read_parts,
    shard,
)
from tokensieve.train.progress import progress_bar
from tokensieve.train.saving import Saver, clear
from tokensieve.train.schedule import check_phases, extends, lr_share, position, total_steps
from tokensieve.train.stage import Stage, backward, options_of, try_selector
from tokensieve.train.starting import check_positions, make_optimizer, start, starting_config
from tokensieve.train.state import (
    CONFIG,
    STATE,
    RunState,
    began_as,
    decisive,
    folder_of,
    newest,
    read_state,
    restore_optimizer,
    what_differs,
)
from tokensieve.train.stopping import StopSignal
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
        self,
        config: TrainConfig,
        model: DecoderForCausalLM | None = None,
        resume: bool = False,
        rehearse: bool = True,
        mesh: Mesh | None = None,
    ):
        """model: trained in place of `config.model`. On several ranks its parameters stay sharded.

        resume: continue from the newest checkpoint of `config.out`, if there is one.

        rehearse: in one process, time a pass before the first step, and say how long the run will take and what memory
        it needs.

        mesh: the ranks that train together, each of which makes this run; None: there is one process.
        """
        if mesh is None and (size := rank_info().size) > 1:
            raise UserError(
                f"torchrun started {size} processes, and this run knows of one; pass it mesh= of "
                "tokensieve.mesh.join_mesh, or start it without torchrun"
            )
        self.mesh = mesh or Mesh(0, 1, torch.device(choose_device(config.device)))
        self.device = self.mesh.device
        self.config, self.out = config, Path(config.out)
        self._rehearse = rehearse and self.mesh.size == 1
        self.resume, self.stage = resume, STAGES[config.stage]
        self.mesh.check_same("their config", json.dumps(to_dict(config)))
        if self.mesh.size > 1:
            self.mesh.check_same("their code", code_digest())
        self.now = "before the first step"  # names the part of the run in messages
        self.mesh.agree(self._check)
        self._resumed = self._newest()
        with self._memory_errors():
            self._parts = self.mesh.agree(lambda: self._begin(model))
        self.root, self.adapter = Root(self.model), None
        self.saver = Saver(self.out, config.keep, self.mesh)

    def _check(self) -> None:
        """Checks the settings of the run, and divides it over the ranks."""
        check_phases(self.config.phases)
        self.division = divide(self.config, self.mesh)
        if self.config.lora is not None:
            import peft  # noqa: F401  before anything takes long; the command names a package that is missing

    def _newest(self) -> Path | None:
        """The checkpoint that rank 0 finds, from which all continue; None if the run begins."""
        found = self.mesh.agree(lambda: newest(self.out, self.resume) if self.mesh.leads else None)
        if self.mesh.size > 1:
            (step,) = self.mesh.broadcast([int(found.name[5:]) if found else -1])
            found = folder_of(self.out, step) if step >= 0 else None
            self.mesh.agree(lambda: self._see(found / STATE) if found else None)
        return found

    def _see(self, path: Path) -> None:
        """UserError if this rank does not see a file of rank 0 in the run's folder."""
        if not seen(path):
            raise UserError(
                f"{self.out}: rank {self.mesh.rank} does not see {path.relative_to(self.out)} of rank 0 there; name a "
                "folder on a file system that all machines share"
            )

    def _begin(self, model: DecoderForCausalLM | None) -> Path | None:
        """Makes the model. Returns the checkpoint whose parts it still lacks, on several ranks."""
        config = self.config
        if self._resumed:
            self._state = read_state(self._resumed, self.mesh)
            if (self._resumed / lora.TENSORS).exists() != (config.lora is not None):
                raise self._other_run()
        self.first = self._state.step if self._resumed else 0
        several, parts = self.mesh.size > 1, None
        resumed = self._resumed if config.lora is None else None
        if several:
            check_model(config, starting_config(config, model, resumed), self.mesh)
        if several and (resumed or (model is None and config.model)):
            parts = resumed or model_path(config.model)
            self.model = empty_model(starting_config(config, model, resumed))
        elif resumed:
            self.model = load(resumed, torch.float32, self.device)
        else:
            # Several ranks move the layers one by one, as they shard them.
            self.model = start(config, model).to(torch.device("cpu") if several else self.device)
        self.last = total_steps(config.phases)
        self.options = replace(options_of(self.stage, config), context=self.division.context)
        if self.stage.objective(config) != "none":
            check_indexers(self.model, config.stage)
        return parts

    @contextlib.contextmanager
    def divided(self) -> Iterator[None]:
        """Within the block the model has its adapters, and on several ranks this one's parts of all parameters."""
        config, model, parts = self.config, self.model, self._parts
        indexers = self.stage.learners(config) == "all" and model.is_sparse
        divided = config.expert_parallel > 1
        with lora.adapted(model, config.lora, config.seed, config.model, indexers, divided) as self.adapter:
            self.root = shard(model, self.division)
            if self.stage.learners(config) == "indexers":
                gather_forward_only(self.root)
            if parts is not None:
                adapters = lora.first_weights(model, config.seed)
                self.mesh.agree(lambda: read_parts(model, parts, self.division, adapters))
            yield

    @contextlib.contextmanager
    def prepared(self) -> Iterator["Run"]:
        """Within the block the model trains. Afterwards only its weights have changed."""
        config, model = self.config, self.model
        was_training, checkpointing = model.training, model.model.gradient_checkpointing
        compiled: list[torch.nn.Module] = []

        def hold() -> None:
            held.enter_context(locked(self.out))
            if newest(self.out, self.resume) != self._resumed:
                raise UserError(f"{self.out}: another run has trained there meanwhile; start again")
            clear(self.out)

        with contextlib.ExitStack() as held:
            held.enter_context(self._memory_errors())
            self.mesh.agree(lambda: hold() if self.mesh.leads else None)
            self.mesh.agree(lambda: self._see(self.out / LOCK))
            held.enter_context(self.divided())
            held.enter_context(learning(model, self.stage.learners(config)))
            held.callback(self.saver.close)  # while the folder is held, and the adapter is not merged yet
            model.model.gradient_checkpointing = config.activation_checkpointing
            try:
                self.mesh.leader_first(self._load_data)
                self.mesh.check_same("their data", self.fingerprint)
                self._restore()
                if self.first < self.last:
                    self.saver.check(model, self.adapter, config.lora is not None and config.lora.merge)
                    if self.mesh.size == 1:
                        try_selector(config, model, self.device)
                self.mesh.agree(lambda: write_json(self.out / CONFIG, to_dict(config)) if self.mesh.leads else None)
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
                    del unit.forward
                model.model.gradient_checkpointing = checkpointing
                model.zero_grad(set_to_none=True)
                model.train(was_training)

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        """Within the block a lack of device memory is a UserError, on a rank alone, that names the step."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            several = self.mesh.size > 1
            who = f"rank {self.mesh.rank}" if several else "the run"
            more = "divide the model over several GPUs with torchrun"
            if several:
                more = "start more ranks" if self.config.offload else "start more ranks, or set offload=true"
            raise self.mesh.lone_error(
                f"{self.now}: {who} has run out of memory on {self.device}; set activation_checkpointing=true, make "
                f"phases.context or phases.micro_batch smaller, or {more}"
            ) from error

    def _load_data(self) -> None:
        config = self.config
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_tokenizer(tokenizer, self.model.config)
        check_positions(config, self.model)
        self.datasets = [
            build_dataset(config.data, tokenizer, p.context, p.steps * p.sequences, config.seed + 1000 * i)
            for i, p in enumerate(config.phases)
        ]
        self.fingerprint = _fingerprint(config, [d.fingerprint for d in self.datasets])
        self.budget_texts = budget_texts(config, self.model, self.datasets[-1])

    def _restore(self) -> None:
        """Sets the optimizer and the random state, to those of a new run or of its last checkpoint."""
        self.optimizer = make_optimizer(self.config, self.model, self.device)
        torch.manual_seed(self.config.seed + self.mesh.rank)  # ranks drop out different values
        self.mesh.agree(self._check_run)
        if self._resumed is not None:
            self.mesh.agree(self._restore_adapter)
            restore_optimizer(self._resumed, self.model, self.optimizer, self.mesh)

    def _restore_adapter(self) -> None:
        if self.adapter is not None and self._resumed is not None:
            lora.restore_adapter(self.adapter, self._resumed)

    def _check_run(self) -> None:
        """UserError if the run of the folder is another one."""
        if self._resumed is not None:
            self._check_same(self._state)
        elif not began_as(self.out, to_dict(self.config)):
            raise self._other_run()

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
            unit.forward = torch.compile(unit.forward)  # the hooks by which FSDP gathers a layer stay outside
        return units

    def batches(self) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """(step, this rank's micro-batches) from the first step that is left to do."""
        return batches(self.config, self.datasets, self.first, self.last, self.division)

    def step(self, number: int, micro: list[dict[str, Tensor]]) -> dict[str, float]:
        """One optimizer step. Returns its figures.

        UserError, before anything is changed, if a loss or a gradient is not finite.
        """
        config, model, optimizer = self.config, self.model, self.optimizer
        self.now = f"step {number + 1}"
        begin = time.perf_counter()
        totals = step_totals(micro, self.division)
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
                losses = backward(self.stage, self.root, batch, totals, options, self.device)
                for name, value in (("loss", losses.total.detach()), ("lm", losses.lm), ("kl", losses.kl)):
                    if value is not None:
                        sums[name] = sums[name] + value if name in sums else value
                loads = tuple(a + b for a, b in zip(loads, losses.loads, strict=True)) if loads else losses.loads
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            # The ops select and quantize no NaN.
            raise self.mesh.lone_error(f"{self.now}: {error}; {DIVERGED}") from error
        if self.mesh.size > 1:
            sums = dict(zip(sums, self.mesh.all_reduce(torch.stack([*sums.values()])), strict=True))
            loads = tuple(self.mesh.all_reduce(load) for load in loads)
        with_gradient = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        indexers = [p for name, p in with_gradient if is_indexer(name)]
        trunk = [p for name, p in with_gradient if not is_indexer(name)]
        norms = {
            "grad_norm": clip(trunk, config.optimizer.clip) if trunk else None,
            "indexer_grad_norm": clip(indexers, config.optimizer.indexer_clip) if indexers else None,
        }
        figures = {k: float(v) for k, v in (sums | {k: v for k, v in norms.items() if v is not None}).items()}
        if not all(math.isfinite(v) for v in figures.values()):
            self.saver.settle()  # the last good weights; all ranks come here
            raise UserError(
                f"{self.now}: the loss or a gradient is not finite "
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
        """Takes the checkpoint after `done` steps; `self.saver.settle` finishes it. Returns the folder that it will be.

        UserError on a full disk, with everything older intact.
        """
        state = RunState(done, self.fingerprint, self.config.phases)
        return self.saver.begin(self.model, self.optimizer, state, self.adapter)


def run(
    config: TrainConfig,
    model: DecoderForCausalLM | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    progress: bool = True,
    rehearse: bool = True,
    mesh: Mesh | None = None,
) -> DecoderForCausalLM:
    """Trains and returns the model, in evaluation mode, its last checkpoint in `config.out`.

    Under LoRA the adapter is merged into the model that is returned, and that is saved in `config.out`/merged.

    `model`: trained in place of `config.model` (a path or bundled name); if training fails, it has the weights of the
    last step and is otherwise as it was. Its `folder` is the last checkpoint, so that a save of it states this
    training. `resume`: continue from the newest checkpoint of `config.out`, or begin if there is none.
    `on_step(step, figures)` is called after every step. `rehearse`: time a pass first, and say what the run needs (a
    run of a few steps takes hardly longer than that). `mesh`: the ranks that train together, each of which calls this
    (`tokensieve.mesh.join_mesh`). Raises UserError for bad configs and data, a NaN loss, a lack of device memory or a
    full disk (the last checkpoint stays), and Interrupted after Ctrl-C.
    """
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(mesh.together())
        this = Run(config, model, resume, rehearse, mesh)
        leads = this.mesh.leads
        stack.enter_context(this.prepared())
        tracker = this.mesh.agree(lambda: Tracker(config, this.first) if leads else None)
        if tracker is not None:
            stack.enter_context(contextlib.closing(tracker))
        # Each kind of layer is compiled anew for every phase; past the default limit torch would go on uncompiled.
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        stop = stack.enter_context(StopSignal())
        advance = stack.enter_context(progress_bar(progress and leads, config.stage, this.first, this.last))
        learn_budget(config, this.model, this.budget_texts, this.first, this.last)
        for number, batch in this.batches():
            figures = this.step(number, batch)
            done = number + 1
            learn_budget(config, this.model, this.budget_texts, done, this.last)
            if done % config.log_every == 0 or done == this.last:
                this.mesh.agree(partial(tracker.row, done, figures) if tracker is not None else lambda: None)
            if on_step is not None:
                on_step(done, figures)
            this.forecast.advance()
            if done < this.last and (left := this.forecast.news()):
                log.info("%s: %s left, at the speed of the last steps", config.stage, left)
            advance(figures, this.forecast.seconds)
            due = config.save_every and done % config.save_every == 0
            stopping = this.mesh.any(stop.requested)
            if due or stopping or done == this.last:
                folder = this.save(done)
            this.saver.settle(wait=stopping or done == this.last)
            if stopping:
                raise Interrupted(f"saved {folder} after step {done} of {this.last}; continue with --resume")
    if config.lora is not None and config.lora.merge:
        this.now = "merging"
        with this.mesh.together(), this._memory_errors():
            this.saver.save_merged(this.model)
    return this.model.eval()


def _fingerprint(config: TrainConfig, data: list[str]) -> str:
    return hashlib.blake2b(
        json.dumps([decisive(to_dict(config)), data], sort_keys=True).encode(), digest_size=16
    ).hexdigest()
