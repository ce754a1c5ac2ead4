"""Commands under torchrun, as processes."""

import os
import subprocess
import sys

import psutil

# --standalone: a port of its own, for other tests may run beside
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def started(*arguments: object, restarts: int = 0) -> subprocess.Popen:
    """A command on two ranks. restarts: how often torchrun starts them again after one has failed."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(restarts > 0))}
    command = [*TORCHRUN, "--max-restarts", str(restarts), "-m", "tokensieve", *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def ended(process: subprocess.Popen, typed: str = "") -> tuple[str, str]:
    try:
        out, err = process.communicate(typed, timeout=120)
    finally:
        process.kill()
    return out, err


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The first rank, which leads, first."""
    return sorted(psutil.Process(process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
