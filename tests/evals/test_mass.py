"""The mass that a selection holds; the indexer's is tested in test_evals.py."""

import pytest

from tests.support import models
from tokensieve import evals
from tokensieve.model.selection import oracle, window


def test_recall_of_another_selector() -> None:
    """It needs no indexer, and the best set holds all that it can."""
    dense, texts = models.ours(models.config("v3")), list(models.tokens(2, 120))
    best, last = (evals.recall(dense, texts, 16, 20, selector) for selector in (oracle, window))
    assert best.overall == pytest.approx(1.0, abs=1e-5) and 0 < last.overall < 0.9
    assert best.queries == last.queries == 40
