"""Checkpoints that are written beside the steps of a run, by all of its ranks.

A checkpoint's files hold whole tensors and are dealt to the ranks. Between two steps the tensors are gathered one after
the other, and each rank keeps those of its files in host memory. A thread writes them while the run goes on. After the
first step by whose end every rank has written its files, rank 0 gives the folder its name. Until then it has another,
so a checkpoint that was cut off is none. One process writes at once if it is on a CPU, where it would only copy its own
memory, or if the copy does not fit into the host's memory.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError

from tokensieve import checkpoint
from tokensieve.checkpoint import ShardWriter
from tokensieve.config import UserError
from tokensieve.files import MERGED, locked, remedy
from tokensieve.machine import free_memory, rank_info
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.train import lora
from tokensieve.train.parallelize import blocks, experts_of, whole
from tokensieve.train.state import (
    OPTIMIZER,
    STATE,
    RunState,
    checkpoints,
    checksum_of,
    folder_of,
    optimizer_tensors,
    random_states,
)

log = logging.getLogger("tokensieve")

FILE_BYTES = 5e9  # of a file, unless one tensor is larger


class Pending:
    """A checkpoint between its first file and its name.

    exported: the model's config.json. adapter: PEFT's model, if the checkpoint holds that.
    """

    def __init__(
        self,
        folder: Path,
        state: RunState,
        model: DecoderForCausalLM,
        adapter: Any,
        writers: list[ShardWriter],
        exported: dict[str, Any],
    ):
        self.folder, self.state, self.model, self.adapter = folder, state, model, adapter
        self.writers, self.exported = writers, exported
        self.new = checkpoint.saving_folder(folder)
        self.names: list[str] = []  # of all ranks' files
        self.checksums: dict[str, int] = {}  # of this rank's files
        self.failure: UserError | None = None
        # A process that ends, ends: what its thread has written then is no checkpoint.
        self.thread = Thread(target=self.write, daemon=True)

    def write(self) -> None:
        """Writes this rank's files."""
        try:
            with checkpoint.writing_errors(self.folder):
                names: list[str] = []
                for writer in self.writers:
                    files = writer.close()
                    for name in writer.own(files):
                        checkpoint.sync(self.new / name)
                        self.checksums[name] = checksum_of(self.new / name)
                    names += files
                self.names = names
        except UserError as error:
            self.failure = error

    def wait(self) -> None:
        """Returns once nothing more is written."""
        if self.thread.ident is not None:
            self.thread.join()

    def check(self) -> None:
        """UserError if this rank's files could not be written."""
        if self.failure is not None:
            raise self.failure
        assert self.names, "the writing thread has failed; its traceback is above"


class Saver:
    """The checkpoints of one run. All ranks call the same methods in the same order.

    keep: number of checkpoints that stay.
    """

    def __init__(self, run: Path, keep: int, mesh: Mesh):
        self.run, self.keep, self.mesh = run, keep, mesh
        self._pending: Pending | None = None

    def check(self, model: DecoderForCausalLM, adapter: Any = None, merge: bool = False) -> None:
        """UserError, on all ranks, if there is no room for a checkpoint: on the disk, and in the memory of several.

        Called before the first step, so that it is not the first checkpoint that finds out. merge: the merged model
        will be written too.
        """
        mesh, size = self.mesh, checkpoint_bytes(model, adapter)
        merged = sum(p.numel() * p.element_size() for p in model.parameters()) if merge else 0
        self._lead(lambda: checkpoint.require_space(self.run, size + merged), self.run)

        def hold() -> None:
            copied, free = max(size, merged) * rank_info().local_size // mesh.size, free_memory()
            if mesh.size > 1 and copied > free:
                raise UserError(
                    f"{self.run}: while a checkpoint is written, the machine of rank {mesh.rank} keeps about "
                    f"{copied / 1e9:.3g} GB of it in memory, and {free / 1e9:.3g} GB are free; free memory, or divide "
                    "the run over more machines"
                )

        mesh.agree(hold)

    def begin(
        self, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, state: RunState, adapter: Any = None
    ) -> Path:
        """Takes the checkpoint of `state`, once the one before is finished. Returns the folder that it will be.

        adapter: PEFT's model; the checkpoint then holds what it trains instead of the model.

        UserError, on all ranks, on a full disk, with all older checkpoints intact.
        """
        self.settle()
        mesh, folder = self.mesh, folder_of(self.run, state.step).resolve()
        size = checkpoint_bytes(model, adapter)
        later = beside_steps(mesh, size)
        if adapter is None:
            self._check_extras(model)

        def begin() -> None:
            checkpoint.require_space(self.run, size)
            checkpoint.begin_folder(folder)

        self._lead(begin, folder)
        try:
            with self._saving(folder):
                writers, exported = self._gather(folder, model, optimizer, adapter, later)
        except UserError as error:
            raise mesh.lone_error(str(error)) from error
        pending = Pending(folder, state, model, adapter, writers, exported)
        if later:
            pending.thread.start()
        else:
            pending.write()
        self._pending = pending
        if not later:
            self.settle()
        return folder_of(self.run, state.step)

    def _gather(
        self, folder: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, adapter: Any, later: bool
    ) -> tuple[list[ShardWriter], dict[str, Any]]:
        """Writers that have all tensors of a checkpoint, and the config.json of its model.

        later: this rank's tensors are copied; otherwise only the last file is still to be written.
        """
        mesh, new, exported = self.mesh, checkpoint.saving_folder(folder), model.config.to_dict()

        def writer(stem: str, file_bytes: float, first: int) -> ShardWriter:
            """A writer whose first file is that of rank `first`."""
            return ShardWriter(new, file_bytes, stem, (mesh.rank - first) % mesh.size, mesh.size, later)

        if adapter is None:
            weights = writer("model", FILE_BYTES, 0)
            exported = _add_model(weights, model)
        else:
            weights = writer(lora.STEM, float("inf"), 0)
            for name, tensor in lora.tensors_of(adapter).items():
                weights.add(name, whole(tensor))
        moments = writer(OPTIMIZER, FILE_BYTES, mesh.size - 1)
        for name, tensor in (optimizer_tensors(model, optimizer) | random_states(mesh)).items():
            if experts_of(tensor) is None:
                moments.add(name, whole(tensor))
            else:
                moments.add(name, tensor, blocks(tensor))
        return [weights, moments], exported

    def settle(self, wait: bool = True) -> None:
        """Finishes the checkpoint on its way, if every rank has written its files; with `wait` it waits until then.

        From then on it is what the model comes from: a card that is written later takes this training over from it.

        UserError, on all ranks, on a full disk, with all older checkpoints intact.
        """
        pending = self._pending
        if pending is None or (not wait and self.mesh.any(pending.thread.is_alive())):
            return
        pending.wait()
        self._pending = None
        with self._saving(pending.folder):
            self.mesh.agree(pending.check)
            sums = torch.tensor([pending.checksums.get(name, 0) for name in pending.names])
            sums = self.mesh.all_reduce(sums) if self.mesh.size > 1 else sums
            checksums = dict(sorted(zip(pending.names, sums.tolist(), strict=True)))
            self._lead(lambda: _finish(pending, checksums), pending.folder)
        model, source = pending.model, getattr(pending.model, "folder", None)
        model.folder = folder_of(self.run, pending.state.step)
        if pending.adapter is None and model.extras is not None:
            model.extras = replace(model.extras, folder=pending.folder)
        adapted = None if pending.adapter is None else pending.exported

        def complete() -> None:
            if self.mesh.leads:
                with _complete(pending.folder):
                    checkpoint.write_card(model.folder, source and Path(source), adapted=adapted)
                    self._rotate()

        self.mesh.agree(complete)

    def close(self) -> None:
        """Ends the saving, however the run has ended; nothing is written afterwards.

        One process finishes the checkpoint on its way. Several ranks cannot, since one that failed alone does not know
        where the others are: each waits for its own thread, and the checkpoint is lost.
        """
        if self.mesh.size > 1:
            if self._pending is not None:
                self._pending.wait()
            return
        try:
            self.settle()
        except UserError as error:  # beside the error that the run ends with
            log.warning("%s", error)

    def save_merged(self, model: DecoderForCausalLM) -> None:
        """Writes the model with its adapter merged into the run's folder; from then on the model comes from there.

        Its card records the training of the last checkpoint. UserError as `settle`.
        """
        mesh, folder = self.mesh, self.run.resolve() / MERGED
        new, source, trained = checkpoint.saving_folder(folder), getattr(model, "folder", None), checkpoints(self.run)
        with contextlib.ExitStack() as held:
            mesh.agree(lambda: held.enter_context(locked(self.run)) if mesh.leads else None)
            self._check_extras(model)
            held.enter_context(self._saving(folder))
            self._lead(lambda: checkpoint.begin_folder(folder), folder)
            writer = ShardWriter(new, FILE_BYTES, "model", mesh.rank, mesh.size, mesh.size > 1)
            exported = _add_model(writer, model)

            def finish() -> None:
                checkpoint.write_config(new, exported)
                if source is not None:
                    checkpoint.copy_tokenizer(Path(source), new)
                checkpoint.end_folder(folder)
                with _complete(folder):
                    checkpoint.write_card(folder, source and Path(source), replace=True, trained=trained[-1])

            def write() -> None:
                with checkpoint.writing_errors(folder):
                    for name in writer.own(writer.close()):
                        checkpoint.sync(new / name)

            mesh.agree(write)
            self._lead(finish, folder)
        for reason in checkpoint.exportable(model.config):
            log.warning("%s: %s", folder, reason)
        model.folder = self.run / MERGED

    def _check_extras(self, model: DecoderForCausalLM) -> None:
        """UserError, on all ranks, if what a save copies from the model's folder is gone for one of them."""
        if model.extras is not None:
            self.mesh.agree(model.extras.check)

    def _lead(self, act: Callable[[], Any], folder: Path) -> None:
        """Lets rank 0 act on a checkpoint. UserError, on all ranks, as `writing_errors`."""

        def lead() -> None:
            if self.mesh.leads:
                with checkpoint.writing_errors(folder):
                    act()

        self.mesh.agree(lead)

    @contextlib.contextmanager
    def _saving(self, folder: Path) -> Iterator[None]:
        """Within the block the checkpoint's files are written; if it fails, rank 0 removes them."""
        with contextlib.ExitStack() as undo:
            if self.mesh.leads:
                undo.callback(shutil.rmtree, checkpoint.saving_folder(folder), ignore_errors=True)
            with checkpoint.writing_errors(folder):
                yield
            undo.pop_all()

    def _rotate(self) -> None:
        newest = checkpoints(self.run)[-max(1, self.keep) :]
        for old in self.run.glob("step-*"):
            if old.is_dir() and old not in newest:
                (old / STATE).unlink(missing_ok=True)  # first, so that after a kill the rest does not look complete
                shutil.rmtree(old)


def _add_model(writer: ShardWriter, model: DecoderForCausalLM) -> dict[str, Any]:
    """Adds all ranks' tensors to a writer, whole. Returns their config.json. All ranks call this."""
    tensors = ((name, block) for name, tensor in model.state_dict().items() for block in blocks(tensor))
    return checkpoint.add_model(writer, model.config.to_dict(), tensors, model.extras)


def _finish(pending: Pending, checksums: dict[str, int]) -> None:
    """Writes the files that there are one of, and gives the folder its name."""
    if pending.adapter is None:
        checkpoint.write_config(pending.new, pending.exported)
    else:
        lora.save_settings(pending.adapter, pending.new)
    (pending.new / STATE).write_text(json.dumps(asdict(replace(pending.state, checksums=checksums))))
    if (source := getattr(pending.model, "folder", None)) is not None:
        checkpoint.copy_tokenizer(Path(source), pending.new)
    checkpoint.end_folder(pending.folder)


def clear(run: Path) -> None:
    """Removes the files of checkpoints that were cut off. UserError if they cannot be removed."""
    for folder in run.glob(checkpoint.saving_folder(run / "step-*").name):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be removed ({error}); {remedy(error)}") from error


@contextlib.contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """Within the block is done what follows a checkpoint that has its name. UserError if the system fails there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = remedy(error) if isinstance(error, OSError) else "check the path and its permissions"
        raise UserError(
            f"{folder}: the checkpoint is complete, but its card could not be written or an older checkpoint removed "
            f"({error}); {what}, then continue with --resume"
        ) from error


def checkpoint_bytes(model: DecoderForCausalLM, adapter: Any = None) -> int:
    """Bytes of a checkpoint's tensors: of the model, or of PEFT's adapter alone, and two moments of all that learns.

    The multi-token-prediction layers, which a save copies, are left out.
    """
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    saved = model.state_dict() if adapter is None else lora.tensors_of(adapter)
    learned = [p for p in model.parameters() if p.requires_grad]
    tensors = [*(t for name, t in saved.items() if name not in tied), *learned, *learned]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def beside_steps(mesh: Mesh, size: int) -> bool:
    """Whether a checkpoint of `size` bytes is copied to host memory and written while training goes on."""
    if mesh.size > 1:
        return True
    free = free_memory()
    if mesh.device.type == "cuda" and size > free:
        log.info(
            "training waits for the checkpoint: a copy of it is %.3g GB, and %.3g GB of memory are free",
            size / 1e9,
            free / 1e9,
        )
    return mesh.device.type == "cuda" and size <= free
