"""Lengths from which on sparse attention is cheaper, against a scan and against sums over positions."""

import pytest
from transformers import LlamaConfig

from tests.support import models
from tokensieve import cost
from tokensieve.families import SparseConfig
from tokensieve.profile.crossover import LAYOUT, crossover, spent

GROUPED = LlamaConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_hidden_layers=3)
SHAPES = {
    "latent": cost.with_indexer(cost.shape_of(models.config("v3")), 20),
    "grouped": cost.with_indexer(cost.shape_of(GROUPED), 20, 1, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_crossovers_are_the_first_of_a_scan(name: str) -> None:
    shape = SHAPES[name]
    found = crossover(shape)

    def first(needed) -> int:
        return next(c for c in range(1, 20_000) if needed(c, True) < needed(c, False))

    assert found.token_bytes == first(lambda c, sparse: cost.decode_cache_bytes(shape, c, LAYOUT, sparse=sparse))
    assert found.token_flops == first(lambda c, sparse: cost.forward_flops(shape, 1, c - 1, sparse=sparse))
    assert found.prompt_flops == first(lambda c, sparse: cost.forward_flops(shape, c, sparse=sparse, logits=1))
    assert found.dense_below == max(found.token_bytes, found.token_flops, found.prompt_flops)


def test_an_indexer_that_costs_more_than_attention_never_pays() -> None:
    found = crossover(cost.with_indexer(cost.shape_of(GROUPED), 20, 64, 128))
    assert found.token_bytes is None and found.token_flops is None and found.dense_below is None


def test_the_indexer_is_in_the_published_models_proportion() -> None:
    published = cost.shape_of(SparseConfig())
    dense = cost.with_indexer(cost.shape_of(models.config("v3", num_attention_heads=128, v_head_dim=128)), 2048)
    assert (dense.index_heads, dense.index_dim) == (published.index_heads, published.index_dim) == (64, 128)
    kept = cost.with_indexer(published, 512, 3, 3)  # a sparse model has its own
    assert (kept.top_k, kept.index_heads, kept.index_dim) == (512, 64, 128)


def test_spent_is_a_sum_over_documents_and_positions() -> None:
    shape, lengths, below = SHAPES["latent"], [10, 300, 900, 1500], 400
    read: dict[bool, float] = {True: 0, False: 0}
    flops: dict[bool, float] = {True: 0, False: 0}
    for n in lengths:
        for sparse in (True, False):
            selects = sparse and n >= below
            read[sparse] += sum(cost.decode_cache_bytes(shape, c, LAYOUT, sparse=selects) for c in range(1, n + 1))
            flops[sparse] += cost.forward_flops(shape, n, sparse=selects, logits=1)
    found = spent(shape, lengths, below)
    assert found["token_bytes"] == pytest.approx(read[True] / read[False] * 1, rel=1e-9)
    assert found["prompt_flops"] == pytest.approx(flops[True] / flops[False], rel=1e-9)
    assert spent(shape, [10, 20], below) == {"prompt_flops": 1.0, "token_bytes": 1.0}
