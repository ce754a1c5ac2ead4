"""What a benchmark needs and this machine, or the settings, do not have: one reason each, before anything is asked."""

import ipaddress
import os
import shutil
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from tokensieve.evals.paper.benchmarks import Benchmark, Need
from tokensieve.paper_config import PaperConfig

HUBS = {"modelscope": "www.modelscope.cn", "huggingface": "huggingface.co"}
INTERNET = "registry-1.docker.io"  # where the images of agents' tasks come from
SECONDS = 5.0  # for a connection, or an answer of Docker's daemon

LOCAL_ONLY = {
    "browsecomp_zh": "browsecomp-zh-encrypted.xlsx of github.com/PALIN2018/BrowseComp-ZH",
}


def lacking(benchmark: Benchmark, config: PaperConfig, url: str) -> str | None:
    """Every reason why it cannot run, in one line; None if there is none. url: of the model's endpoint."""
    reasons = [_without(need, benchmark, config, url) for need in benchmark.needs]
    return "; ".join(filter(None, reasons)) or None


def local_data(benchmark: Benchmark, config: PaperConfig) -> Path | None:
    """The folder with a copy of its data; None if there is none."""
    if not config.data:
        return None
    folder = Path(config.data).expanduser() / benchmark.key
    return folder.resolve() if folder.is_dir() and any(folder.iterdir()) else None


def source(benchmark: Benchmark, config: PaperConfig) -> str:
    """From where its data come: "local", wherever that is, or the name of a hub."""
    return "local" if local_data(benchmark, config) is not None else benchmark.host or config.hub


def reachable(host: str) -> bool:
    """Whether a connection to a host's HTTPS port can be made. Not if HF_HUB_OFFLINE says to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        return False
    try:
        with socket.create_connection((host, 443), SECONDS):
            return True
    except OSError:
        return False


def docker() -> str | None:
    """Why no container can be started; None if one can."""
    if shutil.which("docker") is None:
        return "Docker is not installed"
    try:
        subprocess.run(["docker", "info"], capture_output=True, stdin=subprocess.DEVNULL, timeout=SECONDS, check=True)
    except (subprocess.SubprocessError, OSError):
        return "Docker's daemon does not answer"
    return None


def _without(need: Need, benchmark: Benchmark, config: PaperConfig, url: str) -> str | None:
    if need == "data":
        return _data(benchmark, config)
    if need == "containers":
        return docker()
    if need == "network":
        unreached = [host for host in (INTERNET, benchmark.host) if host and not reachable(host)]
        return f"{unreached[0]} cannot be reached" if unreached else None
    if need == "judge":
        return None if config.judge_url else "no judge: --set judge_url=URL --set judge_model=ID"
    if need == "search":
        return None if config.search_url else "no search tools: --set search_url=URL of an MCP server"
    return f"{url} is not reachable from a container; serve at another address" if _is_loopback(url) else None


def _data(benchmark: Benchmark, config: PaperConfig) -> str | None:
    if local_data(benchmark, config) is not None:
        return None
    place = f"{config.data or 'DATA'}/{benchmark.key}"
    if benchmark.key in LOCAL_ONLY:
        return f"no data: put {LOCAL_ONLY[benchmark.key]} into {place}, and --set data={config.data or 'DATA'}"
    host = benchmark.host or HUBS[config.hub]
    what = "is empty" if Path(place).expanduser().is_dir() else "is not there"
    return None if reachable(host) else f"no data: {place} {what}, and {host} cannot be reached"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
