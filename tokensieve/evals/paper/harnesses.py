"""The harnesses, each in an environment of its own: made on first use below the user's cache, with pinned versions."""

import hashlib
import importlib.resources
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokensieve.files import locked, write_text
from tokensieve.tethered import run_tethered

READY = "ready"  # a file, written once an environment is complete
PYTHONS = ("python3", "python", *(f"python3.{minor}" for minor in (14, 13, 12, 11)))


class Unavailable(Exception):
    """The reason, in one line, why a benchmark has no score."""


@dataclass(frozen=True)
class Harness:
    """requirements: as pip reads them; `pins/NAME.txt` holds the versions of all that they require. python: the oldest
    version that it runs on.
    """

    name: str
    requirements: tuple[str, ...]
    python: tuple[int, int] = (3, 11)

    @property
    def pins(self) -> str:
        files = importlib.resources.files("tokensieve.evals.paper")
        return (files / "pins" / f"{self.name}.txt").read_text(encoding="utf-8")

    def folder(self) -> Path:
        """The place of its environment: another one if anything about it changes."""
        content = "\n".join((*self.requirements, self.pins))
        digest = hashlib.sha256(content.encode()).hexdigest()[:8]
        return cache_folder() / "harnesses" / f"{self.name}-{digest}"


HARNESSES: Mapping[str, Harness] = {
    harness.name: harness
    for harness in (
        Harness("evalscope", ("evalscope[mcp]==1.14.1", "openpyxl==3.1.5")),
        Harness("evalscope-agents", ("evalscope[sandbox,swe-bench,terminal-bench]==1.14.1",), (3, 12)),
        Harness("harbor", ("harbor==0.25.0",), (3, 12)),
        Harness("lm-eval", ("lm_eval[api]==0.4.13", "transformers==5.23.0", "dacite==1.9.2")),
    )
}


def cache_folder() -> Path:
    """tokensieve's part of the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokensieve"


def environment(harness: Harness, announce: Callable[[str], object]) -> Path:
    """The folder of a harness's environment, made if it is missing.

    announce: called with one line before anything is installed.

    Raises:
        Unavailable: no Python is new enough, or pip failed.
        UserError: another process is making it, or the cache cannot be written.
    """
    folder = harness.folder()
    if (folder / READY).is_file():
        return folder
    python = _python(harness)
    named = " and ".join(harness.requirements)
    with locked(folder):
        announce(f"Installing {named} into {folder}, once: it takes some minutes and about a gigabyte")
        pins = write_text(folder / "pins.txt", harness.pins)
        _step([python, "-m", "venv", str(folder / "venv")], folder, harness)
        pip = [str(folder / "venv/bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        _step([*pip, "--constraint", str(pins), *harness.requirements], folder, harness)
        write_text(folder / READY, f"{named}\n")
    return folder


def program(folder: Path, name: str = "python") -> str:
    """The path of a program in an environment."""
    return str(folder / "venv" / "bin" / name)


def last_line(text: str) -> str:
    """The last line that says anything, without colours and short enough to be read."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in re.split(r"[\r\n]+", text)]
    return next((line for line in reversed(lines) if line), "it wrote nothing")[:300]


def _python(harness: Harness) -> str:
    """An interpreter that is new enough: this one, or another on PATH."""
    if sys.version_info[:2] >= harness.python:
        return sys.executable
    for name in PYTHONS:
        path = shutil.which(name)
        if path is not None and _version(path) >= harness.python:
            return path
    needed = ".".join(map(str, harness.python))
    raise Unavailable(f"{harness.requirements[0]} needs Python {needed} or newer, and none is on PATH")


def _version(python: str) -> tuple[int, ...]:
    """(major, minor); () if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return tuple(map(int, shown.stdout.split())) if shown.returncode == 0 else ()


def _step(command: list[str], folder: Path, harness: Harness) -> None:
    """Runs a command and keeps what it wrote in install.log. Unavailable if it fails."""
    done = run_tethered(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = write_text(folder / "install.log", done.stdout + done.stderr)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        said = last_line("\n".join(errors) or done.stderr)
        raise Unavailable(f"{harness.requirements[0]} does not install ({said}); see {log}")
