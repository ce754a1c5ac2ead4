"""The counts of a plan beside what two ranks hold: their parts between steps, and the layers that FSDP gathers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.support import grouped, models, ranks
from tests.support.training import config
from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.cost.train_memory import GATHERED, Ranks, memory
from tokensieve.train.parallelize import divide, shard

SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32"),
    "glm": lambda: config("glm", index_topk=16, **SHARED),
    "qwen3_moe_dsa": lambda: grouped.config("qwen3_moe_dsa", tie_word_embeddings=True),
}


def bytes_of_rank(family: str) -> tuple[int, list[int]]:
    """Bytes that this rank holds between steps, and those of the parameters of each FSDP module once it is gathered."""
    run = TrainConfig("adapt", "", "", (PhaseConfig(1, 64, 2),), device="cpu")
    root = shard(models.ours(FAMILIES[family]()), divide(run, ranks.HERE[0]))
    parts = [p.to_local() for p in root.parameters() if isinstance(p, DTensor)]
    assert len(parts) == len(list(root.parameters()))
    gathered = []
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            gathered.append(sum(p.numel() * p.element_size() for p in root.parameters() if not isinstance(p, DTensor)))
            module.reshard()
    assert all(part.dtype == torch.float32 for part in parts)
    return sum(part.numel() * part.element_size() for part in parts), gathered


@pytest.fixture(scope="module")
def two() -> Iterator[ranks.Group]:
    with ranks.started(2) as group:
        yield group


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(two: ranks.Group, family: str) -> None:
    made = FAMILIES[family]()
    shape = cost.shape_of(made)
    counted = memory(shape, "adapt", Ranks(2), sequences=1, context=64, checkpointing=True)
    held = {h.name: h.bytes for h in counted}
    answers = two.ask(bytes_of_rank, family)
    buffers = 4 * shape.moe_layers * shape.experts * shape.router_bias  # the routers' biases, which every rank has
    assert sum(size for size, _ in answers) == 2 * held["weights, float32"] - buffers
    _, gathered = answers[0]
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    last_norm = shape.hidden
    assert GATHERED * (tables + last_norm) in gathered
    # A plan takes the largest layer for each of those that are gathered together.
    layers = sorted(size for size in gathered if size and size != GATHERED * (tables + last_norm))
    planned = (held["gathered layers, embedding and head"] - GATHERED * tables) // 2
    assert layers[-1] <= planned
    if shape.index_layers == shape.layers:
        assert layers[-1] == planned
