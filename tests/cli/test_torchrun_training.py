"""Training commands under torchrun, as processes: the losses of one process, one line if something is wrong, and an end
for all.
"""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands
from tests.support.commands import tiny
from tests.support.torchrun import ended, ranks_of, started

SHARED = ("--set", "context_parallel=2")
EXPERTS = ("--set", "expert_parallel=2")
BROKEN = """
import os
import torch

def fails(c):
    if os.environ["RANK"] == "1":
        raise ValueError("a NaN among the scores")
    return c.topk()

def fills(c):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    return c.topk()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("cli"))


def losses(folder: Path) -> list[float]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["loss"] for line in lines]


def begun(process: subprocess.Popen, folder: Path, step: int = 1) -> None:
    """Waits for a step of a run."""
    limit = time.monotonic() + 120
    while len(losses(folder)) < step:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "more", "several"),
    [
        ("pretrain", (), ()),
        ("warmup", (), SHARED),
        ("adapt", (), SHARED),
        ("adapt", ("--set", "lora.rank=4"), SHARED),
        ("adapt", (), EXPERTS),
    ],
)
def test_the_losses_of_one_process(
    run: Any, home: Path, tmp_path: Path, stage: str, more: tuple[str, ...], several: tuple[str, ...]
) -> None:
    """several: the settings of two ranks alone."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*tiny(home, stage, one, *more)).status == 0
    out, err = ended(process := started(*tiny(home, stage, two, *several, *more)))
    assert process.returncode == 0 and out.count("the trained model") == 1 and "Traceback" not in err, err
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert (two / "metrics.json").exists() and not (two / ".lock").exists()


@pytest.mark.slow
def test_one_line_says_what_is_wrong(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{tmp_path}")
    cases: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
        (
            ("context_parallel is 3", "does not divide 2 ranks"),
            "warmup",
            ("--set", "context_parallel=3", "--set", "phases.0.context=48"),
        ),
        (("expert_parallel is 5", "does not divide 2 ranks"), "adapt", ("--set", "expert_parallel=5")),
        (("every phases.context", "multiple of 4"), "warmup", (*SHARED, "--set", "phases.0.context=2")),
        (("4 sequences", "2 groups"), "warmup", ("--set", "phases.0.sequences=4", "--set", "phases.0.micro_batch=4")),
        (("2 ranks cannot hold the model", "at least"), "pretrain", ("--set", "shape.num_hidden_layers=9000000")),
        (("lora.targets: 'nothing' names no linear layer",), "adapt", ("--set", 'lora.targets=["nothing"]')),
        (("step 1: a NaN among the scores",), "adapt", (*SHARED, "--selection", "broken:fails")),  # on rank 1 alone
        (
            ("step 1: rank 1 has run out of memory", "start more ranks"),
            "adapt",
            (*SHARED, "--selection", "broken:fills"),
        ),
    )
    for number, (words, stage, more) in enumerate(cases):
        out = tmp_path / f"out-{number}"
        _, err = ended(process := started(*tiny(home, stage, out, *more)))
        lines = [line for line in err.splitlines() if line.startswith("tokensieve: error: ")]
        assert process.returncode != 0 and len(lines) == 1 and "exitcode  : 2" in err, err
        assert all(word in lines[0] for word in words), lines[0]
        assert not list(out.glob("step-*"))


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(home: Path, tmp_path: Path) -> None:
    """The last checkpoint is whole, and the run goes on from it as if nothing had happened."""
    steps = ("--set", "phases.0.steps=12")
    _, err = ended(process := started(*tiny(home, "adapt", tmp_path / "whole", *SHARED, *steps)))
    assert process.returncode == 0, err
    process = started(*tiny(home, "adapt", tmp_path / "cut", *SHARED, *steps))
    try:
        begun(process, tmp_path / "cut")
        both = ranks_of(process)
        both[1].kill()
        begin = time.monotonic()
        _, err = ended(process)
        assert process.returncode != 0 and time.monotonic() - begin < 60
        assert not any(rank.is_running() for rank in both)
        assert err.count("rank 0 ends, since another rank has ended") == 1 and "loop.py" not in err, err
    finally:
        process.kill()
    assert 0 < len(losses(tmp_path / "cut")) < 12
    _, err = ended(process := started(*tiny(home, "adapt", tmp_path / "cut", *SHARED, *steps, "--resume")))
    assert process.returncode == 0, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_goes_on_from_the_last_checkpoint(home: Path, tmp_path: Path) -> None:
    """Both ranks are killed once, wherever they are, and the losses are those of a run that was left alone."""
    steps = ("--set", "phases.0.steps=60", "--resume")
    _, err = ended(process := started(*tiny(home, "adapt", tmp_path / "whole", *SHARED, *steps)))
    assert process.returncode == 0, err
    process = started(*tiny(home, "adapt", tmp_path / "cut", *SHARED, *steps), restarts=2)
    try:
        for rank, step in ((1, 8), (0, 25)):
            begun(process, tmp_path / "cut", step)
            ranks_of(process)[rank].kill()
        out, err = ended(process)
    finally:
        process.kill()
    assert process.returncode == 0 and out.count("the trained model") == 1, err
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 60
    assert sorted(path.name for path in (tmp_path / "cut").glob("*step-*")) == ["step-000059", "step-000060"]


@pytest.mark.slow
def test_a_signal_saves_once(home: Path, tmp_path: Path) -> None:
    process = started(*tiny(home, "warmup", tmp_path / "out", *SHARED, "--set", "phases.0.steps=500"))
    try:
        begun(process, tmp_path / "out")
        for rank in ranks_of(process):
            rank.send_signal(signal.SIGTERM)
        _, err = ended(process)
    finally:
        process.kill()
    lines = [line for line in err.splitlines() if line.startswith("tokensieve: interrupted: ")]
    assert len(lines) == 1 and "continue with --resume" in lines[0] and "exitcode  : 130" in err, err
    done = len(losses(tmp_path / "out"))
    assert (tmp_path / "out" / f"step-{done:06d}" / "state.json").exists()
