"""Runs the hostile programs as one user under one kind of isolation, and prints how they ended, as JSON.

A process of its own, since it plants a secret in its environment and its open files, and may be another user than the
tests. Called by `tests.support.sandbox_users`.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.support import hostile
from tests.support.hostile_greed import GREEDY
from tests.support.hostile_reach import REACHING
from tokensieve import sandbox
from tokensieve.sandbox import launch, messages, seccomp


@dataclass(frozen=True)
class Host:
    """The victims: files, sockets, a process. `secret` is nowhere in the programs; they hold it backwards."""

    folder: Path
    secret: str
    mark: str
    listener: socket.socket
    abstract: socket.socket
    named: socket.socket
    canary: subprocess.Popen

    @property
    def places(self) -> dict[str, object]:
        machine = os.uname().machine
        denied = seccomp.numbers(seccomp.DENIED + "," + seccomp.ABSENT, machine)
        report = messages.encode_report(messages.Report("exit", 0, 1, b"forged"))
        return {
            "PORT": self.listener.getsockname()[1],
            "ABSTRACT": self.mark,
            "PLANTED": self.folder,
            "HOME": self.folder / "home",
            "REPOSITORY": Path(__file__).parents[2],
            "SITE": next(path for path in sys.path if path.endswith("-packages")),
            "SECRET": self.secret[::-1],
            "MARK": self.mark,
            "CALLER": os.getppid(),
            "WORKER": os.getpid(),
            "CANARY": self.canary.pid,
            "NR_clone": seccomp.NUMBERS["clone"][list(seccomp.AUDIT_ARCH).index(machine)],
            "DENIED": [number for (number,) in denied],
            "PROCESSES": hostile.PROCESSES,
            "DISK": hostile.DISK_BYTES,
            "REPORT": repr(report),
        }


def plant(folder: Path, secret: str, mark: str) -> Host:
    (folder / "home").mkdir()
    for path in (folder / "secret", folder / "home" / "secret"):
        path.write_text(secret)
    os.environ |= {"SECRET": secret, "HOME": str(folder / "home")}
    leaked = os.open(folder / "secret", os.O_RDWR)
    os.set_inheritable(leaked, True)
    sockets = socket.socket(), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    for each, address in zip(sockets, (("127.0.0.1", 0), "\0" + mark, str(folder / "socket"))):
        each.bind(address)
        each.listen()
        each.setblocking(False)
    return Host(folder, secret, mark, *sockets, subprocess.Popen(["sleep", "600"]))


def source(program: hostile.Hostile, host: Host) -> str:
    text = hostile.PRELUDE + program.source
    for name, value in host.places.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def attack(program: hostile.Hostile, host: Host) -> dict[str, object]:
    limits = sandbox.Limits(
        program.seconds,
        program.cpu_seconds,
        program.memory_bytes,
        hostile.DISK_BYTES,
        hostile.PROCESSES,
        hostile.OUTPUT_BYTES,
    )
    command = [sandbox.interpreter(), "-I", "-S", "main.py", f"{host.mark}-{program.name}"]
    result = sandbox.run(command, files={"main.py": source(program, host)}, limits=limits)
    return {
        "ended": result.ended,
        "status": result.status,
        "out": base64.b64encode(result.out).decode(),
        "err": base64.b64encode(result.err).decode(),
        "alive": [line for line in processes() if f"{host.mark}-{program.name}" in line],
    }


def processes() -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace").replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return lines


def connected(listener: socket.socket) -> bool:
    try:
        listener.accept()
    except BlockingIOError:
        return False
    return True


def harm(host: Host) -> list[str]:
    """What the programs did to the host."""
    found = [name for name in ("listener", "abstract", "named") if connected(getattr(host, name))]
    if host.canary.poll() is not None:
        found.append("the canary was killed")
    for path in (host.folder / "secret", host.folder / "home" / "secret"):
        if path.read_text() != host.secret:
            found.append(f"{path} was changed")
    seen = (
        "/",
        "/tmp",
        "/dev/shm",
        "/var/tmp",
        "/usr",
        "/dev",
        str(host.folder),
        str(host.folder / "home"),
        os.getcwd(),
    )
    for folder in seen:
        found += [f"{folder}/{name}" for name in (host.mark, "escaped") if os.path.lexists(f"{folder}/{name}")]
    return found


def main() -> None:
    asked = json.load(sys.stdin)
    if asked["isolation"] == "namespaces":
        launch._bubblewrap = lambda: None
    host = plant(Path(asked["folder"]), asked["secret"], asked["mark"])
    try:
        outcomes: dict[str, object] = {}
        left = [*REACHING, *GREEDY]

        def work() -> None:
            while left:
                program = left.pop()
                outcomes[program.name] = attack(program, host)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        answer = {"isolation": sandbox.isolation(), "user": os.getuid(), "outcomes": outcomes, "harm": harm(host)}
    finally:
        host.canary.kill()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
