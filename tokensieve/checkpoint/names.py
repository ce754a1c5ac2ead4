"""The tensors of a checkpoint as data: names and shapes.

On disk a checkpoint has the names of the published one (``model.layers.3.mlp.experts.17.gate_proj.weight``). In memory
the experts of a layer are fused into ``mlp.experts.gate_up_proj`` (E, 2I, hidden), each expert's gate rows above its up
rows, and ``mlp.experts.down_proj`` (E, hidden, I); every other name is the same. Legend: E experts, I expert width.
"""

import re
from typing import Any

from tokensieve.families import family_of

RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")  # the official inference demo's: rank, number of ranks
FLOAT32_SUFFIXES = (".mlp.gate.e_score_correction_bias", ".indexer.weights_proj.weight")

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Return every tensor that a checkpoint of ``config`` holds on disk, name -> shape, in the order of the model.

    config: a config of a family in `tokensieve.families`. A tied ``lm_head`` and the multi-token-prediction layers are
    not listed. Shapes are (out, in), as nn.Linear stores them. Source: the index of the published DeepSeek-V3.2-Exp
    checkpoint.
    """
    hidden, vocab, family = config.hidden_size, config.vocab_size, family_of(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        attention = family.attention_tensors(config) | family.indexer_tensors(config, layer)
        parts |= {f"self_attn.{name}": shape for name, shape in attention.items()} | _feed_forward(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _feed_forward(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, family = config.hidden_size, family_of(config)

    def mlp(prefix: str, width: int, bias: bool = False) -> dict[str, tuple[int, ...]]:
        rows = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": shape for name, shape in rows.items()}
        return shapes | ({f"{prefix}.{name}.bias": shape[:1] for name, shape in rows.items()} if bias else {})

    if family.dense_layer(config, layer):
        return mlp("mlp", config.intermediate_size, family.mlp_bias(config))
    experts = family.experts(vars(config))
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts.routed, hidden)}
    if not family.softmax_router(config):
        shapes["mlp.gate.e_score_correction_bias"] = (experts.routed,)
    for expert in range(experts.routed):
        shapes |= mlp(f"mlp.experts.{expert}", experts.width)
    if experts.shared:
        shapes |= mlp("mlp.shared_experts", experts.width * experts.shared)
    return shapes


def memory_layout(config: Any) -> dict[str, list[str]]:
    """Return, for each in-memory name, the names on disk whose rows it stacks, in this order."""
    layout: dict[str, list[str]] = {}
    for name in expected_tensors(config):
        if expert := _EXPERT.fullmatch(name):
            fused = "down_proj" if expert[2] == "down" else "gate_up_proj"
            layout.setdefault(f"{expert[1]}.{fused}", []).append(name)
        else:
            layout[name] = [name]
    return layout
