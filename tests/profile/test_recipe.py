"""What training would cost: the report's tokens scaled, and the speed that time is counted with."""

import pytest
import torch

import tokensieve
from tests.support import models
from tokensieve import cost
from tokensieve.families import SparseConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.profile import recipe
from tokensieve.profile.recipe import paper_tokens, training_costs


@pytest.fixture
def sparse() -> DecoderForCausalLM:
    return tokensieve.sparsify(models.ours(models.config("v3")), top_k=16, index_heads=4, index_dim=16)


def test_the_published_model_takes_the_reports_tokens() -> None:
    shape = cost.shape_of(SparseConfig())
    assert paper_tokens("warmup", shape) == 1000 * 16 * 131072 and paper_tokens("adapt", shape) == 15000 * 480 * 131072


def test_tokens_follow_the_parameters(sparse: DecoderForCausalLM) -> None:
    own, paper = (cost.parameters(cost.shape_of(c)) for c in (sparse.config, SparseConfig()))
    warmup, adapt = training_costs(sparse, 16, 128, 1e9, peak_flops=1e12)
    assert 0 <= warmup.tokens - 2097152000 * own.indexer / paper.indexer < 129
    assert 0 <= adapt.tokens - 943718400000 * own.active / paper.active < 129
    assert (warmup.stage, adapt.stage, adapt.context) == ("warmup", "adapt", 128)


def test_a_peak_is_taken_by_its_share(sparse: DecoderForCausalLM) -> None:
    for stage in training_costs(sparse, 16, 128, 1e9, peak_flops=1e12, utilization=0.25):
        assert stage.seconds == pytest.approx(stage.flops / 0.25e12) and stage.speed == "25% of the peak given"
        assert stage.memory_bytes == sum(
            (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.activation_bytes)
        )


def test_this_machine_is_timed_and_the_model_stays_as_it_was(sparse: DecoderForCausalLM) -> None:
    weights = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    for stage in training_costs(sparse, 32, 128, 1e9):
        assert stage.seconds and stage.flops_per_second and "128 tokens, timed on this machine" in stage.speed
        assert stage.seconds == pytest.approx(stage.flops / stage.flops_per_second)
    assert not sparse.training and sparse.config.index_topk == 16 and not sparse.model.gradient_checkpointing
    assert all(p.grad is None for p in sparse.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in sparse.state_dict().items())


def test_what_cannot_be_timed_has_no_time(sparse: DecoderForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(s.seconds is None and "too long" in s.speed for s in training_costs(sparse, 16, 128, 1.0))
    memory = type("Memory", (), {"available": 1})()
    monkeypatch.setattr(recipe.psutil, "virtual_memory", lambda: memory)
    assert all(s.seconds is None and "does not fit" in s.speed for s in training_costs(sparse, 16, 128, 1e12))
