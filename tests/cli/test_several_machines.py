"""Training over several machines, as docs/plan.md starts it: one torchrun on each, here both on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import commands
from tests.support.commands import tiny


@pytest.mark.slow
def test_two_torchruns_are_one_run(run: Any, tmp_path: Path) -> None:
    home = commands.make_home(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*tiny(home, "warmup", one)).status == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = [*launch, "-m", "tokensieve", *tiny(home, "warmup", two, "--set", "context_parallel=2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    machines = [subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes) for _ in range(2)]
    try:
        told = [machine.communicate(timeout=180) for machine in machines]
    finally:
        for machine in machines:
            for process in psutil.Process(machine.pid).children(recursive=True) if machine.poll() is None else ():
                process.kill()
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert "".join(out for out, _ in told).count("the trained model") == 1
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, two)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3
