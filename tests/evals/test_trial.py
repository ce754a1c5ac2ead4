"""A trial of a selector finds a choice that depends on the other queries of the call, and lets all others pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.evals.trial import try_selection
from tokensieve.model import selecting
from tokensieve.model.selection import SELECTORS, indexer, join, window

GOOD = ["Recent(last=8)", "PerQuery(0.02)", "Shared([1])", "DenseLayers([0])", "DenseBelow(60)", "DenseIfSpread(0.5)"]
GOOD += ["TwoLevel(16, 6)", "PerLayer([5, 9, 30])"]

DEPENDENT = {
    "keys by the number of queries": lambda c: c.topk(max(1, len(c) // 4)),
    "a row as a position": lambda c: torch.minimum(torch.arange(len(c)), c.ends_N - 1)[:, None],
    "a mean over queries": lambda c: c.select(c.scores() * (c.scores().nan_to_num(0).mean(0) - c.scores()[:1]).sign()),
    "every key in large calls": lambda c: None if len(c) > 60 else c.topk(),
    "every key in small calls": lambda c: c.topk() if len(c) > 60 else None,
    "new draws": lambda c: c.select(torch.rand_like(c.scores())),
}


def test_the_example_of_the_page() -> None:
    """docs/selection.md: it selects what it promises, in whole passes and row by row."""
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")
    (block,) = (b.split("```")[0] for b in page.split("```python\n") if "def with_every_64th" in b)
    names: dict[str, Any] = {}
    exec(compile(block, "selection.md", "exec"), names)
    model = ours(config("v32"))
    try_selection(model, names["with_every_64th"])
    with torch.no_grad(), selecting(model, names["with_every_64th"]):
        (last,) = model(tokens(1, 150), return_selection=True).selection[0][0, -1:]
    assert {0, 64, 128} <= {*last.tolist()} and int((last >= 0).sum()) <= 24 + 3


def every_third(c: Any) -> torch.Tensor:
    place = torch.arange(0, int(c.ends_N.max()), 3, dtype=torch.int32)
    return join(indexer(c), torch.where(place < c.ends_N[:, None], place, -1))


def in_blocks(c: Any) -> torch.Tensor:
    return torch.cat([b.topk() for b in c.blocks()])


@pytest.mark.parametrize("family", ["v32", "glm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_keeps_to_the_contract_passes(family: str, seed: int) -> None:
    model = ours(config(family), seed)
    for selection in (*SELECTORS, *(f"tokensieve.selectors:{name}" for name in GOOD), every_third):
        try_selection(model, selection)
    for selector in (lambda c: None, lambda c: join(window(c, 3), c.topk(2)), in_blocks):
        try_selection(model, selector, top_k=7)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_what_depends_on_other_queries_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="of layer 0 other keys when it was asked for half of them"):
        try_selection(ours(config("v32")), DEPENDENT[kind])


def test_a_model_of_few_positions_and_a_dense_one() -> None:
    """No more tokens are read than the model has positions; without an indexer there is one line."""
    try_selection(ours(config("v32", max_position_embeddings=32)), every_third)
    try_selection(ours(config("v3")), lambda c: window(c, 5))
    with pytest.raises(UserError, match="no indexer to select with"):
        try_selection(ours(config("v3")), every_third)
