"""The lines of docs/checkpoints.md that compare transformers and tokensieve beyond k, by replaying the selection."""

import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def test_the_document_compares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = [
        c for c in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S) if "chosen" in c
    ]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["ids"].shape[1] > names["ours"].top_k  # otherwise nothing is selected
    expected, own, replayed = names["expected"], names["own"], names["replayed"]
    assert (replayed - expected).abs().max() < 2e-4
    assert (own - expected).abs().max() > 10 * (replayed - expected).abs().max()
