"""The facts about this machine, and what tokensieve will use on it."""

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

from tokensieve import __version__, ops, sandbox
from tokensieve.machine import choose_device, processor, usable_cores, version

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "triton", "datasets", "trl", "fastapi", "wandb")
VENDOR_MODULES = ("flash_mla", "deep_gemm", "tilelang")
BUNDLED = ("base", "sparse")
IMPORT_SECONDS = 60
NOT_INSTALLED = "not installed"


def report() -> dict[str, Any]:
    """All that `doctor` prints, as plain data.

    Sizes are bytes. A version is None if the package is missing, a reason (`why_not`) is None if the thing works.
    `uses` is what commands take by default: device, dtype, and for each op the first backend that can run.
    """
    devices = accelerators()
    device = choose_device()
    backends = ops.backends(device)
    return {
        "tokensieve": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "os": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": {
            "model": processor(),
            "cores": psutil.cpu_count(logical=False),
            "threads": psutil.cpu_count(),
            "usable": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": memory(),
        "packages": {name: version(name) for name in PACKAGES},
        "devices": devices,
        "backends": {
            op: [{"name": name, "why_not": why_not} for name, why_not in choices] for op, choices in backends.items()
        },
        "vendor": {module: vendor_why_not(module) for module in VENDOR_MODULES},
        "bundled": {name: bundled_bytes(name) for name in BUNDLED},
        "disk": {"path": str(Path.cwd()), "free_bytes": shutil.disk_usage(Path.cwd()).free},
        "sandbox": isolation(),
        "uses": {
            "device": device,
            "dtype": "float32" if device == "cpu" else "bfloat16",
            "backends": {
                op: next((name for name, why_not in choices if why_not is None), None)
                for op, choices in backends.items()
            },
        },
    }


def memory() -> dict[str, int | None]:
    """Bytes. `limit_bytes` is the container's limit, if one is set: psutil shows the whole machine."""
    now = psutil.virtual_memory()
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    return {
        "total_bytes": now.total,
        "available_bytes": now.available,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def isolation() -> dict[str, str | None]:
    """The isolation of untrusted programs, or the reason why there is none."""
    why_not = sandbox.why_not()
    return {"isolation": sandbox.isolation() if why_not is None else None, "why_not": why_not}


def accelerators() -> list[dict[str, Any]]:
    """CUDA devices (ROCm's too, which torch calls cuda); the first is the default."""
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "total_bytes": total,
                "free_bytes": free,
            }
        )
    return devices


def no_accelerator() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch sees no CUDA device"


def vendor_why_not(module: str) -> str | None:
    """The reason why a vendor's kernels cannot be used, or None.

    They are imported in a process of their own, because a wrong build may abort it.
    """
    if importlib.util.find_spec(module) is None:
        return NOT_INSTALLED
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"import did not finish in {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"import ended with exit status {done.returncode}"


def bundled_bytes(name: str) -> int | None:
    """Bytes of a bundled model's safetensors files, or None if the package was built without it."""
    folder = files("tokensieve") / "bundled" / name
    if not folder.is_dir():
        return None
    sizes = [Path(str(f)).stat().st_size for f in folder.iterdir() if f.name.endswith(".safetensors")]
    return sum(sizes) or None


def gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (thing, facts) pairs, in the order of the table; `--json` has more."""
    cpu, ram, disk, uses = facts["cpu"], facts["memory"], facts["disk"], facts["uses"]
    limit = f", this container may use {gib(ram['limit_bytes'])}" if ram["limit_bytes"] else ""
    usable = f", {cpu['usable']} of {cpu['threads']} threads usable" if cpu["usable"] != cpu["threads"] else ""
    table = [
        (
            "tokensieve",
            f"{facts['tokensieve']} on Python {facts['python']['version']}, {' '.join(facts['os'].values())}",
        ),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores{usable}"),
        ("memory", f"{gib(ram['available_bytes'])} free of {gib(ram['total_bytes'])}{limit}"),
        ("disk", f"{gib(disk['free_bytes'])} free at {disk['path']}"),
    ]
    for device in facts["devices"]:
        capability = f", capability {device['capability']}" if device["capability"] else ""
        size = f", {gib(device['free_bytes'])} free of {gib(device['total_bytes'])}" if device["total_bytes"] else ""
        table.append(("GPU", f"{device['device']}: {device['name']}{capability}{size}"))
    if not facts["devices"]:
        table.append(("GPU", f"none: {no_accelerator()}"))
    present = [f"{name} {number}" for name, number in facts["packages"].items() if number]
    absent = [name for name, number in facts["packages"].items() if not number]
    absent += [module for module, why_not in facts["vendor"].items() if why_not == NOT_INSTALLED]
    table.append(("packages", ", ".join([*present, *(m for m, why_not in facts["vendor"].items() if why_not is None)])))
    if absent:
        table.append(("", f"not installed, all optional: {', '.join(absent)}"))
    table += [
        ("", f"{m} does not work: {why}") for m, why in facts["vendor"].items() if why not in (None, NOT_INSTALLED)
    ]
    sizes = [f"{n} {size / 2**20:.1f} MiB" if size else f"{n} is missing here" for n, size in facts["bundled"].items()]
    table.append(("models", ", ".join(sizes)))
    table += [("sandbox", facts["sandbox"]["isolation"] or f"none: {facts['sandbox']['why_not']}"), ("", "")]
    table.append(("will be used", f"{uses['device']}, {uses['dtype']}, {cpu['torch_threads']} CPU threads"))
    return table + operators(facts)


def operators(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The operators of each backend, the one with the most last, and why earlier backends do not run them."""
    runs: dict[str, list[str]] = {}
    refused: dict[tuple[str, str], list[str]] = {}
    for op, choices in facts["backends"].items():
        runs.setdefault(facts["uses"]["backends"][op] or "nothing", []).append(op)
        for choice in choices:
            if choice["why_not"] is not None:
                refused.setdefault((choice["name"], choice["why_not"]), []).append(op)
    *few, (most, others) = sorted(runs.items(), key=lambda item: len(item[1]))

    def named(ops: list[str]) -> str:
        every = f"the {len(others)} others" if few else "all operators"
        return every if ops == others else ", ".join(ops) if len(ops) < 4 else f"{len(ops)} operators"

    table = [("operators", "; ".join(f"{name} for {named(ops)}" for name, ops in [*few, (most, others)]))]
    return table + [("", f"not {name} for {named(ops)}: {reason}") for (name, reason), ops in refused.items()]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    console: Console | None = None,
) -> None:
    """Show what this machine has (devices, backends and why not, versions, memory) and what will be used.

    Example: tokensieve doctor --json
    """
    facts = report()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for thing, known in rows(facts):
        table.add_row(thing, known)
    (console or Console()).print(table, markup=False)
