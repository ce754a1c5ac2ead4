"""Whom a harness asks, and how its process is run: the log in a file, a failure in one line."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensieve.evals.paper.harnesses import HARNESSES, Unavailable, environment, last_line, program
from tokensieve.files import locked
from tokensieve.tethered import run_tethered

LOG = "harness.log"
SILENT = {"HARBOR_TELEMETRY": "off", "DO_NOT_TRACK": "1"}  # a user may set them otherwise


@dataclass(frozen=True)
class Asked:
    """The endpoint of a run, with how long and how often a benchmark's problems are answered.

    url: with its /v1. max_tokens: of an answer, or of a step of an agent. longest_prompt: tokens that leave room for
    it; None if the model's context is not known. key, judge_key: of the endpoint and of the judge's; "none" if there is
    none. announce: called with one line if an environment is made.
    """

    url: str
    model: str
    max_tokens: int
    repeats: int
    announce: Callable[[str], object]
    key: str = "none"
    judge_key: str = "none"
    longest_prompt: int | None = None

    def environment(self, harness: str) -> Path:
        """The environment of a harness. Unavailable if it cannot be made."""
        return environment(HARNESSES[harness], self.announce)

    def program(self, home: Path, name: str = "python") -> str:
        """The path of a program in an environment."""
        return program(home, name)


def run_harness(command: list[str], folder: Path, given: str = "", **variables: str) -> None:
    """Runs a command in `folder`, whose log it adds to. given: its standard input. variables: of its environment.

    If we are killed, the command ends. Until then its folder is held, so that no second one writes there beside it.

    Raises:
        Unavailable: it failed; the reason is the last line of what it wrote.
        UserError: another one still runs in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    begin = log.stat().st_size if log.exists() else 0
    # Unbuffered, so that the error comes last in the log.
    variables = {**SILENT, **os.environ, "PYTHONPATH": "", "PYTHONUNBUFFERED": "1", **variables}
    with locked(folder) as held, log.open("a", encoding="utf-8") as file:
        streams: dict[str, Any] = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": (held,)}
        done = run_tethered(command, given, cwd=folder, env=variables, **streams)
    if done.returncode:
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            raise Unavailable(f"{last_line(file.read())}; see {log}")


def kept_json(line: str) -> Any:
    """The value of a line of JSON; None if the line is cut or empty."""
    try:
        return json.loads(line)
    except ValueError:
        return None
