"""Runs a script as another user, who can then read this interpreter, its packages and the repository."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def run(script: Path, message: str, *, as_nobody: bool, timeout: float) -> subprocess.CompletedProcess:
    """Run a Python script of the repository with a message on stdin."""
    command = [sys.executable, str(script)]
    if as_nobody:
        command = [sys.executable, str(Path(__file__)), *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, input=message, env=environment, capture_output=True, text=True, timeout=timeout)


def reveal(paths: list[str]) -> None:
    """Let everybody reach the paths, in a mount namespace of this process: an empty folder takes a closed one's place.

    A Python of root's (below /root, which is closed) is the usual one that needs it.
    """
    from tokensieve.sandbox import syscalls

    syscalls.unshare(syscalls.CLONE_NEWNS)
    syscalls.mount(None, "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    closed: dict[str, dict[str, int]] = {}
    for path in dict.fromkeys(map(os.path.realpath, paths)):
        for folder in reversed(Path(path).parents):
            if not folder.stat().st_mode & 0o001:
                closed.setdefault(str(folder), {})[path] = os.open(path, os.O_PATH)
                break
    for folder, found in closed.items():
        syscalls.mount("open", folder, "tmpfs", 0, "mode=755")
        for path, fd in found.items():
            os.makedirs(path, exist_ok=True)
            syscalls.mount(f"/proc/self/fd/{fd}", path, None, syscalls.MS_BIND | syscalls.MS_REC)


def main() -> None:
    reveal([str(ROOT), sys.prefix, sys.base_prefix])
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
