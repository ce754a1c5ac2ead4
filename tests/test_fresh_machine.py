"""tests/fresh_machine.sh itself: who runs what, and that it refuses where it can show nothing.

What it is for, `make` on a machine with nothing else, is the end of `make test-all`.
"""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fresh_machine.sh")


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *arguments], env=os.environ | environment, capture_output=True, text=True)


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that are found before the system's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_a_machine_without_namespaces_is_refused(path: Path) -> None:
    program(path, "unshare", "echo 'unshare failed: Operation not permitted' >&2; exit 1")
    ended = fresh("test")
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("fresh_machine: no mount namespace can be made here (unshare failed: Operation")
    assert ended.stderr.count("\n") == 1


def test_a_user_who_is_not_there_is_refused(path: Path) -> None:
    program(path, "unshare", "exit 0")
    ended = fresh("test", AS="nobody-of-that-name")
    assert (ended.returncode, ended.stderr) == (2, "fresh_machine: there is no user nobody-of-that-name\n")


def test_its_status_is_that_of_what_runs(path: Path) -> None:
    """Stand-ins make neither a clone nor a namespace: what would run in it ends with 7."""
    for tool in ("git", "make", "setpriv"):
        program(path, tool, "exit 0")
    program(path, "unshare", 'for given; do case "$given" in mount) exit 0;; bash) exit 7;; esac; done')
    ended = fresh("test")
    assert ended.returncode == 7, ended.stderr
    assert len(ended.stdout.splitlines()) == 1  # and not another user's run after it
