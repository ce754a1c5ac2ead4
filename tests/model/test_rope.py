"""Frequencies of every type of RoPE against those of transformers, over the widths of heads and of indexers."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.support import models
from tests.support.grouped import LINEAR, LLAMA3, ROPES
from tokensieve.model.rope import frequencies

PUBLISHED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("rope", [rope for rope in (*ROPES, PUBLISHED) if rope], ids=lambda rope: rope["rope_type"])
def test_frequencies_equal_those_of_transformers(rope: dict, width: int) -> None:
    config = LlamaConfig(
        hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=1024, rope_parameters=rope
    )
    got, factor = frequencies(config.rope_parameters, width, 1024)
    if rope["rope_type"] == "default":
        want, theirs = rope["rope_theta"] ** -(torch.arange(0, width, 2) / width), 1.0
    else:
        want, theirs = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert torch.allclose(got, want, rtol=1e-6, atol=0) and factor == pytest.approx(theirs, rel=1e-9)


def test_the_published_scaling_keeps_fast_pairs_and_slows_the_others() -> None:
    scaled, _ = frequencies(PUBLISHED, 128, 131072)
    plain, _ = frequencies({"rope_theta": 5e5}, 128, 131072)
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8) and ratio.diff().min() > -1e-6
    assert ((ratio > 1.001) & (ratio < 7.999)).any()


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3], ids=["linear", "llama3"])
@torch.no_grad()
def test_latent_attention_takes_them_too(rope: dict, tmp_path: Path) -> None:
    oracle, model = models.pair(models.config("v3", rope_parameters=rope), tmp_path)
    ids = models.tokens(1, 90)
    with models.margins(model) as gaps:
        assert models.difference(model(ids).logits, oracle(ids).logits) < 1e-4
    assert min(gaps) > 1e-6
