"""Compiled layers of every stage, on a GPU (`make test-gpu`)."""

import json
from pathlib import Path

import pytest

from tests.support.training import workplace
from tokensieve.train import run

FIGURES = ("loss", "kl")


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_compiled_layers_learn_what_plain_ones_do(stage: str, tmp_path: Path) -> None:
    """Fusion leaves sums in float32 that plain code rounds to bfloat16 (2^-8), and then other keys may be the k-th."""
    here, losses = workplace(tmp_path), {}
    for compiled in (False, True):
        out = f"{stage}-{compiled}"
        run(here.run(stage, out, compile=compiled, device="cuda", log_every=1), progress=False)
        rows = (tmp_path / "runs" / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[compiled] = [value for row in map(json.loads, rows) for name, value in row.items() if name in FIGURES]
    assert losses[True] == pytest.approx(losses[False], rel=2**-6)
