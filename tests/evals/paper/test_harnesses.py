"""Environments that are made once, and what is said of one that cannot be made."""

import sys
from pathlib import Path

import pytest

from tokensieve.evals.paper import harnesses
from tokensieve.evals.paper.asking import run_harness
from tokensieve.evals.paper.harnesses import READY, Harness, Unavailable, environment, last_line


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Harness, "pins", "certifi==2026.1.1\n")
    return tmp_path / "tokensieve" / "harnesses"


def test_an_environment_that_is_there_is_used(cache: Path) -> None:
    harness, lines = Harness("h", ("h==1",)), []
    (harness.folder()).mkdir(parents=True)
    (harness.folder() / READY).touch()
    assert environment(harness, lines.append) == harness.folder() and not lines
    assert Harness("h", ("h==2",)).folder() != harness.folder() and harness.folder().parent == cache


def test_an_environment_is_made_by_the_commands_that_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, lines = [], []
    monkeypatch.setattr(harnesses, "_step", lambda command, *_: commands.append(command))
    harness = Harness("h", ("h[x]==1", "y==2"))
    folder = environment(harness, lines.append)
    assert commands[0] == [sys.executable, "-m", "venv", str(folder / "venv")]
    assert commands[1][:3] == [str(folder / "venv/bin/python"), "-m", "pip"]
    assert commands[1][-4:] == ["--constraint", str(folder / "pins.txt"), "h[x]==1", "y==2"]
    assert (folder / "pins.txt").read_text() == "certifi==2026.1.1\n" and (folder / READY).is_file()
    assert len(lines) == 1 and "h[x]==1 and y==2" in lines[0] and str(folder) in lines[0] and "\n" not in lines[0]
    assert environment(harness, lines.append) == folder and len(lines) == 1


def test_a_harness_that_does_not_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truly: pip, without an index. The next run tries again."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    harness = Harness("h", ("there-is-no-such-harness==1",))
    with pytest.raises(Unavailable, match=r"does not install \(ERROR: .*there-is-no-such-harness.*; see .*install.log"):
        environment(harness, lambda _: None)
    assert not (harness.folder() / READY).exists()


def test_a_python_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harnesses.shutil, "which", lambda name: sys.executable if name == "python3" else None)
    with pytest.raises(Unavailable, match="h==1 needs Python 9.9 or newer"):
        environment(Harness("h", ("h==1",), (9, 9)), lambda _: None)


def test_the_last_line_of_a_log() -> None:
    assert last_line("a\n\x1b[31mError: b\x1b[0m \r\n\n  \n") == "Error: b" and last_line(" \n") == "it wrote nothing"


def test_a_process_that_fails_is_one_line_and_its_log_stays(tmp_path: Path) -> None:
    code = "import sys; print(sys.stdin.read()); sys.exit(0 if len(sys.argv) > 1 else 'ValueError: bad')"
    run_harness([sys.executable, "-c", code, "fine"], tmp_path, given="first")
    with pytest.raises(Unavailable, match="^ValueError: bad; see .*harness.log$"):
        run_harness([sys.executable, "-c", code], tmp_path, given="second")
    assert (tmp_path / "harness.log").read_text().split() == ["first", "second", "ValueError:", "bad"]
