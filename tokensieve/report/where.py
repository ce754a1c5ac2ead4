"""Where a run's figures come from: command, date, machine, versions."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

VERSIONS = ("tokensieve", "torch", "transformers", "tokenizers", "numpy")


def environment(command: str | None = None) -> dict[str, str]:
    """What figures depend on beside the code: {"command", "date", "machine", "versions"}.

    `command`: this process's own unless given.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    machine = (_processor(), f"{cores} cores", f"{torch.get_num_threads()} threads", device, platform.system())
    versions = (f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in VERSIONS))
    return {
        "command": command or _command(),
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": ", ".join(machine),
        "versions": ", ".join(versions),
    }


def _command() -> str:
    name = Path(sys.argv[0]).name
    return shlex.join(["tokensieve" if name == "__main__.py" else name, *sys.argv[1:]])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(from its source tree)"  # which pip does not know
