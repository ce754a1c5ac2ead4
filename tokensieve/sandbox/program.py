"""Untrusted programs: their limits, how they ended, and the calls that run one or many."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, cast

from tokensieve.config import UserError
from tokensieve.machine import usable_cores
from tokensieve.sandbox.launch import interpreter, isolation, launch, visible
from tokensieve.sandbox.messages import Request

Ended = Literal["exit", "signal", "time", "memory", "output", "disk", "lost"]

MEBI = 1 << 20


@dataclass(frozen=True)
class Limits:
    """The most that a program, with all that it starts, may take.

    Attributes:
        seconds: wall time, in seconds.
        cpu_seconds: processor time of all its processes together, in seconds.
        memory_bytes: memory of one process (an allocation beyond it fails) and of all of them (they are killed).
        disk_bytes: its files, stdin and what it writes to /tmp, which are in memory too, besides memory_bytes.
        processes: processes and threads at one time; to start one more fails.
        output_bytes: stdout and stderr, each. A program that writes more is killed.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory_bytes: int = 512 * MEBI
    disk_bytes: int = 64 * MEBI
    processes: int = 32
    output_bytes: int = 1 * MEBI


@dataclass(frozen=True)
class Result:
    """How a program ended.

    Attributes:
        status: its exit status, or minus the number of the signal that ended it.
        out: what it wrote to stdout, at most Limits.output_bytes; any bytes.
        err: the same of stderr.
        ended: "exit" or "signal": by itself. "time", "memory", "output", "disk": killed over that limit; "disk" for
            too many files, since a full disk is an error that the program sees. "lost": the supervisor was killed,
            which the kernel does if the whole machine is out of memory.
        seconds: wall time from start to end.
    """

    status: int
    out: bytes
    err: bytes
    ended: Ended
    seconds: float

    @property
    def succeeded(self) -> bool:
        return self.ended == "exit" and self.status == 0


@dataclass(frozen=True)
class Program:
    """A command, the files in the folder where it starts, its stdin and its limits: the arguments of `run`."""

    command: Sequence[str]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    stdin: bytes = b""
    limits: Limits = Limits()


def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: bytes = b"",
    limits: Limits = Limits(),
) -> Result:
    """Run an untrusted command in a sandbox of its own, which is gone when the call returns.

    The command is looked up in /usr/local/bin, /usr/bin and /bin, and starts in a fresh folder that holds `files`
    (executable, name to text or bytes). If it cannot be run, the status is 127 or 126, as in a shell. What a sandbox
    is and what it is not: docs/sandbox.md.

    A verdict belongs to the caller: compare `out` with what is expected out here, and let neither the expected output
    nor a test that holds it into `files` or `stdin`.

    Raises UserError if this machine offers no isolation, for a name outside of the folder, for files that do not fit
    into disk_bytes, and for a limit that is not positive.
    """
    request = _request(Program(command, files or {}, stdin, limits))
    report, said = launch(isolation(), request)
    if report is None:
        return Result(-9, b"", said.encode(), "lost", 0.0)
    if report.ended in ("refused", "invalid"):
        raise UserError(f"the program cannot be run in a sandbox: {report.err.decode(errors='replace')}")
    return Result(report.status, report.out, report.err, cast(Ended, report.ended), report.micros / 1e6)


def run_many(programs: Sequence[Program], workers: int | None = None) -> list[Result]:
    """Run programs side by side, `workers` at a time (by default as many as usable cores); results in their order."""
    with ThreadPoolExecutor(workers or usable_cores() or 1) as pool:
        return list(pool.map(lambda p: run(p.command, files=p.files, stdin=p.stdin, limits=p.limits), programs))


def python(
    source: str,
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: bytes = b"",
    limits: Limits = Limits(),
) -> Result:
    """Run a Python program, main.py, with this process's interpreter and the standard library alone; see `run`."""
    command = [interpreter(), "-I", "-S", "-B", "main.py"]
    return run(command, files={**(files or {}), "main.py": source}, stdin=stdin, limits=limits)


def _request(program: Program) -> Request:
    limits = program.limits
    for name, value in vars(limits).items():
        if not value > 0:
            raise UserError(f"limit {name} is {value}: give a positive number")
    command = list(program.command)
    if not command or any("\0" in part for part in command):
        raise UserError("a command needs at least the name of a program, and no NUL in any argument")
    files = []
    for name, content in program.files.items():
        if "\0" in name or name != os.path.normpath(name) or name in (".", "..") or name.startswith(("/", "../")):
            raise UserError(f"file name {name!r}: give a plain path below the program's folder")
        files.append((name, content.encode() if isinstance(content, str) else content))
    numbers = [
        max(1, round(limits.seconds * 1000)),
        max(1, round(limits.cpu_seconds * 1000)),
        limits.memory_bytes,
        limits.disk_bytes,
        limits.processes,
        limits.output_bytes,
    ]
    return Request(numbers, command, program.stdin, *visible(), files)
