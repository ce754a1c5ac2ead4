"""The mass and the overlap of the best keys, against transformers' own attention weights in float64."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import tokensieve
from tests.support import models
from tests.support.models import SHAPE, VOCAB, tokens
from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM
from tokensieve.profile import concentration
from tokensieve.profile.concentration import REACH, Concentration, measure

KS = (8, 24, 64, 200)
LENGTH = 100
GROUPED = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")


def config(family: str) -> Any:
    if family == "llama":
        own = {name: SHAPE[name] for name in GROUPED}
        return LlamaConfig(**own, num_hidden_layers=5, num_key_value_heads=2, head_dim=16)
    return models.config(family, num_hidden_layers=5)


@pytest.fixture(scope="module", params=["v3", "v2", "llama"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DecoderForCausalLM, Tensor]:
    """Our model, and the probabilities (L, S, T) of transformers' on one text, heads averaged in float64."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs, ours = models.pair(config(request.param), folder)
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        weights = theirs(tokens(1, LENGTH), output_attentions=True).attentions
    return ours, torch.stack([w[0].double().mean(0) for w in weights])


@pytest.fixture(scope="module")
def dense() -> DecoderForCausalLM:
    return models.ours(models.config("v3"))


def naive(p_LST: Tensor, queries: list[int], source: int, layer: int, k: int) -> tuple[float, float]:
    """(mass of `layer` in the k best keys of `source`, share of keys in common), over queries with more than k keys."""
    held, common = [], []
    for t in (t for t in queries if t + 1 > k):
        best, own = (p_LST[i, t, : t + 1].argsort(descending=True)[:k] for i in (source, layer))
        held.append(float(p_LST[layer, t, best].sum()))
        common.append(float(torch.isin(best, own).sum()) / k)
    return sum(held) / len(held), sum(common) / len(common)


def test_figures_are_those_of_a_naive_count(both: tuple[DecoderForCausalLM, Tensor]) -> None:
    model, p_LST = both
    found = measure(model, [tokens(1, LENGTH)[0]], KS, LENGTH, 60)
    assert found.layers == 5 and found.texts[0].queries == LENGTH - KS[0]
    everything = list(range(LENGTH))
    assert set(found.texts[0].held) == {(i, j) for i in range(5) for j in range(5) if i <= j <= i + REACH}
    for k, (source, layer) in product(KS[:3], [(0, 1), (1, 4), (3, 4)]):
        held, common = naive(p_LST, everything, source, layer, k)
        assert found.pair(k, source, layer) == pytest.approx(held, rel=1e-4)
        assert found.pair(k, source, layer, common=True) == pytest.approx(common, abs=5e-3)
        loss = 1 - held / naive(p_LST, everything, layer, layer, k)[0]
        assert found.loss(k, source, layer) == pytest.approx(loss, abs=1e-4)
    means = [naive(p_LST, everything, i, i, 24)[0] for i in range(5)]
    assert found.mass(24).value == pytest.approx(sum(means) / 5, rel=1e-4)


def test_queries_are_spaced_evenly_and_held_few_at_a_time(
    both: tuple[DecoderForCausalLM, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, p_LST = both
    rows: list[int] = []
    original = ops.head_mass
    monkeypatch.setattr(ops, "head_mass", lambda q, *rest: rows.append(len(q)) or original(q, *rest))
    monkeypatch.setattr(concentration, "ROWS", 4)
    found = measure(model, [tokens(1, LENGTH)[0]], KS, 10, 60)
    chosen = [8 + int((i + 0.5) * 92 / 10) for i in range(10)]
    assert found.pair(24, 0, 2) == pytest.approx(naive(p_LST, chosen, 0, 2, 24)[0], rel=1e-4)
    assert max(rows) == 4 and sum(rows) == 2 * 5 * 10  # the rehearsal's pass, and the text's own


def test_mass_grows_with_k_and_is_whole_in_the_end(dense: DecoderForCausalLM) -> None:
    found = measure(dense, [tokens(1, length, seed)[0] for seed, length in enumerate((100, 70, 40))], KS, 30, 60)
    for text in found.texts:
        for stretch in text.by_stretch:
            assert stretch == sorted(stretch) or any(x != x for x in stretch)
    figures = found.to_dict()
    assert [row["from"] for row in figures["mass_by_position"]] == [9, 25, 65]
    assert [row["texts"] for row in figures["mass_by_position"]] == [3, 3, 2]
    for row in figures["mass_by_position"]:
        assert all(mass == 1.0 for k, mass in zip(KS, row["mass"], strict=True) if k >= row["to"])
        assert all(mass < 1.0 for k, mass in zip(KS, row["mass"], strict=True) if k < row["to"])
    assert [found.mass(k).n for k in KS] == [3, 3, 2, 0]
    assert found.mass(200).value == 1.0 and found.mass(200).low is None  # no text has so many keys: all are held
    assert found.mass(24).low is not None and found.mass(24).low < found.mass(24).value


def test_a_sparse_model_is_watched_densely(dense: DecoderForCausalLM) -> None:
    sparse = tokensieve.sparsify(dense, top_k=16, index_heads=4, index_dim=16)
    texts = [tokens(1, LENGTH)[0]]
    found, expected = measure(sparse, texts, KS, 20, 60), measure(dense, texts, KS, 20, 60)
    assert [found.mass(k) for k in KS] == [expected.mass(k) for k in KS] and found.loss(8, 0, 2) == expected.loss(
        8, 0, 2
    )
    assert not sparse.model._forward_pre_hooks


class Clock:
    """Time passes while texts are read, so much for each token."""

    def __init__(self, per_token: float, monkeypatch: pytest.MonkeyPatch):
        self.now, self.read = 0.0, []
        original = concentration._watch

        def watch(model: Any, ids: Tensor, *rest: Any) -> Any:
            self.now += per_token * len(ids)
            self.read.append(len(ids))
            return original(model, ids, *rest)

        monkeypatch.setattr(concentration, "_watch", watch)

    def __call__(self) -> float:
        return self.now


def timed(model: DecoderForCausalLM, clock: Clock, lengths: list[int], seconds: float) -> Concentration:
    return measure(model, [tokens(1, n)[0] for n in lengths], KS, 4, seconds, clock=clock)


def test_it_takes_what_fits_into_the_time(dense: DecoderForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concentration, "REHEARSAL", 50)
    clock = Clock(0.1, monkeypatch)
    found = timed(dense, clock, [100] * 12, 106)
    assert clock.read == [50] + [100] * 10 and (len(found.texts), found.wanted, found.context) == (10, 12, 100)
    assert found.seconds == pytest.approx(105) and found.flops_per_second > 0


def test_texts_are_cut_if_few_would_fit(dense: DecoderForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concentration, "REHEARSAL", 20)
    clock = Clock(0.1, monkeypatch)
    found = timed(dense, clock, [100] * 5, 28)  # after 2 s of rehearsal five texts of 10 s do not fit, of 5 s they do
    assert found.context == 50 and clock.read == [20] + [50] * 5
    clock = Clock(1.0, monkeypatch)
    found = timed(dense, clock, [100] * 5, 0)
    assert len(found.texts) == 1 and found.context > KS[0]  # one is measured, however long it takes


def test_what_cannot_be_measured(dense: DecoderForCausalLM) -> None:
    with pytest.raises(UserError, match="at most 8 tokens"):
        measure(dense, [tokens(1, 8)[0]], KS, 4, 60)
    nothing = measure(dense, [], KS, 4, 60)
    assert nothing.mass(8).n == 0 and nothing.to_dict()["mass_by_position"] == []
    broken = models.ours(models.config("v3"))
    with torch.no_grad():
        broken.model.layers[1].self_attn.kv_b_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="attention is not finite"):
        measure(broken, [tokens(1, 50)[0] % VOCAB], KS, 4, 60)
