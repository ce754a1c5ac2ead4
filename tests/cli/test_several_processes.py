"""Commands that run in one process refuse a launch of several, in one line and before anything is read or written."""

from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tests.support import commands
from tests.support.training import model
from tokensieve.config import PhaseConfig, TrainConfig, UserError


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt", "demo", "speedrun", "eval", "sparsify"])
def test_one_line(stage: str, two: None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {"eval": ["sparse"], "sparsify": ["base", "out"]}.get(stage, ["--out", "out"])
    commands.refusal(run)((f"torchrun started 2 processes, and {stage} runs in one so far",), stage, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_other_ranks_are_silent(two: None, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    ended = run("warmup", "--out", "nowhere")
    assert (ended.status, ended.out, ended.err) == (0, "", "")


def test_the_loop_refuses_too(two: None) -> None:
    settings = TrainConfig("adapt", "", "nowhere", (PhaseConfig(1, 48, 2),))
    with pytest.raises(UserError, match="torchrun started 2 processes"):
        tokensieve.train.run(settings, model())
