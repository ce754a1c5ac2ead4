"""This machine: the device of a command, the processes that share the work, the processor, installed versions."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from tokensieve.config import UserError

CGROUP = Path("/sys/fs/cgroup")  # a container's own control group


def check_device(device: str) -> str:
    """The device as given. UserError unless it is auto, cpu or cuda, with a number or without; torch is not asked."""
    if device != "auto" and device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {device}: use auto, cpu or cuda")
    return device


def choose_device(device: str = "auto") -> str:
    """The checked `device`; for "auto", "cuda" if torch sees a CUDA device, else "cpu".

    Raises UserError for another kind of device, and for CUDA if there is none.
    """
    check_device(device)
    import torch  # here, so that the other answers of this file, and refusals, do not load it

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no CUDA device here; see tokensieve doctor")
    return device


@dataclass(frozen=True)
class RankInfo:
    """This process's rank among all processes, and their number; `local_` counts those on this machine only."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def rank_info() -> RankInfo:
    """The rank and the number of processes, from torchrun's environment variables; without torchrun, 0 of 1."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return RankInfo(*(int(os.environ[name]) for name in names)) if all(n in os.environ for n in names) else RankInfo()


def processor() -> str:
    """The processor's name from the system, or its architecture."""
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
    """Number of the machine's hardware threads that this process may run on; None if unknown."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory() -> int:
    """Bytes of host memory that are free: on the machine, and under the limit of its container, if one is set."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free  # no control groups of version 2, or not in one
    if not limit.isdigit():
        return free
    cache = int(counts["inactive_file"])  # of files, which gives way
    return min(free, max(0, int(limit) - int(used) + cache))


def code_digest() -> str:
    """A digest of this package's source, and of the versions of Python and of what computes."""
    root = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=16)
    for name in (platform.python_version(), *map(str, map(version, ("torch", "transformers", "triton")))):
        digest.update(name.encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()
