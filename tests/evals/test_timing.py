"""The time of a token and of a chunk against context, in the engine, on caches that are filled."""

import pytest
import torch

import tokensieve
from tests.support import models
from tokensieve import evals
from tokensieve.config import UserError
from tokensieve.evals import timing


@pytest.fixture(scope="module")
def dense():
    return models.ours(models.config("v3", max_position_embeddings=2048))


@pytest.fixture(scope="module")
def sparse(dense):
    return tokensieve.sparsify(dense, top_k=16, index_heads=4, index_dim=16)


@pytest.fixture(scope="module")
def texts(dense):
    return [torch.randint(0, dense.config.vocab_size, (320,), generator=torch.Generator().manual_seed(5))]


def test_a_filled_cache_repeats_a_real_one(sparse, texts):
    real, page = texts[0][:200], 64  # three whole pages
    runner = timing.filled(sparse, real, 400)
    whole = tokensieve.LatentCache()
    with torch.no_grad():
        sparse(real[None], past_key_values=whole, use_cache=True)
    for pools, sources in ((runner.pools.entries, whole.entries_BTW), (runner.pools.index, whole.index_BTD)):
        for pool, source_BTX in zip(pools, sources, strict=True):
            held, source = pool.flatten(0, 1), source_BTX[0]
            torch.testing.assert_close(held[: 3 * page], source[: 3 * page], atol=1e-5, rtol=1e-4)
            change = held[3 * page : 6 * page] - source[: 3 * page]
            assert 0 < float(change.std()) < 0.02 * float(source.std())
            assert len(held[:400].unique(dim=0)) == 400  # no two keys are equal


def test_a_token_and_a_chunk_are_timed_for_each_model_and_context(dense, sparse, texts):
    models, contexts = {"dense": dense, "sparse": sparse}, (64, 400)
    token, chunk = evals.context_ms(models, texts[0], contexts, token_rounds=1, chunk_rounds=1)
    for found in (token, chunk):
        assert list(found) == ["dense", "sparse"] and all(list(x) == ["64", "400"] for x in found.values())
        assert all(ms > 0 for x in found.values() for ms in x.values())
    with pytest.raises(UserError, match="dense: a context of 2049 tokens is past the model's 2048 positions"):
        evals.context_ms({"dense": dense}, texts[0], (2049,))


def test_the_crossover_is_where_sparse_stays_ahead():
    def ms(*sparse):
        contexts = ("2048", "8192", "16384", "32768")
        return {"dense": dict.fromkeys(contexts, 10.0), "sparse": dict(zip(contexts, sparse, strict=True))}

    assert evals.crossover(ms(9, 9, 9, 9)) == 2048
    assert evals.crossover(ms(9, 11, 10, 9)) == 16384
    assert evals.crossover(ms(9, 9, 9, 11)) is None
