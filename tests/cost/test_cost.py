"""tokensieve.cost against counts derived by hand, against real modules, and against the laws of growth."""

import dataclasses

import pytest

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig, UserError

# The published config.json of the 671B model, where cost depends on it.
V32 = {
    "model_type": "deepseek_v32",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
V3 = {k: v for k, v in V32.items() if not k.startswith("index_")} | {"model_type": "deepseek_v3"}
DENSE, SPARSE = cost.shape_of(V3), cost.shape_of(V32)
SMALL = V32 | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 16,
}
RUN = {"tokens_per_step": 8192, "steps": 10, "context": 2048, "flops_per_second": 1e10}


def test_parameters_of_the_671b_model_by_hand() -> None:
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 1536 + 512 + 2 * 7168
    expert = 3 * 7168 * 2048
    router = 256 * 7168 + 256
    tables = 2 * 129280 * 7168
    total = tables + 7168 + 61 * (attention + norms) + 3 * (3 * 7168 * 18432) + 58 * (257 * expert + router)
    assert total == 671_026_419_200  # "671B"
    counts = cost.parameters(DENSE)
    assert counts.total == total
    assert counts.active == total - 58 * 248 * expert  # "37B"
    assert 37.5e9 < counts.active < 37.6e9
    assert counts.indexer == 0


def test_indexer_by_hand() -> None:
    one = 1536 * 64 * 128 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert cost.parameters(SPARSE).indexer == 61 * one == 851_524_864
    assert cost.parameters(SPARSE).total - cost.parameters(DENSE).total == 61 * one
    without_latent = cost.shape_of(V32 | {"q_lora_rank": None})
    assert cost.parameters(without_latent).indexer == 61 * (one + (7168 - 1536) * 64 * 128)


@pytest.mark.parametrize(
    ("change", "class_name"),
    [
        ({}, "DeepseekV3"),
        ({"q_lora_rank": None}, "DeepseekV3"),
        ({"tie_word_embeddings": True}, "DeepseekV3"),
        ({"first_k_dense_replace": 4}, "DeepseekV3"),
        ({}, "DeepseekV32"),
        ({"model_type": "deepseek_v2"}, "DeepseekV2"),
    ],
)
def test_parameters_equal_transformers(change: dict, class_name: str) -> None:
    import torch
    import transformers

    fields = {k: v for k, v in (SMALL | change).items() if k != "model_type"}
    config = getattr(transformers, f"{class_name}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{class_name}ForCausalLM")(config)
    numbers = model.num_parameters() + sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    shape = cost.shape_of(config)
    if class_name != "DeepseekV32":
        assert not shape.sparse
    assert cost.parameters(shape).total == numbers


def test_flops_equal_torch_counter() -> None:
    """A dense-FFN model under torch's own FLOP counter, which counts full (not causal) attention."""
    import torch
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    tokens = 48
    fields = {k: v for k, v in SMALL.items() if not k.startswith("index_")}
    fields |= {"model_type": "deepseek_v3", "first_k_dense_replace": 4}
    config = transformers.DeepseekV3Config(**fields, attn_implementation="eager")
    model = transformers.DeepseekV3ForCausalLM(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    shape = cost.shape_of(config)
    half = tokens * tokens - cost.visible_keys(tokens)  # what lies above the diagonal
    ours = cost.forward_flops(shape, tokens) + 4 * half * cost.attention_flops_per_key(shape, "mha")
    assert counter.get_total_flops() == ours


def test_visible_keys() -> None:
    for tokens, start, top_k in [
        (1, 0, 0),
        (7, 0, 0),
        (7, 5, 0),
        (7, 0, 3),
        (7, 2, 3),
        (7, 9, 3),
        (3, 0, 9),
        (0, 4, 2),
    ]:
        queries = range(start, start + tokens)
        assert cost.visible_keys(tokens, start, top_k) == sum(min(top_k or t + 1, t + 1) for t in queries)


def test_decode_grows_with_context_only_by_the_indexer() -> None:
    def added(shape: cost.Shape) -> float:
        return cost.forward_flops(shape, 1, 131071) - cost.forward_flops(shape, 1, 65535)

    assert added(DENSE) == 61 * 65536 * 2 * 128 * (576 + 512)
    assert added(SPARSE) == 61 * 65536 * 2 * 64 * 129
    assert added(DENSE) / added(SPARSE) > 16


def test_prefill_is_quadratic_dense_and_nearly_linear_sparse() -> None:
    def attention(shape: cost.Shape, tokens: int, **how: object) -> float:
        return cost.forward_flops(shape, tokens, logits=0, **how) - 2 * cost.parameters(shape).matmul * tokens

    assert attention(DENSE, 131072) / attention(DENSE, 65536) == pytest.approx(4, rel=1e-3)
    free = dataclasses.replace(SPARSE, index_heads=0)  # the selected attention alone, without its indexer's scores
    assert attention(free, 131072, mode="mqa") / attention(free, 65536, mode="mqa") == pytest.approx(2, rel=2e-2)
    assert attention(DENSE, 131072) > 3 * attention(SPARSE, 131072)
    assert cost.forward_flops(SPARSE, 4096, sparse=False) == cost.forward_flops(DENSE, 4096)


def test_chunks_add_up() -> None:
    whole = cost.forward_flops(SPARSE, 5000, mode="mqa")
    assert cost.forward_flops(SPARSE, 3000, mode="mqa") + cost.forward_flops(SPARSE, 2000, 3000, mode="mqa") == whole


def test_cache_bytes_are_the_published_layouts() -> None:
    assert cost.latent_bytes(SPARSE, "fp8") == 656
    assert 64 * cost.index_bytes(SPARSE, "fp8") == 8448
    assert cost.latent_bytes(SPARSE, "bf16") == 1152
    assert cost.index_bytes(DENSE, "fp8") == 0
    assert cost.cache_bytes_per_token(SPARSE, "fp8") == 61 * (656 + 132)
    assert cost.cache_bytes_per_token(DENSE, "float32") == 61 * 4 * 576


def test_what_a_decoded_token_reads() -> None:
    assert cost.kv_read_fraction(131072, 2048) == 1 / 64
    assert cost.kv_read_fraction(100, 2048) == 1.0
    with pytest.raises(UserError, match="at least 1"):
        cost.kv_read_fraction(100, 0)
    short = cost.decode_cache_bytes(SPARSE, 2048, "fp8")
    assert short == cost.decode_cache_bytes(DENSE, 2048, "fp8") == 61 * 2048 * 656
    long = cost.decode_cache_bytes(SPARSE, 131072, "fp8")
    assert long == 61 * (2048 * 656 + 131072 * 132)
    assert cost.decode_cache_bytes(SPARSE, 131072, "fp8", sparse=False) == 61 * 131072 * 656


def test_weights_read_by_a_decode_step() -> None:
    """The head and the routers stay in bf16, and the indexer's weights_proj in float32, beside matrices in FP8."""
    counts = cost.parameters(DENSE)
    everything = counts.matmul + counts.head + 58 * 248 * 3 * 7168 * 2048
    assert cost.decode_weight_bytes(DENSE, 100_000, "bf16") == pytest.approx(2 * everything)
    assert cost.decode_weight_bytes(DENSE, 1, "float32") == pytest.approx(4 * (counts.matmul + counts.head))
    plain = 129280 * 7168 + 58 * 256 * 7168
    block = 1 + 4 / 128**2
    fp8 = block * (counts.matmul + counts.head - plain) + 2 * plain
    assert cost.decode_weight_bytes(DENSE, 1, "fp8") == pytest.approx(fp8)
    index = 61 * (block * (1536 * 64 * 128 + 7168 * 128) + 4 * 7168 * 64)
    assert cost.decode_weight_bytes(SPARSE, 1, "fp8") == pytest.approx(fp8 + index)
    assert cost.decode_weight_bytes(cost.shape_of(V3 | {"n_routed_experts": None}), 7, "fp8") > 0


def test_pretrain_is_six_n_when_the_context_is_short() -> None:
    counts = cost.parameters(DENSE)
    per_token = cost.train_flops(DENSE, "pretrain", 128) / 128
    assert per_token == pytest.approx(6 * (counts.matmul + counts.head), rel=0.02)


def test_warmup_by_hand() -> None:
    """The loss scores every (query, key, head) once, and has one product more for each of its two gradients."""
    context = 4096
    every = cost.visible_keys(context)
    trunk = cost.forward_flops(DENSE, context, logits=0)
    target = 61 * every * 2 * 128 * 192
    projections = 2 * 2 * cost.parameters(SPARSE).indexer_matmul * context
    scores = 61 * every * 2 * 64 * (129 + 128 + 128)
    assert cost.train_flops(SPARSE, "warmup", context) == trunk + target + projections + scores
    fewer = cost.train_flops(SPARSE, "warmup", context, kl_every=4)
    assert fewer == pytest.approx(trunk + (target + scores) / 4 + projections, rel=1e-12)


@pytest.mark.parametrize("context", [1024, 131072])
def test_adapt_by_hand(context: int) -> None:
    """The selected entries are gathered in MQA form even where k is everything and MHA would be cheaper."""
    counts = cost.parameters(SPARSE)
    every, chosen = cost.visible_keys(context), cost.visible_keys(context, top_k=2048)
    linear = 2 * (3 * (counts.matmul + counts.head) + 2 * counts.indexer_matmul) * context
    attention = 3.5 * 61 * chosen * 2 * 128 * (576 + 512)
    scores = 61 * 2 * 64 * (every * 129 + chosen * (2 * 129 + 2 * 128))
    assert cost.train_flops(SPARSE, "adapt", context) == pytest.approx(linear + attention + scores, rel=1e-12)


def test_train_estimate_scales() -> None:
    one = cost.train_estimate(SMALL, "adapt", **RUN)
    twice = cost.train_estimate(SMALL, "adapt", **RUN | {"steps": 20})
    assert one.tokens == 81920
    assert twice.seconds == pytest.approx(2 * one.seconds)
    assert twice.memory_bytes == one.memory_bytes
    assert one.seconds == one.flops / 1e10
    accumulated = cost.train_estimate(SMALL, "adapt", **RUN, micro_batch_tokens=2048)
    assert accumulated.activation_bytes * 4 == one.activation_bytes
    assert accumulated.flops == one.flops


def test_run_estimate_adds_time_and_takes_the_peak_of_memory() -> None:
    short, long = PhaseConfig(steps=30, context=512, sequences=4), PhaseConfig(steps=10, context=2048, sequences=1)
    run = TrainConfig(stage="adapt", model="base", out="runs/x", phases=(short, long))
    both = cost.run_estimate(SMALL, run, 1e10)
    parts = [cost.run_estimate(SMALL, dataclasses.replace(run, phases=(phase,)), 1e10) for phase in (short, long)]
    assert both.tokens == 30 * 4 * 512 + 10 * 2048
    assert both.seconds == pytest.approx(sum(part.seconds for part in parts))
    assert both.memory_bytes == parts[1].memory_bytes > parts[0].memory_bytes
    dense = cost.run_estimate(SMALL, dataclasses.replace(run, selection=False), 1e10)
    assert dense.gradient_bytes == both.gradient_bytes - 4 * cost.parameters(cost.shape_of(SMALL)).indexer
    with pytest.raises(UserError, match="phases"):
        cost.run_estimate(SMALL, dataclasses.replace(run, phases=()), 1e10)


def test_warmup_is_light() -> None:
    warmup, adapt = (cost.train_estimate(SMALL, stage, **RUN) for stage in ("warmup", "adapt"))
    assert warmup.gradient_bytes == 4 * cost.parameters(cost.shape_of(SMALL)).indexer
    assert warmup.optimizer_bytes == 2 * warmup.gradient_bytes
    assert warmup.activation_bytes < adapt.activation_bytes
    deeper = cost.train_estimate(SMALL | {"num_hidden_layers": 8}, "warmup", **RUN)
    assert deeper.activation_bytes == warmup.activation_bytes


def test_checkpointing_trades_memory_for_time() -> None:
    plain, saved = (cost.train_estimate(SMALL, "pretrain", **RUN, checkpointing=c) for c in (False, True))
    assert saved.activation_bytes < plain.activation_bytes
    assert plain.flops < saved.flops < 1.4 * plain.flops
    # What adaptation computes again is what it computed: attention over the selected keys in MQA form.
    plain, saved = (cost.train_estimate(SMALL, "adapt", **RUN, checkpointing=c) for c in (False, True))
    shape = cost.shape_of(SMALL)
    again = cost.forward_flops(shape, RUN["context"], mode="mqa", logits=0) * plain.tokens / RUN["context"]
    assert saved.flops - plain.flops == pytest.approx(again)


def test_logits_of_a_large_vocabulary_are_held_a_piece_at_a_time() -> None:
    large = SMALL | {"vocab_size": 102400}
    short, long = (cost.train_estimate(large, "pretrain", **RUN | {"tokens_per_step": n}) for n in (1 << 16, 1 << 17))
    few, many = (cost.train_estimate(SMALL, "pretrain", **RUN | {"tokens_per_step": n}) for n in (1 << 16, 1 << 17))
    others = 8 * cost.parameters(cost.shape_of(SMALL)).head // SMALL["hidden_size"]  # bytes of a token's logits
    assert cost.head_rows(102400) == 5242 and cost.head_rows(4096) == 131072
    grown = long.activation_bytes - short.activation_bytes
    assert grown == many.activation_bytes - few.activation_bytes - others * (1 << 16)


def test_autocast_keeps_a_copy_of_the_weights() -> None:
    plain, half = (cost.train_estimate(SMALL, "pretrain", **RUN, value_bytes=b) for b in (4, 2))
    assert half.weight_bytes == 1.5 * plain.weight_bytes
    assert half.activation_bytes < plain.activation_bytes


def test_estimate_reads_well() -> None:
    estimate = cost.Estimate(81920, 1e12, 205.0, 2**30, 2**30, 2**30, 2**29)
    assert str(estimate) == "about 3.5 GiB and 1 min 34 s to 4 min 43 s for 81,920 tokens"
    assert [cost.duration(s) for s in (0.2, 59.4, 60, 3600, 90000)] == [
        "1 s",
        "59 s",
        "1 min 0 s",
        "1 h 0 min",
        "1 d 1 h",
    ]


def test_bad_input() -> None:
    with pytest.raises(UserError, match="kv_lora_rank"):
        cost.shape_of({"model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2})
    with pytest.raises(UserError, match="sparsify"):
        cost.train_estimate(V3, "warmup", **RUN)
    with pytest.raises(UserError, match="steps"):
        cost.train_estimate(SMALL, "adapt", **RUN | {"steps": 0})
