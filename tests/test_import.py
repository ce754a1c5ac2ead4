"""What importing costs: the operators load torch alone, and the names of the package resolve when used."""

import subprocess
import sys
from pathlib import Path

import pytest

import tokensieve


def test_the_operators_load_without_transformers() -> None:
    code = "import sys; from tokensieve import ops; assert ops.index_topk; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_every_public_name_resolves() -> None:
    for name in tokensieve.__all__:
        assert getattr(tokensieve, name) is not None
    assert set(tokensieve.__all__) <= set(dir(tokensieve))
    with pytest.raises(AttributeError, match="no attribute 'sparsifie'"):
        _ = tokensieve.sparsifie
