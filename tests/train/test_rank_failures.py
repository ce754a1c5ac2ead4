"""Several ranks, one of which meets a file, a folder or a machine that the others do not: all end with its error."""

import errno
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import ranks
from tests.support.training import Workplace, workplace
from tests.support.training_runs import back_to, run
from tokensieve import checkpoint, files
from tokensieve.config import UserError
from tokensieve.train import loop, saving, state

# in a rank's process


def another_machine(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(loop, "LOCK", f"of-rank-{rank}" if rank else ".lock")
    patch.setattr(files, "VISIBLE_AFTER", 0.5)


def late(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The file system shows rank 1 each file of rank 0 when it asks for the third time."""
    real, asked = Path.exists, Counter()

    def exists(path: Path) -> bool:
        asked[path] += 1
        return real(path) and (rank == 0 or path.name not in (".lock", "state.json") or asked[path] > 2)

    patch.setattr(Path, "exists", exists)


def no_checkpoint_here(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 1 sees the run's folder without its checkpoints."""
    real = Path.exists
    patch.setattr(files, "VISIBLE_AFTER", 0.5)
    patch.setattr(Path, "exists", lambda path: real(path) and not (rank and path.name == "state.json"))
    if rank:
        patch.setattr(loop, "newest", lambda out, resume: None)


def not_mine(patch: pytest.MonkeyPatch, rank: int) -> None:
    """What was cut off belongs to somebody else."""

    def rmtree(folder: Path, ignore_errors: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    patch.setattr(saving.shutil, "rmtree", rmtree)


def unreadable_moments(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Rank 1 cannot open the optimizer's files."""

    def safe_open(path: Path, framework: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if rank:
        patch.setattr(state, "safe_open", safe_open)


def extras_gone(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The folder of the multi-token-prediction layer is gone for rank 1, when the checkpoint is taken."""
    begin = saving.Saver.begin

    def without(saver: saving.Saver, model: Any, *given: Any) -> Path:
        model.extras = checkpoint.Extras(Path(saver.run, "gone") if rank else Path(saver.run), ())
        return begin(saver, model, *given)

    patch.setattr(saving.Saver, "begin", without)
    patch.setattr(checkpoint.Extras, "check", lambda extras: extras.folder.is_dir() or refused(extras.folder))


def refused(folder: Path) -> None:
    raise UserError(f"{folder}: gone")


def no_figures(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second row of metrics.jsonl cannot be written."""

    def row(tracker: loop.Tracker, done: int, figures: dict[str, float]) -> None:
        if done == 2:
            raise UserError("metrics.jsonl: cannot be written")

    patch.setattr(loop.Tracker, "row", row)


def little_memory(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(saving, "free_memory", lambda: 100_000 if rank else 10**12)


# here


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("rank-failures"))


def test_a_folder_that_one_machine_has(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("warmup", "local", context_parallel=2)
    assert "rank 1 does not see of-rank-1 of rank 0" in run(two, settings, False, 0, another_machine).error


def test_a_folder_that_one_machine_sees_later(two: ranks.Group, here: Workplace) -> None:
    """Its checkpoint too; a rank that never sees it does not begin a run of its own."""
    settings = here.run("warmup", "late", context_parallel=2, save_every=2)
    losses = run(two, settings, False, 0, late).losses
    back_to(settings.out, 2)
    refusal = run(two, settings, True, 0, no_checkpoint_here).error
    assert "rank 1 does not see step-000002/state.json of rank 0" in refusal
    assert run(two, settings, True, 0, late).losses == losses[2:] and len(losses) == 4


def test_files_that_fail_on_one_rank(two: ranks.Group, here: Workplace) -> None:
    """All ranks end with its error, and none is left waiting."""
    settings = here.run("warmup", "one-rank", context_parallel=2, save_every=2)
    assert run(two, settings).error == ""
    back_to(settings.out, 2)
    last = next(iter(Path(settings.out, "step-000002").glob("optimizer*.safetensors"))).name
    error = run(two, settings, True, 0, unreadable_moments).error
    assert re.search(r"step-000002/optimizer-00001-of-\d+.safetensors: cannot be read .*Input/output", error), last
    left = Path(settings.out, ".step-000003.saving")
    left.mkdir()
    assert f"{left}: cannot be removed" in (error := run(two, settings, True, 0, not_mine).error)
    assert "check the path and its permissions" in error
    left.rmdir()
    assert run(two, settings, True, 0, extras_gone).error.endswith("gone: gone")
    assert run(two, replace(settings, out=f"{settings.out}-row"), False, 0, no_figures).error.startswith(
        "metrics.jsonl:"
    )
    assert [path.name for path in Path(settings.out).glob("*step-*")] == ["step-000002"]


def test_a_machine_without_memory_for_the_copy(two: ranks.Group, here: Workplace) -> None:
    """The run is refused before its first step, not killed at its first checkpoint."""
    ended = run(two, here.run("warmup", "memory", context_parallel=2), False, 0, little_memory)
    assert "the machine of rank 1 keeps about" in ended.error and "0.0001 GB are free" in ended.error
    assert not ended.losses
