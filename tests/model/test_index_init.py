"""Indexers that begin from the attention: every family and width, what they are worth untrained, what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import grouped, models
from tests.support.models import attention_of, index_of, ours
from tokensieve.config import UserError
from tokensieve.evals import recall
from tokensieve.families import FAMILIES
from tokensieve.model import DecoderForCausalLM, SelectionContext
from tokensieve.model.index_basis import Basis, Layout, as_complex, as_pairs
from tokensieve.model.index_init import _merged, fitted_sizes

K = 16
LATENT = {
    "v3": models.config("v3", rope_parameters=models.YARN),
    "v3 of halves, with biases": models.config("v3", rope_interleave=False, attention_bias=True),
    "v2 without a latent": models.config("v2", q_lora_rank=None),
    "kimi_k2": FAMILIES["kimi_k2"].config(**models.SHAPE),
    "glm4_moe_lite": FAMILIES["glm4_moe_lite"].config(**models.SHAPE),
}
GROUPED = {
    "llama": grouped.config("llama", rope_parameters=grouped.LLAMA3),
    "llama with biases": grouped.config("llama", attention_bias=True),
    "mistral": grouped.config("mistral"),
    "qwen2": grouped.config("qwen2", rope_parameters=grouped.GIVEN),
    "qwen3": grouped.config("qwen3"),
    "qwen3_moe": grouped.config("qwen3_moe"),
}
CONFIGS = LATENT | GROUPED


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def ids(rows: int = 2, length: int = 160, seed: int = 0) -> Tensor:
    return models.tokens(rows, length, seed)


def structured(config: Any) -> DecoderForCausalLM:
    """A random model whose attention is not flat: logits of a few nats, as in a trained one."""
    model = ours(config, seed=1)
    for name, parameter in model.named_parameters():
        if re.search(r"self_attn\.(q_b_proj|q_proj)\.weight$", name):
            parameter.mul_(3)
    return model


def mean_recall(model: DecoderForCausalLM) -> float:
    return recall(model, list(ids(2, 200, seed=9)), K).overall


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family(kind: str, tmp_path: Path) -> None:
    """Finite, the same twice, better than random, and saved and loaded bit for bit."""
    dense = structured(CONFIGS[kind])
    before = {name: x.clone() for name, x in dense.state_dict().items()}
    sizes = {"top_k": K, "index_heads": 8, "index_dim": 16}
    made, again = (tokensieve.sparsify(dense, **sizes, init="attention", calibration=ids()) for _ in range(2))
    state = made.state_dict()
    assert all(torch.equal(x, before[name]) for name, x in dense.state_dict().items())
    assert all(x.isfinite().all() and torch.equal(x, again.state_dict()[name]) for name, x in state.items())
    drawn = [mean_recall(tokensieve.sparsify(dense, **sizes, seed=seed)) for seed in range(3)]
    assert mean_recall(made) > max(drawn) + 0.1, (mean_recall(made), drawn)

    tokensieve.save(made, tmp_path)
    loaded = tokensieve.load(tmp_path)
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    assert torch.equal(loaded(ids()).logits, made(ids()).logits)


@pytest.mark.parametrize("kind, width, heads", [("v3", 8, 1), ("v3", 128, 9), ("v2 without a latent", 12, 3)])
def test_heads_and_widths(kind: str, width: int, heads: int) -> None:
    dense = structured(CONFIGS[kind])
    made = tokensieve.sparsify(dense, K, heads, width, init="attention", calibration=ids())
    drawn = [mean_recall(tokensieve.sparsify(dense, K, heads, width, seed=seed)) for seed in range(3)]
    assert mean_recall(made) > sum(drawn) / 3


@pytest.mark.parametrize("heads, width, rope", [(1, 8, 4), (16, 24, 12)])
def test_fewer_rotated_dims_than_the_attention_has(heads: int, width: int, rope: int, monkeypatch: Any) -> None:
    family = type(FAMILIES["llama"])
    monkeypatch.setattr(family, "index_rope", lambda self, config: rope)
    dense = structured(CONFIGS["llama"])
    made = tokensieve.sparsify(dense, K, heads, width, init="attention", calibration=ids())
    drawn = [mean_recall(tokensieve.sparsify(dense, K, heads, width, seed=seed)) for seed in range(3)]
    assert mean_recall(made) > sum(drawn) / 3


def test_an_index_that_is_wide_enough_has_the_logits_of_the_attention() -> None:
    """With one key for all heads and room for all of it, index heads are query heads before the ReLU and the norm."""
    layout = Layout(
        12, torch.tensor([1.0, 0.1, 0.01, 1e-3]), True, 20, torch.tensor([1.0, 0.1, 0.01, 1e-3]), False, 1.0, 9
    )
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(50, 3, 20, generator=generator), torch.randn(60, 1, 20, generator=generator)
    basis = Basis(q, k, layout)
    a = torch.einsum("rhd,nd->rhn", basis.queries(q), basis.keys(k))
    assert torch.allclose(a, torch.einsum("rhd,nd->rhn", q, k[:, 0]), atol=1e-4)


@pytest.mark.parametrize("interleaved", [True, False])
def test_pairs(interleaved: bool) -> None:
    x = torch.arange(24.0).view(3, 8)
    z = as_complex(x, interleaved)
    assert torch.equal(as_pairs(z, interleaved), x)
    assert z[0, 1] == (complex(2, 3) if interleaved else complex(1, 5))


@pytest.mark.parametrize(
    "config",
    [
        models.config("v3", num_hidden_layers=1, num_attention_heads=1, kv_lora_rank=8),
        grouped.config("llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
    ],
    ids=["latent", "grouped"],
)
def test_the_index_follows_the_attention_far_and_near(config: Any) -> None:
    """At every distance the heads' products are those of the attention; with a swapped layout they agree to 0.7."""
    made = tokensieve.sparsify(structured(config), K, 2, 16, init="attention", calibration=ids())
    found: list[tuple[Tensor, Tensor]] = []

    def watch(c: SelectionContext) -> None:
        (q_I, k_I, _), (q, k, _) = index_of(c), attention_of(c)
        found.append((q_I[:, 0] @ k_I.T, q[:, 0] @ k[:, 0].T))

    with tokensieve.selecting(made, watch):
        made(ids(1, 300))
    for distances in (range(1, 9), range(9, 65), range(65, 250)):
        index, logits = (torch.cat([x.diagonal(-d) for d in distances]) for x in found[0])
        assert float(torch.corrcoef(torch.stack((index, logits)))[0, 1]) > 0.9, distances


def test_random_tokens_are_drawn_from_the_seed() -> None:
    dense = structured(models.config("v3", max_position_embeddings=128))
    name = "model.layers.1.self_attn.indexer.wk.weight"
    a, same, other = (
        tokensieve.sparsify(dense, K, 4, 16, init="attention", seed=seed).state_dict()[name] for seed in (0, 0, 1)
    )
    assert torch.equal(a, same) and not torch.equal(a, other)


def test_bfloat16_and_fp8(tmp_path: Path) -> None:
    dense = structured(models.config("v3")).to(torch.bfloat16)
    made = tokensieve.sparsify(dense, K, 4, 16, "fp8", init="attention", calibration=ids())
    indexer = made.model.layers[0].self_attn.indexer
    assert indexer.wk.weight.dtype == torch.bfloat16 and indexer.weights_proj.weight.dtype == torch.float32
    drawn = [mean_recall(tokensieve.sparsify(dense, K, 4, 16, "fp8", seed=seed)) for seed in range(3)]
    assert mean_recall(made) > max(drawn)


def test_heads_whose_logits_agree_are_added() -> None:
    a = torch.tensor([[1.0, 0.1, 0.9, 0.0], [0.1, 1.0, 0.0, -0.9], [0.9, 0.0, 1.0, 0.0], [0.0, -0.9, 0.0, 1.0]])
    assert _merged(a, 4) == [[0], [1], [2], [3]]
    assert _merged(a, 3) == [[0, 2], [1], [3]]
    assert sorted(sorted(group) for group in _merged(a, 1)) == [[0, 1, 2, 3]]


def test_sizes_minimise_the_kl() -> None:
    """Of two heads, one of which has the target, that one is heard, at the temperature of the target."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 2, 64, generator=generator).relu()
    outside = torch.zeros(40, 64, dtype=torch.bool)
    c = fitted_sizes(scores, (3 * scores[:, 0]).softmax(-1), outside)
    assert 2.5 < float(c[0]) < 3.2 and 0 < float(c[1]) < 0.7  # pulled up from 0


def test_what_it_refuses() -> None:
    dense = ours(models.config("v3"))
    for options, complaint in (
        ({"init": "zeros"}, "init is 'zeros'; it is one of random, attention"),
        ({"calibration": ids()}, "leave it out"),
        ({"init": "attention", "calibration": ids()[0]}, r"calibration is \(160,\) torch.int64"),
        ({"init": "attention", "calibration": "text"}, "calibration is str"),
        ({"init": "attention", "calibration": ids().float()}, "int64"),
        ({"init": "attention", "calibration": ids() + 96}, "vocabulary of 96"),
        ({"init": "attention", "calibration": ids(1, 1)}, "at least 2 tokens"),
        ({"init": "attention", "calibration": ids(1, 2000)}, "1024"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            tokensieve.sparsify(dense, K, 2, 8, **options)
        assert "\n" not in str(error.value)
    dense.model.layers[1].self_attn.o_proj.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="layer 2: its input is not finite"):
        tokensieve.sparsify(dense, K, 2, 8, init="attention", calibration=ids())


@pytest.mark.parametrize("family", ["v3", "llama"])
@pytest.mark.parametrize("part", ["queries", "keys"])
def test_a_layer_with_nothing_to_begin_from_stays_random(family: str, part: str) -> None:
    """Queries of zeros would be divided by their size, which is 0."""
    dense = ours((grouped if family == "llama" else models).config(family))
    attention = dense.model.layers[1].self_attn
    names = {"queries": ("q_proj", "q_b_proj"), "keys": ("k_proj", "kv_a_proj_with_mqa")}[part]
    with torch.no_grad():
        for name, weight in attention.named_parameters():
            if name.startswith(names):
                weight.zero_()
    drawn, made = (tokensieve.sparsify(dense, K, 2, 16, init=init) for init in ("random", "attention"))
    pairs = list(zip(drawn.named_parameters(), made.named_parameters(), strict=True))
    assert all(bool(weight.isfinite().all()) for _, (_, weight) in pairs)
    same = {int(name.split(".")[2]) for (name, a), (_, b) in pairs if "wq_b" in name and "index" in name and a.equal(b)}
    assert same == {1}
