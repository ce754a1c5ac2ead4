"""What this machine has and what tokensieve will use on it."""

import importlib.metadata
import importlib.util
import json
import os
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

from tokensieve import ops

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "triton", "datasets", "trl", "fastapi", "wandb")
VENDOR_MODULES = ("flash_mla", "deep_gemm", "tilelang")
BUNDLED = ("base", "sparse")
IMPORT_SECONDS = 60


def report() -> dict[str, Any]:
    """Everything that `doctor` prints, as plain data.

    Sizes are bytes. A version is None where the package is missing. A reason (`why_not`) is None where the thing works.
    `uses` is what commands take when nothing else is asked for: device, dtype, and for each op the first able backend.
    """
    devices = accelerators()
    device = devices[0]["device"] if devices else "cpu"
    backends = ops.backends(device)
    return {
        "tokensieve": version("tokensieve"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "os": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": {
            "model": cpu_model(),
            "cores": psutil.cpu_count(logical=False),
            "threads": psutil.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
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
        "uses": {
            "device": device,
            "dtype": "bfloat16" if devices else "float32",
            "backends": {
                op: next((name for name, why_not in choices if why_not is None), None)
                for op, choices in backends.items()
            },
        },
    }


def version(package: str) -> str | None:
    """The installed version; of tokensieve run from its source tree, which pip does not know, None too."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        brand = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if brand.returncode == 0:
            return brand.stdout.strip()
    return platform.processor() or platform.machine()


def memory() -> dict[str, int | None]:
    """Bytes. `limit_bytes` is the container's limit where one is set: psutil shows the whole machine."""
    now = psutil.virtual_memory()
    group = Path("/sys/fs/cgroup/memory.max")
    limit = group.read_text().strip() if group.is_file() else "max"
    return {
        "total_bytes": now.total,
        "available_bytes": now.available,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def accelerators() -> list[dict[str, Any]]:
    """CUDA devices (ROCm's too, which torch calls cuda) and Apple's, the one that is used first."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(
                {
                    "device": f"cuda:{index}",
                    "name": torch.cuda.get_device_name(index),
                    "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                    "total_bytes": total,
                    "free_bytes": free,
                }
            )
        return found
    if torch.backends.mps.is_available():
        return [{"device": "mps", "name": cpu_model(), "capability": None, "total_bytes": None, "free_bytes": None}]
    return []


def vendor_why_not(module: str) -> str | None:
    """Why a vendor's kernels cannot be used, or None. It is imported in its own process: a wrong build may abort."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
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
    """Bytes of a bundled model's safetensors files, or None where the package was built without it."""
    folder = files("tokensieve") / "bundled" / name
    if not folder.is_dir():
        return None
    sizes = [Path(str(f)).stat().st_size for f in folder.iterdir() if f.name.endswith(".safetensors")]
    return sum(sizes) or None


def gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as (thing, what is known) pairs, in the order of the table."""
    cpu, ram, disk, uses = found["cpu"], found["memory"], found["disk"], found["uses"]
    limit = f", limited to {gib(ram['limit_bytes'])}" if ram["limit_bytes"] else ""
    table = [
        ("tokensieve", found["tokensieve"] or "from its source tree"),
        ("Python", f"{found['python']['version']} ({found['python']['executable']})"),
        ("system", " ".join(found["os"].values())),
        ("CPU", f"{cpu['model']}: {cpu['cores']} cores, {cpu['usable']} of {cpu['threads']} threads usable"),
        ("memory", f"{gib(ram['available_bytes'])} available of {gib(ram['total_bytes'])}{limit}"),
        ("disk", f"{gib(disk['free_bytes'])} free at {disk['path']}"),
        ("packages", ", ".join(f"{name} {number or '(none)'}" for name, number in found["packages"].items())),
    ]
    for device in found["devices"]:
        capability = f", capability {device['capability']}" if device["capability"] else ""
        size = f", {gib(device['free_bytes'])} free of {gib(device['total_bytes'])}" if device["total_bytes"] else ""
        table.append((device["device"], f"{device['name']}{capability}{size}"))
    if not found["devices"]:
        table.append(("accelerator", "none: torch sees no CUDA device and no MPS"))
    table += [(module, why_not or "works") for module, why_not in found["vendor"].items()]
    for name, size in found["bundled"].items():
        known = f"{size / 2**20:.1f} MiB" if size else "missing: this build of the package does not carry it"
        table.append((f"model '{name}'", known))
    for op, choices in found["backends"].items():
        able = [f"{c['name']}" if c["why_not"] is None else f"{c['name']} (no: {c['why_not']})" for c in choices]
        table.append((f"op {op}", ", ".join(able)))
    chosen = sorted({name for name in uses["backends"].values() if name})
    table.append(
        ("will be used", f"{uses['device']}, {uses['dtype']}, {cpu['torch_threads']} threads; {', '.join(chosen)}")
    )
    return table


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show what this machine has (devices, backends and why not, versions, memory) and what will be used.

    Example: tokensieve doctor --json
    """
    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for thing, known in rows(found):
        table.add_row(thing, known)
    Console().print(table, markup=False)
