"""Commands that run in one process refuse a launch of several, in one line and before anything is read or written."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tests.support import commands
from tests.support.training import model
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.mesh import check_restarts


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


COMMANDS = ["demo", "speedrun", "eval", "profile", "sparsify", "convert", "deploy"]
COMMANDS += ["posttrain", "specialist", "distill", "rl", "plan"]


@pytest.mark.parametrize("stage", COMMANDS)
def test_one_line(stage: str, two: None, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = {
        "specialist": ["--domain", "logic"],
        "eval": ["sparse"],
        "profile": ["."],
        "deploy": ["vllm", "sparse"],
        "sparsify": ["base", "out"],
        "convert": ["base", "out"],
        "plan": ["adapt"],
    }
    arguments = own.get(stage, ["--out", "out"])
    commands.refusal(run)((f"torchrun started 2 processes, and {stage} runs in one so far",), stage, *arguments)
    assert not list(tmp_path.iterdir())


def test_help_and_doctor_answer(two: None, run: Any) -> None:
    for stage in (*COMMANDS, "pretrain", "warmup", "adapt", "doctor", "bench"):
        ended = run(stage, "--help")
        assert ended.status == 0 and "Usage" in ended.out, stage
    assert run("doctor", "--json").status == 0


def test_a_size_alone_is_no_launch(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job schedulers set WORLD_SIZE for what they start; torchrun sets all four."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    commands.refusal(run)(("names no model to start from",), "warmup", "--out", tmp_path / "out")


def test_offload_in_one_process(run: Any, tmp_path: Path) -> None:
    arguments = ("adapt", "--model", "sparse", "--out", tmp_path / "out", "--set", "offload=true")
    commands.refusal(run)(("offload keeps in the host's memory", "start several, on GPUs"), *arguments)


def test_the_other_ranks_are_silent(two: None, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    ended = run("warmup", "--out", "nowhere")
    assert (ended.status, ended.out, ended.err) == (0, "", "")


def test_the_loop_refuses_too(two: None) -> None:
    settings = TrainConfig("adapt", "", "nowhere", (PhaseConfig(1, 48, 2),))
    with pytest.raises(UserError, match="torchrun started 2 processes"):
        tokensieve.train.run(settings, model())


@pytest.mark.parametrize(
    ("restarts", "shared", "refused"), [("3", "True", True), ("3", "False", False), ("0", "True", False)]
)
def test_restarts_in_a_store_that_outlives_the_ranks(restarts: str, shared: str, refused: bool) -> None:
    environment = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    expected = pytest.raises(UserError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") if refused else nullcontext()
    with expected:
        check_restarts(environment)
    check_restarts({})  # started by something else
