"""This machine: the device that a command takes, the processes that share the work, the processor, and what is installed."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from tokensieve.config import UserError


def choose_device(asked: str = "auto") -> str:
    """`asked`, checked; for "auto" "cuda" where torch sees a CUDA device and "cpu" elsewhere.

    Raises UserError for another kind of device, and for CUDA where there is none.
    """
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {asked}: use auto, cpu or cuda")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {asked}: torch sees no CUDA device here; see tokensieve doctor")
    return asked


@dataclass(frozen=True)
class RankInfo:
    """Which of how many processes this one is; `local` counts those on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def rank_info() -> RankInfo:
    """As torchrun says it in the environment; without torchrun, the only process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankInfo(*(int(os.environ[name]) for name in names)) if all(n in os.environ for n in names) else RankInfo()


def processor() -> str:
    """The processor's name as the system gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if names:
        return names[0]
    if platform.system() == "Darwin":
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if brand.returncode == 0:
            return brand.stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """Threads of the machine that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
