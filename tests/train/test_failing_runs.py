"""Runs that fail while a checkpoint is on its way, memory that runs out, and room that is asked for first.

A checkpoint is written beside the steps, as on a GPU.
"""

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.training import Workplace, workplace
from tokensieve import machine
from tokensieve.checkpoint import writing
from tokensieve.config import LoraConfig, PhaseConfig, UserError
from tokensieve.files import MERGED
from tokensieve.mesh import Mesh
from tokensieve.train import history, loop, run, saving
from tokensieve.train.state import checkpoints


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("failing"))


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written while training goes on, and a file takes longer than a step."""
    real = writing.save_file

    def slowly(*given: Any, **more: Any) -> None:
        time.sleep(0.2)
        real(*given, **more)

    monkeypatch.setattr(saving, "beside_steps", lambda mesh, size: True)
    monkeypatch.setattr(writing, "save_file", slowly)


def fails_in(place: str, patch: pytest.MonkeyPatch, error: Exception, seen: Callable[[], None]) -> Any:
    """Lets a part of the third step fail. Returns the run's `on_step`."""
    calls = [0]

    def third(real: Callable[..., Any], *given: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            seen()
            raise error
        return real(*given, **more)

    if place == "on_step":
        return lambda *_: third(lambda: None)
    owner, name = {
        "backward": (loop, "backward"),
        "clip": (loop, "clip"),
        "optimizer": (torch.optim.AdamW, "step"),
        "tracker": (loop.Tracker, "row"),
    }[place]
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *given, **more: third(real, *given, **more))
    return None


NO_MEMORY = torch.OutOfMemoryError("tried to allocate 9 GiB")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("backward", NO_MEMORY),
        ("backward", ValueError("a NaN among the scores")),
        ("clip", NO_MEMORY),
        ("optimizer", NO_MEMORY),
        ("on_step", ZeroDivisionError()),
        ("on_step", KeyboardInterrupt()),
        ("tracker", UserError("no space")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_run_that_fails_finishes_its_checkpoint(
    place: str, error: Exception, beside: None, here: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = here.run("warmup", f"fails-{place}-{type(error).__name__}", PhaseConfig(4, 48, 2, 2), save_every=2)
    out, before, under_way = Path(settings.out), threading.active_count(), []
    expected = UserError if isinstance(error, torch.OutOfMemoryError | ValueError) else type(error)
    with monkeypatch.context() as patch:
        on_step = fails_in(place, patch, error, lambda: under_way.extend(p.name for p in out.glob("*step-*")))
        with pytest.raises(expected) as caught:
            run(settings, on_step=on_step, progress=False, rehearse=False)
    assert under_way == [".step-000002.saving"]
    assert [p.name for p in out.glob("*step-*")] == ["step-000002"] and threading.active_count() == before
    if error is NO_MEMORY:
        assert str(caught.value).startswith(
            "step 3: the run has run out of memory on cpu; set activation_checkpointing"
        )
        assert "rank" not in str(caught.value)
    assert (out / "step-000002" / "README.md").exists() and not (out / ".lock").exists()
    run(settings, resume=True, progress=False, rehearse=False)
    assert [row["step"] for row in history(out)] == [1, 2, 3, 4]


def test_memory_that_runs_out_outside_of_the_steps(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **more: Any) -> None:
        raise NO_MEMORY

    settings = here.run("warmup", "outside", PhaseConfig(2, 48, 2))
    for owner, name, when in (
        (loop, "start", "before the first step"),
        (loop, "estimate", "before the first step"),
        (saving, "whole", "step 2"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(UserError, match=f"^{when}: the run has run out of memory on cpu; set"):
                run(settings, resume=True, progress=False)
        assert not [*Path(settings.out).glob("*step-*")]


def test_a_failed_checkpoint_does_not_hide_why_the_run_ends(
    beside: None, here: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_later(*given: Any, **more: Any) -> None:
        time.sleep(0.5)
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = here.run("warmup", "both-fail", PhaseConfig(4, 48, 2), save_every=2)
    on_step = fails_in("on_step", monkeypatch, ZeroDivisionError(), lambda: None)
    monkeypatch.setattr(writing, "save_file", full_later)
    with pytest.raises(ZeroDivisionError):
        run(settings, on_step=on_step, progress=False, rehearse=False)
    assert "step-000002: cannot write the checkpoint" in caplog.text
    assert not [*Path(settings.out).glob("*step-*")]


def full(folder: Path, size: int) -> None:
    raise OSError(errno.ENOSPC, f"{size / 1e9:.3g} GB are needed")


@pytest.mark.parametrize("what", ["write_card", "rmtree"])
def test_what_fails_after_a_checkpoint(what: str, here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message does not deny the checkpoint, and the run goes on from it."""
    settings = here.run("warmup", f"after-{what}", PhaseConfig(2, 48, 2), save_every=1, keep=1)

    def fails(folder: Path, *given: Any, **more: Any) -> None:
        if folder.name == ("step-000002" if what == "write_card" else "step-000001"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(saving.checkpoint if what == "write_card" else saving.shutil, what, fails)
        with pytest.raises(UserError, match="step-000002: the checkpoint is complete, but .*continue with --resume"):
            run(settings, progress=False)
    assert checkpoints(Path(settings.out))[-1].name == "step-000002"
    run(settings, resume=True, progress=False)


def test_a_merged_model_that_is_written_again(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays of the one before, and the message of a card that fails does not deny the model."""
    settings = here.run("adapt", "merged", PhaseConfig(1, 48, 2), lora=LoraConfig(rank=2))
    run(settings, progress=False, rehearse=False)
    before = (Path(settings.out) / MERGED).stat().st_ino
    run(settings, resume=True, progress=False)
    assert (Path(settings.out) / MERGED).stat().st_ino != before and not list(Path(settings.out).glob(".*"))

    def fails(folder: Path, *given: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(saving.checkpoint, "write_card", fails)
    with pytest.raises(UserError, match=r"merged: the checkpoint is complete, but its card .*continue with --resume"):
        run(settings, resume=True, progress=False)


# ---- room for a checkpoint


def test_a_disk_without_room_is_noticed_before_the_first_step(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.checkpoint, "require_space", full)
    settings = here.run("warmup", "no-room", PhaseConfig(2, 48, 2))
    with pytest.raises(UserError, match=r"no-room: cannot write .* GB are needed.*; the disk is full; free space"):
        run(settings, on_step=lambda *_: pytest.fail("a step was taken"), progress=False)
    assert not Path(settings.out).exists()


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_the_bytes_of_a_checkpoint(stage: str, here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are asked for before the run are those of the files, but for headers, steps and random states."""
    asked: list[int] = []
    real = saving.checkpoint.require_space
    monkeypatch.setattr(
        saving.checkpoint, "require_space", lambda folder, size: (asked.append(size), real(folder, size))
    )
    settings = here.run(stage, f"bytes-{stage}", PhaseConfig(1, 48, 2))
    run(settings, progress=False)
    (last,) = checkpoints(Path(settings.out))
    assert asked[0] == asked[-1] == pytest.approx(sum(p.stat().st_size for p in last.glob("*.safetensors")), rel=0.15)


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 10**12), (str(30 * 10**9), 20 * 10**9), (str(9 * 10**9), 0), (None, 10**12)]
)
def test_free_memory_in_a_container(
    limit: str | None, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the cache count as free, as they do for the kernel."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**12))
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{14 * 10**9}\n")
        (tmp_path / "memory.stat").write_text(f"anon 9\ninactive_file {4 * 10**9}\n")
    assert machine.free_memory() == free


def test_a_gpu_beside_little_memory_waits_for_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks have been asked before; a CPU would only copy what it has."""
    monkeypatch.setattr(saving, "free_memory", lambda: 24 * 10**9)
    for kind, size, needed, beside in (
        ("cuda", 1, 23, True),
        ("cuda", 1, 25, False),
        ("cpu", 1, 1, False),
        ("cpu", 2, 25, True),
    ):
        assert saving.beside_steps(Mesh(0, size, torch.device(kind)), needed * 10**9) == beside
