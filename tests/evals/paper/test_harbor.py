"""Harbor's command, and the trials in its files."""

import json
from pathlib import Path

import pytest

from tests.support.harness_files import trial
from tokensieve.evals.paper import BY_KEY, harbor
from tokensieve.evals.paper.asking import Asked
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.paper_config import PaperConfig

AIDER = BY_KEY["aider_polyglot"]
ASKED = Asked("http://10.0.0.1:8000/v1", "org/m", 4096, 2, print, "secret")


def write(folder: Path, name: str, result: object) -> None:
    (folder / "job" / name).mkdir(parents=True)
    (folder / "job" / name / "result.json").write_text(json.dumps(result))


def test_the_command(tmp_path: Path) -> None:
    words = harbor.command("harbor", AIDER, PaperConfig(limit=3), ASKED, tmp_path)
    line = " ".join(words)
    assert "run --dataset aider-polyglot@1.0 --n-tasks 3 --agent aider --model openai/org/m" in line
    assert "--base-url http://10.0.0.1:8000/v1 --api-key-name OPENAI_API_KEY" in line and "--n-attempts 2" in line
    assert "secret" not in line
    (tmp_path / "aider_polyglot" / "task").mkdir(parents=True)
    local = harbor.command("harbor", AIDER, PaperConfig(data=str(tmp_path)), ASKED, tmp_path)
    assert local[2:4] == ["--path", str((tmp_path / "aider_polyglot").resolve())] and "--n-tasks" not in local
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "config.json").write_text("{}")
    again = harbor.command("harbor", AIDER, PaperConfig(), ASKED, tmp_path)
    assert again == ["harbor", "job", "resume", "--job-path", str(tmp_path / "job")]


def test_trials(tmp_path: Path) -> None:
    """A trial that ended before it was verified has no score; one with an exception after that has."""
    write(tmp_path, "a__1", trial("a", 1.0))
    write(tmp_path, "a__2", trial("a", 0.0, tokens=None, exception="AgentTimeoutError"))
    write(tmp_path, "b__1", trial("b", None, exception="EnvironmentStartTimeoutError"))
    (tmp_path / "job" / "result.json").write_text("{}")  # the job's own
    found = harbor.answers(AIDER, tmp_path)
    assert [(a.problem, a.score, a.tokens) for a in found] == [("a", 1.0, 20), ("a", 0.0, None), ("b", None, 20)]


@pytest.mark.parametrize("result", [[], trial("a", 2.0), trial("a", 1.0) | {"verifier_result": {"rewards": {}}}])
def test_trials_that_cannot_be_read(tmp_path: Path, result: object) -> None:
    write(tmp_path, "a__1", result)
    with pytest.raises(Unavailable, match="cannot be read"):
        harbor.answers(AIDER, tmp_path)


def test_no_trials(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="left no trials"):
        harbor.answers(AIDER, tmp_path)
