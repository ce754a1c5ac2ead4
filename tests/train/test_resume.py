"""A run that is killed, interrupted or out of disk, and continued: the same figures, bit for bit, as one that was left
alone.
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import tokensieve
from tests.support import forks
from tests.support.training import Workplace, batch, workplace
from tokensieve.checkpoint import writing
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.train import Interrupted, history, loop, run, saving
from tokensieve.train.state import checkpoints

PHASES = (PhaseConfig(4, 48, 4, 2), PhaseConfig(3, 96, 2, 1, lr_scale=0.5))
MEASURED = {"seconds", "tokens_per_second"}
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("resume"))


def figures(out: str | Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in history(out)]


def train(settings: TrainConfig, die_at: int = 0) -> None:
    """Continues a run; the process kills itself at the `die_at`-th time that it changes a file of the run."""
    torch.set_num_threads(1)
    done = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event in WRITES and isinstance(args[0], str | Path) and settings.out in str(args[0]):
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at:
        sys.addaudithook(watch)
    run(settings, resume=True, progress=False)


def start(settings: TrainConfig, die_at: int = 0) -> Any:
    process = forks.context().Process(target=train, args=(settings, die_at))
    process.start()
    return process


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the forked processes: sums in another number of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def straight(here: Workplace) -> Callable[[str], TrainConfig]:
    """A run of the stage that nothing disturbed."""

    def of(stage: str) -> TrainConfig:
        settings = here.run(stage, f"straight-{stage}", *PHASES, save_every=1, keep=2)
        if not Path(settings.out).exists():
            run(settings, progress=False)
            assert len(history(settings.out)) == 7
        return settings

    return of


def assert_same_run(a: TrainConfig, b: TrainConfig) -> None:
    """Every figure, the weights, the optimizer's moments and the random state."""
    assert figures(a.out) == figures(b.out)
    last, other = checkpoints(Path(a.out)), checkpoints(Path(b.out))
    assert [p.name for p in other] == ["step-000006", "step-000007"]
    assert last[-2:] == [
        Path(a.out) / p.name for p in other
    ]  # a kill after the last save may leave one more, which is older
    for one, two in zip(last[-2:], other, strict=True):
        left, right = state_of(one), state_of(two)
        assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
        assert (one / "tokenizer.json").is_file() and (two / "tokenizer.json").is_file()


# ---- kills


@pytest.mark.parametrize("stage", [pytest.param("pretrain", marks=pytest.mark.slow), "adapt"])
def test_killed_while_it_changes_files(stage: str, straight: Callable[[str], TrainConfig]) -> None:
    """Each time a little further: while writing a checkpoint, replacing it, removing an old one, or writing figures."""
    expected = straight(stage)
    settings = replace(expected, out=f"{expected.out}-files")
    draw, kills = random.Random(stage), 0
    for _ in range(60):
        process = start(settings, die_at=draw.randint(20, 100))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        kills += 1
    assert kills >= 2 and process.exitcode == 0
    assert_same_run(settings, expected)


@pytest.mark.parametrize("stage", ["warmup", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_killed_at_any_moment(stage: str, straight: Callable[[str], TrainConfig]) -> None:
    expected = straight(stage)
    settings = replace(expected, out=f"{expected.out}-moments")
    draw, kills, longest = random.Random(7), 0, 0.9
    while kills < 6:
        process = start(settings)
        process.join(draw.uniform(0.0, longest))
        if process.exitcode == 0 and kills:
            break
        if process.exitcode == 0:  # done before the first kill, if this process had to wait: once more, with less time
            shutil.rmtree(settings.out)
            longest /= 2
            continue
        process.kill()
        process.join()
        kills += 1
    process = start(settings)
    process.join()
    assert process.exitcode == 0 and kills >= 1
    assert_same_run(settings, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_killed_at_every_seventh_change_of_a_file(stage: str, straight: Callable[[str], TrainConfig]) -> None:
    expected = straight(stage)
    for die_at in range(1, 1000, 7):
        settings = replace(expected, out=f"{expected.out}-{die_at}")
        process = start(settings, die_at)
        process.join()
        whole = process.exitcode == 0
        assert whole or process.exitcode == -signal.SIGKILL
        start(settings).join()
        assert_same_run(settings, expected)
        if whole:
            return
    pytest.fail("the run changes more files than this test counts")


def test_resumed_from_every_step(straight: Callable[[str], TrainConfig]) -> None:
    """Across the boundary of the phases too, and with checkpoints further apart than the figures."""
    expected = straight("adapt")
    settings = replace(expected, out=f"{expected.out}-steps", save_every=2)

    def stop_after(step: int) -> Any:
        def on_step(done: int, _: dict[str, float]) -> None:
            if done == step:
                os.kill(os.getpid(), signal.SIGINT)

        return on_step

    for step in (1, 3, 4, 6):
        with pytest.raises(Interrupted, match=rf"step-00000{step} after step {step} of 7; continue with --resume"):
            run(settings, resume=True, on_step=stop_after(step), progress=False)
        assert [r["step"] for r in history(settings.out)] == list(range(1, step + 1))
    before = signal.getsignal(signal.SIGINT)
    made = run(settings, resume=True, progress=False)
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler
    assert_same_run(settings, expected)
    again = run(settings, resume=True, progress=False)  # a finished run is loaded and left alone
    ids = batch(1, 30)["input_ids"]
    assert torch.equal(again(ids).logits, made(ids).logits)


def test_sigterm_saves_and_a_second_signal_stops_at_once(here: Workplace) -> None:
    settings = here.run("warmup", "term", PhaseConfig(9, 48, 2))

    def twice(done: int, _: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    for step in (1, 2):
        with pytest.raises(Interrupted):
            run(settings, resume=True, on_step=twice, progress=False)
        assert checkpoints(Path(settings.out))[-1].name == f"step-00000{step}"
    with pytest.raises(KeyboardInterrupt):
        run(settings, resume=True, on_step=twice, progress=False)
    assert checkpoints(Path(settings.out))[-1].name == "step-000002"


# ---- rotation


def test_rotation_keeps_the_newest(here: Workplace) -> None:
    for keep, names in ((1, [7]), (3, [5, 6, 7]), (0, [7])):
        settings = here.run("warmup", f"keep-{keep}", PhaseConfig(7, 48, 1), save_every=1, keep=keep)
        run(settings, progress=False)
        assert [int(p.name[5:]) for p in checkpoints(Path(settings.out))] == names
        assert sorted(p.name for p in Path(settings.out).iterdir() if p.is_dir()) == [f"step-{n:06d}" for n in names]


def test_what_a_resumed_model_was_loaded_from_may_rotate_away(here: Workplace) -> None:
    """Its tokenizer goes on to the checkpoints that follow."""
    settings = here.run("warmup", "tokenizer", PhaseConfig(6, 48, 2), save_every=1, keep=1)

    def stop(done: int, _: dict[str, float]) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(settings, on_step=stop, progress=False)
    made = run(settings, resume=True, progress=False)
    (last,) = checkpoints(Path(settings.out))
    assert (last / "tokenizer.json").is_file() and Path(made.folder) == last
    assert len(tokensieve.load_tokenizer(last)) == made.config.vocab_size


def test_a_half_removed_checkpoint_does_not_count(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = here.run("warmup", "half", PhaseConfig(2, 48, 2), save_every=1, keep=1)
    monkeypatch.setattr(
        saving.shutil, "rmtree", lambda folder, **_: (Path(folder) / "config.json").unlink(missing_ok=True)
    )
    run(settings, progress=False)
    assert (Path(settings.out) / "step-000001" / "model.safetensors").is_file()
    assert [p.name for p in checkpoints(Path(settings.out))] == ["step-000002"]


# ---- refusals


def test_another_config_is_refused(straight: Callable[[str], TrainConfig], here: Workplace) -> None:
    settings = straight("warmup")
    other_text = here.root / "other"
    if not other_text.exists():
        other_text.mkdir()
        (other_text / "a.py").write_text("x = 1\n" * 400)
    source = replace(settings.data.sources[0], source=str(other_text))
    changed = {
        "seed is 1, in the run that is there 0; resume": replace(settings, seed=1),
        "optimizer.lr is 1e-05, in the run that is there 0.003; resume": replace(
            settings, optimizer=replace(settings.optimizer, lr=1e-5)
        ),
        "phases.1.steps is not given, in the run that is there 3; phases.1.context": replace(
            settings, phases=PHASES[:1]
        ),
        "; 3 more settings differ; resume with the same, or name another folder": replace(settings, phases=PHASES[:1]),
        "data.answer_weight is 2.0, in the run that is there 1.0; resume": replace(
            settings, data=here.data(answer_weight=2.0)
        ),
        f'data.sources.0.source is "{other_text}", in': replace(
            settings, data=replace(settings.data, sources=(source,))
        ),
    }
    before = (Path(settings.out) / "metrics.jsonl").read_bytes()
    for words, other in changed.items():
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            run(other, resume=True, progress=False)
        assert "\n" not in str(caught.value)
    new_text = here.root / "text" / "new.py"
    new_text.write_text("x = 1\n" * 400)
    with pytest.raises(UserError, match="the data differ from those of the run that is there: a source's text"):
        run(settings, resume=True, progress=False)
    new_text.unlink()
    kept = (Path(settings.out) / "config.json").read_text()
    (Path(settings.out) / "config.json").write_text(kept[:-9])
    with pytest.raises(UserError, match=r"config or data differ .* whose config.json cannot be read"):
        run(replace(settings, seed=1), resume=True, progress=False)
    (Path(settings.out) / "config.json").write_text(kept)
    assert (Path(settings.out) / "metrics.jsonl").read_bytes() == before
    # Where the run lies, and how often it saves or logs, may change.
    moved = here.root / "runs" / "moved"
    Path(settings.out).rename(moved)
    run(replace(settings, out=str(moved), save_every=5, keep=9, log_every=3), resume=True, progress=False)
    moved.rename(settings.out)


def test_resume_of_nothing_begins(here: Workplace) -> None:
    settings = here.run("warmup", "nothing", PhaseConfig(1, 48, 2))
    run(settings, resume=True, progress=False)
    assert len(history(settings.out)) == 1


@pytest.mark.parametrize("name", ["optimizer.safetensors", "model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(name: str, here: Workplace) -> None:
    settings = here.run("warmup", f"damaged-{name}", PhaseConfig(2, 48, 2), save_every=1)
    run(settings, progress=False)
    path = Path(settings.out) / "step-000002" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        UserError, match=rf"step-000002/{name}: (is damaged|cannot be read).* resume from the checkpoint before it"
    ):
        run(settings, resume=True, progress=False)
    for file in path.parent.iterdir():  # the remedy that the message names
        file.unlink()
    path.parent.rmdir()
    run(settings, resume=True, progress=False)
    assert [r["step"] for r in history(settings.out)] == [1, 2]


def test_a_checkpoint_without_its_moments(here: Workplace) -> None:
    """One of an earlier version, which has no checksums that notice it."""
    settings = here.run("warmup", "no-moments", PhaseConfig(2, 48, 2), save_every=1)
    run(settings, progress=False)
    folder = Path(settings.out) / "step-000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"checksums": {}}))
    whole = (folder / "optimizer.safetensors").read_bytes()
    for content, words in (
        (None, r"optimizer\*.safetensors: missing"),
        (whole[:-9], "optimizer.safetensors: cannot be"),
    ):
        (folder / "optimizer.safetensors").unlink()
        if content:
            (folder / "optimizer.safetensors").write_bytes(content)
        else:
            (folder / "unrelated").touch()
        with pytest.raises(UserError, match=rf"step-000002/{words}.*; remove .* to resume") as caught:
            run(settings, resume=True, progress=False)
        assert "\n" not in str(caught.value)
        (folder / "optimizer.safetensors").touch()


# ---- full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    error: Exception, straight: Callable[[str], TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = straight("adapt")
    settings = replace(expected, out=f"{expected.out}-full-{type(error).__name__}", save_every=2)
    real, written = writing.save_file, []

    def full(tensors: Any, path: Any, **more: Any) -> None:
        written.append(path)
        if len(written) == 4:  # the second checkpoint's moments
            Path(path).write_bytes(b"half of it")
            raise error
        real(tensors, path, **more)

    monkeypatch.setattr(writing, "save_file", full)
    with pytest.raises(UserError, match=r"step-000004: cannot write .* the disk is full; free space"):
        run(settings, progress=False)
    assert [p.name for p in checkpoints(Path(settings.out))] == ["step-000002"]
    assert [p.name for p in Path(settings.out).iterdir() if p.is_dir()] == ["step-000002"]
    run(settings, resume=True, progress=False)
    assert figures(settings.out) == figures(expected.out)


def test_a_full_disk_while_figures_are_written(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = here.run("warmup", "full-metrics", PhaseConfig(4, 48, 2), save_every=1)

    class Full:
        def __init__(self, file: Any):
            self.file, self.rows = file, 0

        def write(self, text: str) -> None:
            self.rows += 1
            if self.rows == 3:
                self.file.write(text[:20])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    class FullTracker(loop.Tracker):
        def __init__(self, *args: Any):
            super().__init__(*args)
            self.file = Full(self.file)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Tracker", FullTracker)
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written .*--resume"):
            run(settings, progress=False)
    assert [r["step"] for r in history(settings.out)] == [1, 2]  # the half row is not one
    run(settings, resume=True, progress=False)
    assert [r["step"] for r in history(settings.out)] == [1, 2, 3, 4]
    blocked = here.root / "runs" / "blocked"
    blocked.write_text("a file where the run's folder would be")
    with pytest.raises(UserError, match="blocked cannot be written .*check the path and its permissions"):
        run(replace(settings, out=str(blocked)), progress=False)


def test_no_step_is_written_twice(here: Workplace) -> None:
    """Rows after the checkpoint that a run resumes from go, those of a run without a checkpoint too."""
    settings = here.run("warmup", "rows", PhaseConfig(4, 48, 2), save_every=2)
    path = Path(settings.out) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 1, "loss": 9.0}) + "\n")
    run(settings, resume=True, progress=False)
    rows = path.read_text().splitlines()
    assert len(rows) == 4
    for name in ("step-000004",):
        for file in (path.parent / name).iterdir():
            file.unlink()
    path.write_text("\n".join([*rows, '{"step": 5, "lo']))
    begin = time.time()
    run(settings, resume=True, progress=False)
    assert [r["step"] for r in history(settings.out)] == [1, 2, 3, 4] and time.time() > begin
    assert [json.loads(r)["loss"] for r in path.read_text().splitlines()] == [json.loads(r)["loss"] for r in rows]
