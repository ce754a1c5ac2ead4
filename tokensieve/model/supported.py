"""What a config may ask for: anything else would load and compute something that its model is not."""

from tokensieve.config import ModelConfig, UserError

SIZES = (
    "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads kv_lora_rank "
    "q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts num_experts_per_tok "
    "max_position_embeddings index_topk index_n_heads index_head_dim"
).split()


def check_supported(config: ModelConfig) -> None:
    """UserError naming the field of config.json that this model does not implement, or that contradicts another."""
    for field in SIZES:
        value = getattr(config, field, None)
        if value is not None and value < 1:
            raise UserError(f"config.json: {field} is {value}; it must be at least 1")
    if config.qk_rope_head_dim % 2:
        raise UserError(
            f"config.json: qk_rope_head_dim is {config.qk_rope_head_dim}; it must be even, for pairs are rotated"
        )
    if config.hidden_act != "silu":
        raise UserError(f"config.json: hidden_act {config.hidden_act!r} is not supported; DeepSeek's models use 'silu'")
    kind = config.rope_parameters.get("rope_type", config.rope_parameters.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"config.json: rope type {kind!r} is not supported; tokensieve implements 'default' and 'yarn'")
    experts, groups, best = config.n_routed_experts, config.n_group or 1, config.topk_group or 1
    if experts % groups or best > groups:
        raise UserError(
            f"config.json: {experts} experts cannot form {groups} groups of which {best} are chosen; correct n_group"
        )
    reachable = experts if getattr(config, "topk_method", None) == "greedy" else experts // groups * best
    chosen = config.num_experts_per_tok
    if chosen is None or chosen > reachable:
        raise UserError(f"config.json: num_experts_per_tok is {chosen} of {reachable} experts that a token can reach")
