"""Small random models of every family, transformers' own beside ours, and what the model tests do with them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, PreTrainedModel

import tokensieve
from tokensieve.families import SparseConfig
from tokensieve.families.glm import SparseGlmConfig
from tokensieve.model import DecoderForCausalLM, SelectionContext
from tokensieve.model.moe import Router
from tokensieve.model.selection import indexer

CLASSES = {"v2": DeepseekV2Config, "v3": DeepseekV3Config, "v32": SparseConfig, "glm": SparseGlmConfig}
SPARSE = ("v32", "glm")
VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "max_position_embeddings": 1024,
}
# As many index heads as it takes for no score to be exactly zero, so that transformers meets no tie at the k-th place.
INDEXER = {"index_n_heads": 32, "index_head_dim": 16, "index_topk": 24}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
ROPES: list[dict[str, Any] | None] = [
    None,
    YARN,
    YARN | {"mscale_all_dim": 0.7},
    YARN | {"mscale": 0.707, "mscale_all_dim": 0.0, "factor": 40.0},
    {k: v for k, v in YARN.items() if not k.startswith("mscale")} | {"beta_fast": 16, "beta_slow": 2},
    {"rope_type": "default", "rope_theta": 500.0},
]


def config(family: str, **changes: Any) -> Any:
    own = INDEXER if family in SPARSE else {"topk_method": "group_limited_greedy"} if family == "v2" else {}
    return CLASSES[family](**(SHAPE | own | changes))


def random_config(family: str, seed: int) -> Any:
    """A drawn shape; the six kinds of RoPE come in turn."""
    draw = random.Random(f"{family} {seed}")
    heads, rope = draw.choice([1, 2, 3, 4, 6]), draw.choice([4, 8, 16])
    groups, size = draw.choice([(1, 6), (2, 3), (2, 4), (4, 2), (4, 3)])
    open_groups = draw.randint(1, groups)
    changes: dict[str, Any] = {
        "hidden_size": heads * draw.choice([12, 16, 20]),
        "num_hidden_layers": draw.choice([2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": groups * size,
        "n_shared_experts": draw.choice([1, 2]),
        "num_experts_per_tok": draw.randint(1, open_groups * size),
        "n_group": groups,
        "topk_group": open_groups,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "first_k_dense_replace": draw.choice([0, 0, 1, 1, 3]),
        "kv_lora_rank": draw.choice([16, 24, 40]),
        "q_lora_rank": draw.choice([20, 32]) if family in SPARSE else draw.choice([None, 20, 32]),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": draw.choice([8, 12, 24]),
        "v_head_dim": draw.choice([8, 20, 32]),
        "attention_bias": draw.random() < 0.4,
        "tie_word_embeddings": draw.random() < 0.3,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_parameters": ROPES[seed % len(ROPES)],
    }
    if family == "v2":
        changes |= {"topk_method": draw.choice(["greedy", "group_limited_greedy"])}
    else:
        changes |= {"norm_topk_prob": draw.random() < 0.7}
    if family == "v3":
        changes |= {"rope_interleave": draw.random() < 0.6}
    if family in SPARSE:
        changes |= {"index_n_heads": draw.choice([32, 48]), "index_head_dim": draw.choice([rope, 24, 32])}
        changes |= {"index_topk": draw.choice([8, 16, 31])}
    if family == "glm":
        kinds = [{"F": "full", "S": "shared"}[kind] for kind in draw.choice(["FFF", "FSS", "FFSS", "FSFS"])]
        changes |= {"indexer_types": kinds, "num_hidden_layers": len(kinds)}
    return config(family, **changes)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights that keep activations near 1 and logits within about 4; norms and biases whose absence a test notices."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.normal_(0.0, 0.1, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.4, 1.6, generator=generator)
        else:
            tensor.normal_(0.0, tensor.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def theirs(config: Any, seed: int = 0) -> PreTrainedModel:
    """transformers' own model of this config."""
    own = AutoConfig.for_model(**config.to_dict())
    return randomize(AutoModelForCausalLM.from_config(own, dtype=torch.float32), seed)


def ours(config: Any, seed: int = 0) -> DecoderForCausalLM:
    return randomize(DecoderForCausalLM(config), seed)


def pair(config: Any, folder: Path, seed: int = 0) -> tuple[PreTrainedModel, DecoderForCausalLM]:
    """transformers' model, and ours loaded from the folder that transformers wrote."""
    oracle = theirs(config, seed)
    oracle.save_pretrained(folder)
    return oracle, tokensieve.load(folder)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Without 0, which is the padding: `generate` would make a mask with holes out of it."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


class TakesOptions(torch.nn.Module):
    """What a stand-in for a model has among its modules: something that `with_options` can be opened around."""

    takes_forward_options = True


def index_of(c: SelectionContext) -> tuple[Tensor, Tensor, Tensor]:
    """q_I, k_I and w of equation (1), on contiguous keys."""
    q, w = c.index_queries
    return q, c.keys.index[0], w


def attention_of(c: SelectionContext) -> tuple[Tensor, Tensor, float]:
    """q, k and the softmax scale of the main attention, on contiguous keys."""
    q, scale = c.attention_queries
    return q, c.keys.keys_TGD, scale


@contextmanager
def margins(model: DecoderForCausalLM) -> Iterator[list[float]]:
    """By how much each choice of experts, groups and keys was made: the last chosen against the first left out.

    Two programs that round differently can be asked for equal logits only where no choice hangs on the rounding.
    """
    found: list[float] = []

    def gap(scores: Tensor, k: int) -> None:
        if k < scores.shape[-1]:
            best = scores.topk(k + 1, dim=-1).values
            found.append(float((best[..., k - 1] - best[..., k]).nan_to_num(torch.inf).min()))

    def router(module: Router, args: tuple[Tensor, ...], _: Any) -> None:
        scores = args[0] @ module.weight.T
        choice = scores.softmax(-1) if module.softmax else scores.sigmoid() + module.e_score_correction_bias
        if module.limited and module.best_groups < module.groups:
            groups = choice.unflatten(-1, (module.groups, -1))
            gap(groups.amax(-1) if module.softmax else groups.topk(2, dim=-1).values.sum(-1), module.best_groups)
            choice = module._within_best_groups(choice)
        gap(choice, module.top_k)

    def select(c: SelectionContext) -> Tensor:
        scores = c.scores()
        key = torch.arange(scores.shape[1])
        outside = (key < c.starts_N[:, None]) | (key >= c.ends_N[:, None])
        gap(scores.masked_fill(outside, -torch.inf), c.k)
        return indexer(c)

    hooks = [m.register_forward_hook(router) for m in model.modules() if isinstance(m, Router)]
    try:
        with tokensieve.selecting(model, select if model.is_sparse else indexer):
            yield found
    finally:
        for hook in hooks:
            hook.remove()
