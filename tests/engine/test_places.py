"""Where a sequence's pages lie, and what lies beside it, changes no bit of a step on the CPU."""

import pytest
import torch

import tokensieve
from tests.support import grouped, models
from tokensieve.engine.runner import Runner

LENGTH, K = 200, 16
NAMES = ("indexer", "dense", "window", "sinks", "oracle")


@pytest.fixture(scope="module", params=["v3", "llama", "qwen3_moe"])
def model(request):
    if request.param in grouped.DENSE:
        widths = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = grouped.config(request.param, **widths, num_hidden_layers=2, vocab_size=96)
    else:
        config = models.config(request.param, num_hidden_layers=2)
    dense = models.ours(config)
    return tokensieve.sparsify(dense, top_k=K, index_heads=4, index_dim=16).eval()


def last_logits(model, pages, name, beside=()):
    """Logits of the last of `LENGTH` tokens, whose entries lie on `pages`; `beside`: pages of a second sequence."""
    runner = Runner(model, 12)
    for pool in (*runner.pools.entries, *runner.pools.index):
        pool.fill_(float("nan"))  # what nobody wrote is garbage
    tokens = [3 + i % 50 for i in range(LENGTH)]
    for held in (pages, beside):
        if held:
            runner.chunk(tokens[:-1], 0, held, name)
    rows = 2 if beside else 1
    return runner.step(tokens[-1:] * rows, [LENGTH] * rows, [pages, list(beside)][:rows], name)[0].clone()


@pytest.mark.parametrize("name", NAMES)
def test_places_change_no_bit(model, name):
    first = last_logits(model, [0, 1, 2, 3], name)
    assert first.isfinite().all()
    for pages, beside in (
        ([5, 6, 7, 8], ()),
        ([9, 2, 11, 4], ()),
        ([8, 9, 10, 11], (1, 2, 3, 4)),
        ([3, 2, 1, 0], (9, 5, 7, 6)),
    ):
        assert torch.equal(last_logits(model, pages, name, beside), first), (pages, beside)
