"""The tensors of a checkpoint as data: names and shapes.

On disk a checkpoint has the names of the published one (``model.layers.3.mlp.experts.17.gate_proj.weight``). In memory
the experts of a layer are fused into ``mlp.experts.gate_up_proj`` (E, 2I, hidden), each expert's gate rows above its up
rows, and ``mlp.experts.down_proj`` (E, hidden, I); every other name is the same. Legend: E experts, I expert width.
"""

import re
from typing import Any

ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
}
RANK_FILE = re.compile(r"model(\d+)-mp(\d+)\.safetensors")  # one rank of the official inference demo, of how many
FLOAT32_SUFFIXES = (".mlp.gate.e_score_correction_bias", ".indexer.weights_proj.weight")

_EXPERT = re.compile(r"(.+\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Return every tensor that a checkpoint of ``config`` holds on disk, name -> shape, in the order of the model.

    config: a transformers config of model type deepseek_v2, deepseek_v3 or deepseek_v32. A tied ``lm_head`` and the
    multi-token-prediction layers are not listed. Shapes are (out, in), as nn.Linear stores them. Source: the index of
    the published DeepSeek-V3.2-Exp checkpoint.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config.num_hidden_layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        parts |= _attention(config) | _feed_forward(config, layer)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _attention(config: Any) -> dict[str, tuple[int, ...]]:
    hidden, heads, q_rank, kv_rank = (
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.kv_lora_rank,
    )
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if q_rank is None:
        shapes["q_proj.weight"] = (heads * (nope + rope), hidden)
    else:
        shapes["q_a_proj.weight"] = (q_rank, hidden)
        shapes["q_a_layernorm.weight"] = (q_rank,)
        shapes["q_b_proj.weight"] = (heads * (nope + rope), q_rank)
    shapes["kv_a_proj_with_mqa.weight"] = (kv_rank + rope, hidden)
    shapes["kv_a_layernorm.weight"] = (kv_rank,)
    shapes["kv_b_proj.weight"] = (heads * (nope + value), kv_rank)
    shapes["o_proj.weight"] = (hidden, heads * value)
    if config.attention_bias:
        for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            if f"{name}.weight" in shapes:
                shapes[f"{name}.bias"] = shapes[f"{name}.weight"][:1]
    if config.model_type == "deepseek_v32":
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        shapes["indexer.wq_b.weight"] = (index_heads * index_dim, hidden if q_rank is None else q_rank)
        shapes["indexer.wk.weight"] = (index_dim, hidden)
        shapes["indexer.k_norm.weight"] = shapes["indexer.k_norm.bias"] = (index_dim,)
        shapes["indexer.weights_proj.weight"] = (index_heads, hidden)
    return {f"self_attn.{name}": shape for name, shape in shapes.items()}


def _feed_forward(config: Any, layer: int) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    bias = config.model_type == "deepseek_v2" and bool(getattr(config, "mlp_bias", False))

    def mlp(prefix: str, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
        rows = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{name}.weight": shape for name, shape in rows.items()}
        return shapes | ({f"{prefix}.{name}.bias": shape[:1] for name, shape in rows.items()} if bias else {})

    kinds = getattr(config, "mlp_layer_types", None)
    if layer < config.first_k_dense_replace if kinds is None else kinds[layer] == "dense":
        return mlp("mlp", config.intermediate_size, bias)
    width, experts = config.moe_intermediate_size, config.n_routed_experts
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts, hidden)}
    if config.model_type != "deepseek_v2" and getattr(config, "scoring_func", "sigmoid") == "sigmoid":
        shapes["mlp.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= mlp(f"mlp.experts.{expert}", width, False)
    if config.n_shared_experts:
        shapes |= mlp("mlp.shared_experts", width * config.n_shared_experts, bias)
    return shapes


def memory_layout(config: Any) -> dict[str, list[str]]:
    """Return, for each in-memory name, the names on disk whose rows, stacked in this order, make it."""
    layout: dict[str, list[str]] = {}
    for name in expected_tensors(config):
        if expert := _EXPERT.fullmatch(name):
            fused = "down_proj" if expert[2] == "down" else "gate_up_proj"
            layout.setdefault(f"{expert[1]}.{fused}", []).append(name)
        else:
            layout[name] = [name]
    return layout
