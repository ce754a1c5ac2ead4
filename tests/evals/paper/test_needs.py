"""What a benchmark lacks, in one line, before anything is installed or asked."""

import subprocess
from pathlib import Path

import pytest

from tokensieve.evals.paper import BY_KEY, needs
from tokensieve.paper_config import PaperConfig

URL = "http://10.0.0.1:8000/v1"


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Docker, online."""
    monkeypatch.setattr(needs, "docker", lambda: None)
    monkeypatch.setattr(needs, "reachable", lambda host: True)


def test_nothing_is_lacking(everything: None) -> None:
    config = PaperConfig(judge_url="http://j/v1", judge_model="j", search_url="http://s/mcp")
    lacking = [key for key, benchmark in BY_KEY.items() if needs.lacking(benchmark, config, URL)]
    assert lacking == ["browsecomp_zh"]  # its data come from no hub
    assert "localhost" in (needs.lacking(BY_KEY["aider_polyglot"], config, "http://localhost:1/v1") or "")


def test_each_reason_names_its_remedy(everything: None) -> None:
    reason = needs.lacking(BY_KEY["browsecomp"], PaperConfig(), URL) or ""
    assert "judge_url=URL" in reason and "search_url=URL" in reason and "; " in reason


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(needs, "docker", lambda: None)
    config = PaperConfig(data=str(tmp_path), hub="huggingface")
    reason = needs.lacking(BY_KEY["mmlu_pro"], config, URL)
    assert reason == f"no data: {tmp_path}/mmlu_pro is not there, and huggingface.co cannot be reached"
    (tmp_path / "mmlu_pro").mkdir()
    assert needs.lacking(BY_KEY["mmlu_pro"], config, URL) == reason.replace("not there", "empty")
    (tmp_path / "mmlu_pro" / "test.jsonl").touch()
    assert needs.lacking(BY_KEY["mmlu_pro"], config, URL) is None
    assert "hub.harborframework.com" in (needs.lacking(BY_KEY["aider_polyglot"], config, URL) or "")
    assert "docker.io" in (needs.lacking(BY_KEY["terminal_bench"], config, URL) or "")


def test_docker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.shutil, "which", lambda _: None)
    assert needs.docker() == "Docker is not installed"

    def fails(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("docker", 5)

    monkeypatch.setattr(needs.shutil, "which", lambda _: "/usr/bin/docker")
    monkeypatch.setattr(needs.subprocess, "run", fails)
    assert needs.docker() == "Docker's daemon does not answer"
