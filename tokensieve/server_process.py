"""Our server as a process of its own, for what needs an endpoint and stands left of `serve`.

Imports the standard library alone, so that it works in the environment of a harness too.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tokensieve.tethered import tethered

KILLED = 128 + 9  # the status of a tethered command that SIGKILL ended, as the system does if memory runs out


class NotServed(Exception):
    """The server ended before it answered. The message is the last line that it wrote, or that it was killed."""


@contextmanager
def server_process(
    model: str,
    device: str = "auto",
    python: str = sys.executable,
    options: Sequence[str] = (),
    log: Path | None = None,
) -> Iterator[str]:
    """The address, with its /v1, of a server that answers for as long as the block lasts, and this process lives.

    model: a folder, a GGUF file or a name. python: an interpreter that has tokensieve and its extra `serve`. options:
    further ones of `tokensieve serve`. log: a file for what the server writes to standard error; None keeps nothing.

    The server takes a free port on the loopback interface, asks for no key, and names the model first among those that
    it lists.

    Raises:
        NotServed: the server could not start.
    """
    command = [python, "-m", "tokensieve", "serve", model, "--port", "0", "--device", device, "--no-playground"]
    with _opened(log) as written:
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": written}
        without_key = {name: value for name, value in os.environ.items() if name != "TOKENSIEVE_API_KEY"}
        with tethered([*command, *options], text=True, env=without_key, **streams) as process:
            yield _address(process) or _reason(process, written)


def _opened(log: Path | None) -> IO[str]:
    if log is None:
        return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
    return log.open("w+", encoding="utf-8", errors="replace")


def _address(process: subprocess.Popen) -> str:
    """The address in the line that says what is served; empty if the server ended instead."""
    assert process.stdout is not None
    for line in process.stdout:
        if " serves " in line:
            return line.split(" serves ")[0].strip()
    return ""


def _reason(process: subprocess.Popen, written: IO[str]) -> str:
    if process.wait() == KILLED:  # its last line says nothing of it
        raise NotServed("the system killed the server, most likely for want of memory")
    written.seek(0)
    lines = [line.strip() for line in written if line.strip()]
    raise NotServed(lines[-1].removeprefix("tokensieve: error: ") if lines else "the server ended without a word")
