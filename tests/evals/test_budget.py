"""How a budget of keys is spent: the shares that select k in the mean, and a k for each layer."""

import itertools

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.evals import fitted_k, fitted_query_share
from tokensieve.evals.budget import LEAST_MASS, STEP
from tokensieve.model import SelectionContext
from tokensieve.selectors import PerQuery

K = 16


def model_and_texts() -> tuple[tokensieve.model.DecoderForCausalLM, list[Tensor]]:
    return ours(config("v32", index_topk=K)), [tokens(1, 90, seed=seed)[0] for seed in (1, 2)]


def watched(model: tokensieve.model.DecoderForCausalLM, texts: list[Tensor], watch) -> None:
    """Calls `watch` with the context of every layer, while attention stays dense."""
    with torch.no_grad(), tokensieve.selecting(model, watch):
        for ids in texts:
            model(ids[None])


def test_the_share_of_what_is_read_selects_k_keys_in_the_mean() -> None:
    """On the hidden states of its own selection: fitted on those of dense attention alone it is off by 0.12 keys."""
    model, texts = model_and_texts()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(4)
    selector, counts = PerQuery(fitted_query_share(model, texts, queries=1000)), []

    def watch(c: SelectionContext) -> Tensor:
        indices, seen = selector(c), c.ends_N - c.starts_N
        counts.extend((indices >= 0).sum(1)[seen > K].tolist())
        return indices

    watched(model, texts, watch)
    assert abs(sum(counts) / len(counts) - K) < 0.07 and len(set(counts)) > 5


def test_no_other_numbers_of_keys_are_nearer_to_attention() -> None:
    """Against every way to spend the same budget in steps, from the mean curves of a naive count."""
    model, texts = model_and_texts()
    found, held = fitted_k(model, texts, queries=1000), {}

    def watch(c: SelectionContext) -> None:
        rows = torch.nonzero(c.ends_N - c.starts_N > K).flatten()
        scores, mass = c.scores(), c.head_mass()
        for t in rows.tolist():
            end = int(c.ends_N[t])
            order = scores[t, :end].argsort(descending=True, stable=True)
            curve = torch.nn.functional.pad(mass[t, order], (0, 4 * K))[: 4 * K]
            total, n = held.get(c.layer, (0.0, 0))
            held[c.layer] = total + curve.double().cumsum(0).clamp_min(LEAST_MASS).log(), n + 1

    watched(model, texts, watch)
    means = [held[layer][0] / held[layer][1] for layer in range(3)]
    choices = [ks for ks in itertools.product(range(STEP, 4 * K + 1, STEP), repeat=3) if sum(ks) == 3 * K]

    def total(ks: tuple[int, ...]) -> float:
        return sum(float(m[k - 1]) for m, k in zip(means, ks, strict=True))

    most, least = max(map(total, choices)), min(map(total, choices))
    assert found in choices and len(choices) == 10
    assert most - total(found) < 0.02 * (most - least)  # not exact: a mean curve of random weights is not concave


def test_what_is_refused() -> None:
    model, texts = model_and_texts()
    for fit in (fitted_query_share, fitted_k):
        with pytest.raises(UserError, match="no sequence is longer than k = 200 tokens"):
            fit(model, texts, 200)
    with pytest.raises(UserError, match="k is 12, and keys are given out 8 at a time"):
        fitted_k(model, texts, 12)
    with pytest.raises(UserError, match="share indexers"):
        fitted_k(tokensieve.share(model, [0, 2]), texts)
