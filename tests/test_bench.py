"""The CPU benchmark runs beside transformers and writes what docs/results.md reads; the GPU benchmark says when there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quick_benchmark_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cpu.json"
    command = [sys.executable, "benchmarks/cpu.py", "--quick", "--threads", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    figures = json.loads(out.read_text())
    assert figures["logits_difference"] < 1e-4
    for name in ("prefill_seconds", "decode_ms", "memory_bytes"):
        assert set(figures[name]) == {"tokensieve", "transformers"}
    assert min(figures["decode_ms"].values()) > 0 and set(figures["own_decode_ms"]) == {"256", "512", "1024"}


def test_gpu_benchmark_without_a_gpu() -> None:
    """Nor Triton, which machines without a GPU may lack: a package that cannot be imported stands in its place."""
    run = "import runpy, sys; sys.modules['triton'] = None; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, ""), child.stderr
    assert child.stderr.splitlines() == ["bench-gpu: torch sees no CUDA device here"]
