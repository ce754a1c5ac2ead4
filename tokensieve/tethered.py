"""Commands that end with the process that started them, even if that one is killed.

No system ends the children of a killed process. So a small process stands between, which runs this file: it starts the
command in a session of its own, and ends that session's process group once the command has ended, or once its own
parent is another one than the one that started it.

Two limits: a process that leaves the group (by `setsid`) lives on, and so does the command if the process between is
itself killed by SIGKILL.

Imports the standard library alone, so that it works in the environment of a harness too.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

LOOK = 0.1  # seconds between two looks
GRACE = 10.0  # seconds from the signal to end to the one that cannot be caught


@contextmanager
def tethered(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen]:
    """A command that runs at most as long as the block, and as this process lives. Yields the process between.

    streams: as of `subprocess.Popen`. The descriptors of `pass_fds` stay open until the command has ended, but not in
    it. The status is the command's, or 128 and the number of the signal that ended it. Ctrl-C does not reach it.
    """
    between = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]
    with subprocess.Popen(between, **streams) as process:
        try:
            yield process
        finally:
            process.terminate()  # nothing, if it has ended
            process.wait()


def run_tethered(command: Sequence[str], given: str | None = None, **streams: Any) -> subprocess.CompletedProcess:
    """The result of a tethered command. given: its standard input."""
    stdin = subprocess.DEVNULL if given is None else subprocess.PIPE
    with tethered(command, stdin=stdin, text=True, errors="replace", **streams) as process:
        out, err = process.communicate(given)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)
    signal.signal(signal.SIGINT, lambda *_: None)  # the parent decides; what is ignored would be so in the command too
    try:
        child = subprocess.Popen(command, start_new_session=True)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    status = None
    while status is None and not ended and os.getppid() == parent:
        with suppress(subprocess.TimeoutExpired):
            status = child.wait(LOOK)
    if status is None:
        with suppress(OSError):  # no process is left
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL)  # what it started, too
    child.wait()
    if status is None:
        return 128 + signal.SIGTERM
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
