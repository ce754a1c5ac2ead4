"""The memory of one GPU in training against counts of built models, kernels' own constants, and measured peaks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.support import grouped, models
from tokensieve import cost
from tokensieve.config import LoraConfig
from tokensieve.cost.train_memory import SCORES, STRIP, Ranks, host_memory, layer_parameters, memory
from tokensieve.cost.train_rates import GROUPED, LITE
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.lora import adapted, adapters_of
from tokensieve.train.precision import exact_modules

SHARED = ["full", "shared", "shared", "full"]
BUILT: dict[str, Any] = {
    "v32": lambda: models.config("v32"),
    "v32 tied": lambda: models.config("v32", tie_word_embeddings=True, q_lora_rank=None),
    "glm": lambda: models.config("glm", num_hidden_layers=4, indexer_types=SHARED),
    "qwen3_dsa": lambda: grouped.config("qwen3_dsa"),
    "qwen3_moe_dsa": lambda: grouped.config("qwen3_moe_dsa"),
    "llama_dsa": lambda: grouped.config("llama_dsa", mlp_bias=True, attention_bias=True),
}


def built(kind: str) -> tuple[DecoderForCausalLM, cost.Shape]:
    config = BUILT[kind]()
    with torch.device("meta"):
        model = DecoderForCausalLM(config)
    return model, cost.shape_of(config)


def held(shape: cost.Shape, stage: cost.training.Stage, ranks: Ranks, **more: Any) -> dict[str, int]:
    sizes = {"sequences": 1, "context": 64, "checkpointing": True} | more
    return {h.name: h.bytes for h in memory(shape, stage, ranks, **sizes)}


def numbers(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("kind", BUILT)
def test_what_lasts_is_divided(kind: str) -> None:
    model, shape = built(kind)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    total, indexers = numbers(model.parameters()) + biases, numbers(model.indexer_parameters())
    for stage, learning in (("adapt", total), ("warmup", indexers), ("pretrain", total - indexers)):
        found = held(shape, stage, Ranks(4))
        assert found["weights, float32"] == 4 * total // 4
        assert found["gradients, float32"] == 4 * learning // 4
        assert found["moments of Adam, float32"] == 8 * learning // 4


@pytest.mark.parametrize("kind", BUILT)
def test_a_layer_is_gathered_whole(kind: str) -> None:
    """Of a model whose layers all have an indexer, parameters are counted layer by layer, experts apart."""
    model, shape = built(kind)
    counted = {(layer.other, layer.exact, layer.experts) for layer in layer_parameters(shape)}
    own = set()
    for layer in model.model.layers:
        if layer.self_attn.indexer is not None:
            experts = numbers(p for n, p in layer.named_parameters() if ".experts." in n)
            exact = numbers(p for module in exact_modules(layer) for p in module.parameters())
            own.add((numbers(layer.parameters()) - exact - experts, exact, experts))
    assert counted == own


def test_gathered_layers_by_hand() -> None:
    """Two layers in bfloat16 with embedding and head; in the backward pass a layer's gradient twice, in both dtypes.

    What is read in float32 stays gathered.
    """
    model, shape = built("v32")
    exact = numbers(p for module in exact_modules(model) for p in module.parameters())
    of_layers = [
        {id(p) for module in exact_modules(layer) for p in module.parameters()} for layer in model.model.layers
    ]
    layer = max(
        numbers(p for p in layer.parameters() if id(p) not in apart)
        for layer, apart in zip(model.model.layers, of_layers, strict=True)
    )
    tables = 2 * models.VOCAB * 48
    found = held(shape, "adapt", Ranks(2))
    assert found["gathered layers, embedding and head"] == 2 * (2 * layer + tables) + 4 * exact
    assert found["their gradients"] == 2 * (layer + tables) + 4 * (max(layer, tables) + exact)
    assert held(shape, "warmup", Ranks(2))["their gradients"] == 0
    assert "weights in bfloat16, for products" not in found
    alone = held(shape, "adapt", Ranks(1), checkpointing=False)  # no layer is gathered; every copy is kept
    assert "gathered layers, embedding and head" not in alone
    assert alone["weights in bfloat16, for products"] == 2 * (cost.parameters(shape).total - models.VOCAB * 48)


@pytest.mark.parametrize("kind", ["v32", "qwen3_moe_dsa", "llama_dsa"])
@pytest.mark.parametrize("targets", ["all-linear", ("o_proj", "down_proj")])
def test_what_lasts_beside_adapters(kind: str, targets: Any) -> None:
    """Indexers learn as copies. Gathered are the adapters of a layer too, and no gradients but theirs are made."""
    model, shape = built(kind)
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    plain = held(shape, "adapt", Ranks(4))
    with adapted(model, LoraConfig(rank=3, targets=targets)):
        total, learning = (
            numbers(p for p in model.parameters() if p.requires_grad or every) for every in (True, False)
        )
        found = held(shape, "adapt", Ranks(4), adapters=adapters_of(model))
        away = host_memory(shape, "adapt", Ranks(4), adapters_of(model))
    assert found["weights, float32"] == 4 * (total + biases) // 4
    assert found["gradients, float32"] == 4 * learning // 4 and found["moments of Adam, float32"] == 8 * learning // 4
    name = "gathered layers, embedding and head"
    assert found[name] - plain[name] == 2 * 2 * (learning // shape.layers)
    assert 0 < found["their gradients"] < plain["their gradients"] / 2
    assert [h.bytes for h in away][-1] == 4 * cost.parameters(shape).total // 4  # the merged model


def test_layers_that_share_an_indexer_are_gathered_together() -> None:
    _, shape = built("glm")
    one = replace(shape, index_layers=shape.layers)
    tables = 2 * shape.vocabulary * shape.hidden
    layer = max(kind.held(Ranks(2)) for kind in layer_parameters(shape))
    exact = shape.hidden * shape.index_heads + 2 * shape.index_dim  # of an indexer
    for made, layers in ((shape, 2 * 2), (one, 2)):
        routers = made.moe_layers * made.hidden * made.experts
        gathered = held(made, "warmup", Ranks(2))["gathered layers, embedding and head"]
        assert gathered == 2 * (layers * layer + tables) + 4 * (routers + made.index_layers * exact)


def test_copies_on_one_gpu() -> None:
    """All that learns, whether layers are recomputed or not; in a warm-up the largest layer's."""
    _, shape = built("qwen3_dsa")
    deep = replace(shape, layers=40, index_layers=40)
    name, counts = "weights in bfloat16, for products", cost.parameters(deep)
    (layer,) = layer_parameters(deep)
    for checkpointing in (False, True):
        assert held(deep, "adapt", Ranks(1), checkpointing=checkpointing)[name] == 2 * (counts.total - counts.head)
    assert held(deep, "warmup", Ranks(1))[name] == 2 * layer.held(Ranks(1))


def test_divided_experts() -> None:
    _, shape = built("v32")
    kinds = layer_parameters(shape)
    assert {kind.held(Ranks(4, experts=4)) for kind in kinds} == {kind.other + kind.experts // 4 for kind in kinds}


def test_gathered_keys_by_hand() -> None:
    """Entries of 576 and index keys of 128 numbers, received and put in order in bfloat16; their gradients in float32
    and, as they are sent, in bfloat16. A warm-up expands all entries to 256 and 192 numbers a head; of half of the
    tokens, beyond as many as a rank has, it copies keys of 192 and values of 128, these widened to 192.
    """
    shape = cost.paper.published_shape()
    T, ranks = 131072, Ranks(16, context=16)
    name = "gathered keys and values, index keys"
    adapt = held(shape, "adapt", ranks, context=T)
    assert adapt[name] == T * 704 * (2 + 2 + 6)
    warmup = held(shape, "warmup", ranks, context=T)
    assert warmup[name] == T * 704 * (2 + 2) + 2 * 128 * (T * 448 + (T // 2 - T // 16) * 512)
    two = held(shape, "warmup", Ranks(2, context=2), context=T)
    assert two[name] == T * 704 * (2 + 2) + 2 * 128 * T * 448
    kept = held(shape, "adapt", ranks, context=T, checkpointing=False)
    assert kept[name] == T * 704 * (2 + 61 * 2 + 6)
    assert name not in held(shape, "adapt", Ranks(16), context=T)


def test_activations_are_those_of_a_rank_of_the_context() -> None:
    shape = cost.paper.published_shape()
    for stage in ("adapt", "pretrain"):
        whole, part = (held(shape, stage, Ranks(8, c), context=1 << 17)["activations"] for c in (1, 8))
        assert whole == 8 * part


def test_activations_of_a_warm_up_by_hand() -> None:
    """Of the 671B model a token's eight copies in four places, or, if ranks share a sequence, attention in float32."""
    shape, N = cost.paper.published_shape(), 1 << 17
    alone = held(shape, "warmup", Ranks(8), context=N)["activations"]
    assert alone == 2 * N * 7168 * (7 + 4 * 8)
    index = 2 * (64 + 1) * 128 + 64
    latents = 2 * 1536 + 576
    # Queries twice, and their rotated part; four tensors of a level, each 192 wide; four of the output in float32.
    heads = 128 * (2 * 192 + 64 + 4 * 192 + 4 * 2 * 128)
    shared = held(shape, "warmup", Ranks(8, context=8), context=8 * N)["activations"]
    assert shared == 2 * N * (5 * 7168 + latents + heads + index)
    grouped_shape = cost.shape_of(GROUPED)
    found = held(grouped_shape, "warmup", Ranks(8), context=N)["activations"]
    assert found == 2 * N * (7 * 4096 + 3 * 12288)
    narrow = replace(grouped_shape, dense_ffn=1024)
    found = held(narrow, "warmup", Ranks(8), context=N)["activations"]
    assert found == 2 * N * (5 * 4096 + 32 * 4 * 128 + 2 * 8 * 128 + 2 * 17 * 128 + 16)


def test_buffers_are_the_kernels() -> None:
    from tokensieve.ops.triton import loss, topk

    assert (STRIP, SCORES) == (loss.STRIP, topk.SCORES)
    shape = cost.paper.published_shape()
    name = "buffers of scores and of the KL's target"
    assert held(shape, "warmup", Ranks(8), context=1 << 17)[name] == 2 * 4 * STRIP
    assert held(shape, "adapt", Ranks(8), context=1 << 17)[name] == 4 * SCORES
    assert held(shape, "warmup", Ranks(8), context=1 << 10)[name] == 2 * 4 * (1 << 20)
    assert held(shape, "pretrain", Ranks(8), context=1 << 10)[name] == 0


# docs/results/training.md: context, layers, and peaks in GiB of dense steps, warm-up and adaptation on one H200, with
# weights, gradients and moments in bfloat16.
PEAKS = [
    (8192, 20, 91.3, 24.3, 92.8),
    (32768, 20, 96.0, 26.9, 97.8),
    (131072, 8, 65.4, 24.2, 70.7),
    (8192, 4, 22.1, 6.3, 22.5),
    (32768, 4, 26.1, 8.9, 27.5),
]


@pytest.mark.parametrize(("context", "layers", "dense", "warmup", "adapt"), PEAKS)
def test_measured_peaks(context: int, layers: int, dense: float, warmup: float, adapt: float) -> None:
    """Never less than what was measured, and up to a quarter more: not all that is counted is there at once.

    What lasts was in bfloat16, so half of it counts, and there were no copies for products.
    """
    shape = cost.shape_of(LITE | {"num_hidden_layers": layers})
    for stage, peak in (("pretrain", dense), ("warmup", warmup), ("adapt", adapt)):
        parts = held(shape, stage, Ranks(1), context=context)
        del parts["weights in bfloat16, for products"]
        lasting = ("weights, float32", "gradients, float32", "moments of Adam, float32")
        counted = sum(parts.values()) - sum(parts[name] for name in lasting) / 2
        assert peak < counted / 2**30 < 1.25 * peak
