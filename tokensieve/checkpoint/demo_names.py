"""The tensors of each rank of the official inference demo as data: names, slices, experts, possible numbers of ranks.

Legend: R ranks, E experts. Source: inference/convert.py (names and slices) and inference/model.py (their reader) of
DeepSeek-V3.2-Exp.
"""

import math
import re
from pathlib import Path
from typing import Any

from tokensieve.checkpoint.names import expected_tensors
from tokensieve.checkpoint.reading import FP8, Shards
from tokensieve.config import UserError
from tokensieve.families import family_of

DEMO_MODULES: dict[str, tuple[str, int | None]] = {
    # module in a checkpoint: its name in the demo, and the axis that the ranks divide (None: each rank holds it whole)
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    # The indexer is whole on every rank: they must all select the same keys.
    "wq_b": ("wq_b", None),
    "wk": ("wk", None),
    "k_norm": ("k_norm", None),
    "weights_proj": ("weights_proj", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
DEMO_WORDS = {"self_attn": "attn", "mlp": "ffn", "weight_scale_inv": "scale", "e_score_correction_bias": "bias"}
DEMO_BLOCK = (128, 128)  # the only FP8 block that the demo's kernels read

EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def demo_name(name: str) -> str:
    """Return the demo's name for a tensor of a checkpoint, such as ``layers.0.attn.wq_b.scale``."""
    words = name.removeprefix("model.").split(".")
    words[-2] = DEMO_MODULES[words[-2]][0]
    return ".".join(DEMO_WORDS.get(word, word) for word in words)


def shard_axis(name: str) -> int | None:
    """Return the axis of an on-disk tensor that the ranks divide; None if each rank holds it whole or not at all."""
    return None if EXPERT.search(name) else DEMO_MODULES[name.split(".")[-2]][1]


def rank_tensors(config: Any, rank: int, ranks: int) -> dict[str, tuple[int, ...]]:
    """Return the part of :func:`expected_tensors` that a rank holds: on-disk name -> shape of its slice, in order."""
    shapes = expected_tensors(config)
    for name, shape in list(shapes.items()):
        axis, expert = shard_axis(name), EXPERT.search(name)
        if expert and int(expert[1]) // (config.n_routed_experts // ranks) != rank:
            del shapes[name]
        elif axis is not None:
            shapes[name] = (*shape[:axis], shape[axis] // ranks, *shape[axis + 1 :])
    return shapes


def rank_file(rank: int, ranks: int) -> str:
    return f"model{rank}-mp{ranks}.safetensors"


def check_divisible(folder: Path, config: Any) -> None:
    """Raise UserError for a family whose models ranks cannot divide."""
    if not family_of(config).divisible:
        raise UserError(
            f"{folder}: a model of type {config.model_type} cannot be divided between ranks yet; use one process"
        )


def check_division(folder: Path, config: Any, shards: Shards, ranks: int, whole_blocks: bool = True) -> None:
    """Raise UserError, naming the remedy, unless ``ranks`` divides every size that the demo divides.

    whole_blocks: FP8 blocks too must stay whole.
    """
    check_divisible(folder, config)
    if config.attention_bias:
        raise UserError(
            f"{folder}: attention_bias is true, and a projection that ranks divide can have no bias; use other weights"
        )
    shapes = expected_tensors(config)
    counts = {"num_attention_heads": config.num_attention_heads, "vocab_size": config.vocab_size}
    shared = config.moe_intermediate_size * (config.n_shared_experts or 0)
    for field, size, part in (
        ("intermediate_size", config.intermediate_size, ".mlp.gate_proj."),
        ("n_routed_experts", config.n_routed_experts, ".mlp.experts."),
        ("moe_intermediate_size * n_shared_experts", shared, ".mlp.shared_experts."),
    ):
        if any(part in name for name in shapes):
            counts[field] = size
    fp8 = {
        name: (shapes[name][axis], shards.block[axis])
        for name in shapes
        if (axis := shard_axis(name)) is not None and shards.dtype.get(name) == FP8
    }

    def cut(count: int) -> str | None:
        """The first matrix that would be cut through an FP8 block, one rank having a part and another the scale."""
        return next((name for name, (size, block) in fp8.items() if count > 1 and size % (count * block)), None)

    indivisible = [f"{field} {count}" for field, count in counts.items() if ranks < 1 or count % ranks]
    if whole_blocks and not indivisible and (split := cut(ranks)):
        indivisible = [f"{split} into whole FP8 blocks ({fp8[split][0]} by {fp8[split][1]})"]
    if indivisible:
        limit = math.gcd(*counts.values())
        possible = [count for count in range(1, limit + 1) if limit % count == 0 and not cut(count)]
        raise UserError(
            f"{folder}: {ranks} ranks do not divide {', '.join(indivisible)}; possible numbers of them: "
            f"{', '.join(map(str, possible))}"
        )
