"""Commands under torchrun, as processes."""

import os
import subprocess
import sys

import psutil

# --standalone: a port of its own, for other tests may run beside
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tokensieve"]


def started(*arguments: object) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *map(str, arguments)], text=True, env=environment, **pipes)


def ended(process: subprocess.Popen, typed: str = "") -> tuple[str, str]:
    try:
        out, err = process.communicate(typed, timeout=120)
    finally:
        process.kill()
    return out, err


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The first rank, which leads, first."""
    return sorted(psutil.Process(process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
