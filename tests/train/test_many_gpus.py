"""benchmarks/many_gpus.py, in a size that is none: it measures both stages on one process and on two."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.torchrun import TORCHRUN

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "many_gpus.py"


@pytest.fixture(autouse=True)
def in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder is that of a run, which is none of the benchmark's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "run")


def measured(out: Path, launcher: list[str], *options: str) -> tuple[list[dict[str, Any]], str]:
    """The cells of the file, and what was said."""
    command = [*launcher, str(SCRIPT), "--quick", "--warm", "1", "--steps", "1", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(out.read_text())["cells"], child.stderr


def test_two_ranks_share_a_sequence_or_have_their_own(tmp_path: Path) -> None:
    options = ("--stack", "grouped", "--mode", "adapt", "warmup")
    cells, _ = measured(tmp_path / "new" / "two.json", TORCHRUN, *options)
    assert [(cell["tokens"], cell["mode"]) for cell in cells] == [
        (tokens, mode) for tokens in (128, 256) for mode in ("adapt", "warmup")
    ]
    for cell in cells:
        assert not cell["missing"] and min(cell["seconds"]) > 0 and cell["tflop"] > 0
        shared = cell["tokens"] == 256
        assert (cell["context_parallel"], cell["sequences"]) == ((2, 1) if shared else (1, 2))
        assert set(cell["received"]) == set(cell["least"]) == ({"parameters", "context"} if shared else {"parameters"})
        # Layers are gathered twice in adaptation, and so are keys; their gradients make it three ways in place of two.
        ratios = [cell["received"][what] / cell["least"][what] for what in cell["least"]]
        assert all(1 <= ratio <= 2 for ratio in ratios), ratios
        if cell["mode"] == "warmup":
            assert ratios[0] < 1.01  # each layer once


@pytest.mark.slow
def test_a_file_is_continued(tmp_path: Path) -> None:
    """A cell that a process began and did not end is not begun again."""
    out = tmp_path / "one.json"
    few = ("--stack", "v3", "--tokens", "128")
    cells, said = measured(out, [sys.executable], *few, "--mode", "dense")
    assert len(cells) == 1 and cells[0]["context_parallel"] == 1 and not cells[0]["missing"] and "known" not in said
    ended = cells[0] | {"mode": "warmup", "seconds": [], "missing": "began, and its process ended"}
    out.write_text(json.dumps({"run": {}, "cells": [*cells, ended]}))
    again, said = measured(out, [sys.executable], *few, "--mode", "dense", "warmup", "adapt")
    assert again[:2] == [*cells, ended] and said.count("known") == 2
    assert again[2]["mode"] == "adapt" and again[2]["seconds"]


def test_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script = runpy.run_path(str(SCRIPT))
    assert script["length"]([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert script["common"]([(0, 4), (3, 6)], [(1, 2), (5, 9)]) == 2
    assert script["common"]([(0, 1)], [(1, 2)]) == 0
