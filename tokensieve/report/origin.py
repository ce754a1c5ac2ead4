"""The origin of a run's figures: command, date, machine, versions."""

import datetime
import platform
import shlex
import sys
from pathlib import Path

import torch

from tokensieve.machine import processor, usable_cores, version

VERSIONS = ("tokensieve", "torch", "transformers", "tokenizers", "numpy")
FROM_SOURCE = "(from its source tree)"  # which pip does not know


def environment(command: str | None = None) -> dict[str, str]:
    """The things beside the code that figures depend on: {"command", "date", "machine", "versions"}.

    `command`: this process's own unless given.
    """
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    machine = (processor(), f"{usable_cores()} cores", f"{torch.get_num_threads()} threads", device, platform.system())
    versions = (f"Python {platform.python_version()}", *(f"{name} {version(name) or FROM_SOURCE}" for name in VERSIONS))
    return {
        "command": command or _command(),
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": ", ".join(machine),
        "versions": ", ".join(versions),
    }


def _command() -> str:
    name = Path(sys.argv[0]).name
    return shlex.join(["tokensieve" if name == "__main__.py" else name, *sys.argv[1:]])
