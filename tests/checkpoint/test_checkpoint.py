"""Checkpoints that are well: names, round trips, FP8 blocks, the MTP layer, and what other programs read."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, DeepseekV32Config

from tests.support.checkpoints import (
    INDEXER,
    SMALL,
    YARN,
    assert_same,
    loaded,
    random_tensors,
    read_folder,
    save,
    sparse_config,
    write_folder,
)
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import SparseConfig
from tokensieve.ops import quant

# names and shapes


def test_the_671b_model() -> None:
    config = DeepseekV32Config()
    shapes = checkpoint.expected_tensors(config)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    hidden, heads = 7168, 128
    attention = (
        hidden * 1536 + 1536 + 1536 * heads * 192 + hidden * 576 + 512 + 512 * heads * 256 + heads * 128 * hidden
    )
    indexer = 1536 * 64 * 128 + hidden * 128 + 2 * 128 + hidden * 64
    dense, expert, router = 3 * hidden * 18432, 3 * hidden * 2048, 256 * hidden + 256
    layers = 61 * (attention + indexer + 2 * hidden) + 3 * dense + 58 * (257 * expert + router)
    total = 2 * 129280 * hidden + layers + hidden
    assert sum(count.values()) == total == 671_877_944_064
    # The "671B" of the report is the model without indexers: 61 layers of 13,959,424 parameters less.
    assert total - 61 * indexer == 671_026_419_200
    assert len(shapes) == 3 + 61 * (9 + 5) + 3 * 3 + 58 * (2 + 256 * 3 + 3)
    for name, shape in {
        "model.embed_tokens.weight": (129280, 7168),
        "model.layers.0.self_attn.q_a_proj.weight": (1536, 7168),
        "model.layers.0.self_attn.q_b_proj.weight": (24576, 1536),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "model.layers.60.self_attn.kv_b_proj.weight": (32768, 512),
        "model.layers.60.self_attn.o_proj.weight": (7168, 16384),
        "model.layers.60.self_attn.indexer.wq_b.weight": (8192, 1536),
        "model.layers.60.self_attn.indexer.wk.weight": (128, 7168),
        "model.layers.60.self_attn.indexer.k_norm.bias": (128,),
        "model.layers.60.self_attn.indexer.weights_proj.weight": (64, 7168),
        "model.layers.2.mlp.down_proj.weight": (7168, 18432),
        "model.layers.3.mlp.gate.weight": (256, 7168),
        "model.layers.3.mlp.gate.e_score_correction_bias": (256,),
        "model.layers.60.mlp.experts.255.up_proj.weight": (2048, 7168),
        "model.layers.60.mlp.shared_experts.gate_proj.weight": (2048, 7168),
        "lm_head.weight": (129280, 7168),
    }.items():
        assert shapes[name] == shape, name
    assert "model.layers.3.mlp.gate_proj.weight" not in shapes
    layout = checkpoint.memory_layout(config)
    assert len(layout["model.layers.3.mlp.experts.gate_up_proj"]) == 512
    assert len(layout["model.layers.3.mlp.experts.down_proj"]) == 256


def test_what_a_config_leaves_out() -> None:
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert bias in checkpoint.expected_tensors(SparseConfig(**SMALL, **INDEXER))
    assert bias not in checkpoint.expected_tensors(SparseConfig(**SMALL, **INDEXER, scoring_func="softmax"))
    shapes = checkpoint.expected_tensors(SparseConfig(**(SMALL | {"q_lora_rank": None}), **INDEXER))
    assert shapes["model.layers.0.self_attn.indexer.wq_b.weight"] == (64, 32)  # no latent: it reads the hidden state
    assert "model.layers.0.self_attn.q_proj.weight" in shapes and not any("q_a_" in name for name in shapes)


CONFIGS = [
    sparse_config(),
    sparse_config(attention_bias=True, rope_parameters=YARN),
    sparse_config(n_shared_experts=2, tie_word_embeddings=True, mlp_layer_types=["sparse", "dense", "sparse"]),
    DeepseekV3Config(**SMALL),
    DeepseekV3Config(**(SMALL | {"q_lora_rank": None, "attention_bias": True, "rope_parameters": YARN})),
    DeepseekV2Config(**(SMALL | {"attention_bias": True, "n_shared_experts": 2})),
    DeepseekV2Config(**(SMALL | {"q_lora_rank": None, "topk_method": "greedy"})),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_transformers_writes_what_we_read_and_reads_what_we_write(config: Any, tmp_path: Path) -> None:
    config = copy.deepcopy(config)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "theirs")
    assert checkpoint.read_config(tmp_path / "theirs")["model_type"] == config.model_type
    ours = loaded(tmp_path / "theirs", config, torch.float32)
    want = theirs.state_dict()
    if config.tie_word_embeddings:
        want.pop("lm_head.weight")
    assert_same(ours, want)  # transformers fuses experts just as we do

    config_dict = config.to_dict()
    checkpoint.save_tensors(tmp_path / "ours", config_dict, ours.items(), shard_bytes=20_000)
    if not config.tie_word_embeddings:  # what they write and what we write hold the same, name by name
        assert_same(read_folder(tmp_path / "ours"), read_folder(tmp_path / "theirs"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again) is type(theirs)
    assert_same(again.state_dict(), theirs.state_dict())
    for field in config_dict.keys() - {
        "dtype",
        "architectures",
        "num_nextn_predict_layers",
        "transformers_version",
        "_name_or_path",
    }:
        mine, original = getattr(again.config, field), getattr(config, field)
        if field == "rope_parameters":
            mine.pop("type", None)
        assert mine == original, field
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, again.eval()(ids).logits)


# round trips


@pytest.mark.parametrize("shard_bytes", [5e9, 4000])
def test_round_trip_is_bitwise(shard_bytes: float, tmp_path: Path) -> None:
    config = sparse_config()
    tensors = random_tensors(config)
    source = write_folder(tmp_path / "source", config, tensors)
    save(tmp_path / "copy", config, source, shard_bytes=shard_bytes)
    assert_same(read_folder(tmp_path / "copy"), tensors)
    files = sorted(tmp_path.joinpath("copy").glob("*.safetensors"))
    with safe_open(files[0], "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    if shard_bytes == 5e9:
        assert [path.name for path in files] == ["model.safetensors"]
    else:
        assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert_same(loaded(tmp_path / "copy", config), loaded(source, config))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_fused_experts_and_dtypes(tmp_path: Path) -> None:
    config = sparse_config()
    tensors = random_tensors(config)
    ours = loaded(write_folder(tmp_path / "m", config, tensors), config, torch.float16)
    fused, prefix = ours["model.layers.1.mlp.experts.gate_up_proj"], "model.layers.1.mlp.experts.3"
    assert fused.shape == (4, 48, 32) and ours["model.layers.1.mlp.experts.down_proj"].shape == (4, 32, 24)
    assert torch.equal(fused[3, :24], tensors[f"{prefix}.gate_proj.weight"].half())
    assert torch.equal(fused[3, 24:], tensors[f"{prefix}.up_proj.weight"].half())
    for name, tensor in ours.items():
        wide = name.endswith(("e_score_correction_bias", "weights_proj.weight"))
        assert tensor.dtype == (torch.float32 if wide else torch.float16), name
    assert torch.equal(
        ours["model.layers.1.mlp.gate.e_score_correction_bias"],
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"],
    )


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    config = sparse_config()
    folder = write_folder(tmp_path / "m", config, random_tensors(config))
    before = (folder / "model.safetensors").read_bytes()
    for tensor in loaded(folder, config).values():
        tensor.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert float(loaded(folder, config)["model.embed_tokens.weight"].abs().sum()) > 0


def test_tied_embeddings(tmp_path: Path) -> None:
    config = sparse_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    assert "lm_head.weight" not in tensors
    source = write_folder(tmp_path / "source", config, tensors)
    ours = loaded(source, config)
    with_head = [*ours.items(), ("lm_head.weight", ours["model.embed_tokens.weight"])]  # a state dict lists it
    checkpoint.save_tensors(tmp_path / "copy", config.to_dict(), with_head)
    assert_same(read_folder(tmp_path / "copy"), tensors)
    # A copy of the embedding on disk is harmless, another matrix is a wrong config.
    write_folder(source, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert_same(loaded(source, config), ours)
    write_folder(source, config, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(UserError, match=r"lm_head.weight differs .* set tie_word_embeddings to false"):
        checkpoint.load_tensors(source, config, torch.float32)


def quantized(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and "weights_proj" not in name:
            out[name], out[f"{name}_scale_inv"] = quant.quantize_weight(tensor, block)
    return out


@pytest.mark.parametrize("block", [(128, 128), (16, 20), (5, 7)])
def test_fp8_blocks_with_ragged_edges(block: tuple[int, int], tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    config = sparse_config(quantization_config=fp8)
    stored = quantized(random_tensors(config), block)
    assert sum(name.endswith("_scale_inv") for name in stored) > 30
    source = write_folder(tmp_path / "source", config, stored)
    ours = loaded(source, config, torch.float32)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    want = torch.empty(24, 32)
    for i in range(24):
        for j in range(32):
            want[i, j] = stored[name][i, j].float() * stored[f"{name}_scale_inv"][i // block[0], j // block[1]]
    assert torch.equal(ours["model.layers.1.mlp.experts.gate_up_proj"][2, 24:], want)
    save(tmp_path / "copy", config, source)
    assert "quantization_config" not in checkpoint.read_config(tmp_path / "copy")
    assert torch.equal(read_folder(tmp_path / "copy")[name], want.bfloat16())

    name = "model.layers.0.self_attn.o_proj.weight"
    without = {key: value for key, value in stored.items() if key != f"{name}_scale_inv"}
    write_folder(source, config, without)
    with pytest.raises(UserError, match=f"{name} is FP8 .* missing .* weight_block_size"):
        checkpoint.load_tensors(source, config, torch.float32)
    write_folder(source, config, stored | {f"{name}_scale_inv": torch.ones(9, 9)})
    with pytest.raises(UserError, match=r"\(9, 9\) instead of"):
        checkpoint.load_tensors(source, config, torch.float32)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """UE8M0 scales, stored as such, are worth the same as in float32; for values the format is refused."""
    config = sparse_config(quantization_config={"quant_method": "fp8"})
    stored = dict(random_tensors(config))
    for name in [name for name in stored if name.endswith("_proj.weight") and "weights_proj" not in name]:
        stored[name], stored[f"{name}_scale_inv"] = quant.quantize_weight(stored[name], scale_format="ue8m0")
    short = {k: v.to(torch.float8_e8m0fnu) if k.endswith("_scale_inv") else v for k, v in stored.items()}
    wide, narrow = write_folder(tmp_path / "a", config, stored), write_folder(tmp_path / "b", config, short)
    assert_same(loaded(wide, config), loaded(narrow, config))
    kept = checkpoint.block_tensors(narrow, config) & {"model.layers.0.self_attn.o_proj.weight"}
    assert kept
    for folder in (wide, narrow):
        held = dict(checkpoint.load_tensors(folder, config, torch.float32, kept))
        scales = held["model.layers.0.self_attn.o_proj.weight_scale_inv"]
        assert torch.equal(scales, stored["model.layers.0.self_attn.o_proj.weight_scale_inv"])
    write_folder(narrow, config, short | {"model.norm.weight": torch.ones(32).to(torch.float8_e8m0fnu)})
    with pytest.raises(UserError, match=r"model.norm.weight is stored as F8_E8M0"):
        checkpoint.load_tensors(narrow, config, torch.float32)


@pytest.mark.parametrize("block", [[128], [128, 0], [128, 128, 128], 128, ["128", "128"]])
def test_a_block_size_that_is_none_is_refused(tmp_path: Path, block: object) -> None:
    config = sparse_config()
    folder = write_folder(tmp_path / "m", config, random_tensors(config))
    quantization = {"quant_method": "fp8", "weight_block_size": block}
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    with pytest.raises(UserError, match=r"weight_block_size is .* \[128, 128\] for the published weights"):
        checkpoint.load_tensors(folder, config, torch.float32)


def test_other_quantization_is_refused(tmp_path: Path) -> None:
    config = sparse_config(quantization_config={"quant_method": "awq"})
    folder = write_folder(tmp_path / "m", config, random_tensors(config))
    with pytest.raises(UserError, match="quantized with awq, which is not supported"):
        checkpoint.load_tensors(folder, config, torch.float32)
    packed = random_tensors(config) | {"lm_head.weight": torch.zeros(64, 32, dtype=torch.int32)}
    write_folder(folder, sparse_config(), packed)
    with pytest.raises(UserError, match=r"lm_head.weight is stored as I32"):
        checkpoint.load_tensors(folder, sparse_config(), torch.float32)


# the multi-token-prediction layer


def with_mtp(folder: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    config = sparse_config(num_nextn_predict_layers=1, **changes)
    extra = {
        "model.layers.3.enorm.weight": torch.randn(32).bfloat16(),
        "model.layers.3.eh_proj.weight": torch.randn(32, 64).bfloat16(),
        "model.layers.3.mlp.gate.e_score_correction_bias": torch.randn(4),
        "model.layers.3.shared_head.head.weight": torch.randn(64, 32).half(),
    }
    write_folder(folder, config, random_tensors(config) | extra)
    return config, extra


def test_the_mtp_layer_survives_bit_for_bit(tmp_path: Path) -> None:
    config, extra = with_mtp(tmp_path / "source")
    tensors = read_folder(tmp_path / "source")
    assert not any(name.startswith("model.layers.3.") for name in loaded(tmp_path / "source", config))
    extras = checkpoint.mtp_tensors(tmp_path / "source", config)
    assert extras is not None and sorted(extras.names) == sorted(extra)
    save(tmp_path / "copy", config, tmp_path / "source", extras=extras, shard_bytes=9000)
    assert_same(read_folder(tmp_path / "copy"), tensors)
    assert checkpoint.read_config(tmp_path / "copy")["num_nextn_predict_layers"] == 1
    save(tmp_path / "source", config, tmp_path / "source", extras=extras)  # onto itself
    assert_same(read_folder(tmp_path / "source"), tensors)
    save(tmp_path / "without", config, tmp_path / "source")
    assert checkpoint.read_config(tmp_path / "without")["num_nextn_predict_layers"] == 0
    assert checkpoint.mtp_tensors(tmp_path / "without", config) is None


def test_a_quantized_mtp_layer_is_multiplied_out(tmp_path: Path) -> None:
    config, extra = with_mtp(tmp_path / "source", quantization_config={"quant_method": "fp8"})
    name = "model.layers.3.eh_proj.weight"
    values, scale = quant.quantize_weight(extra[name])
    stored = read_folder(tmp_path / "source") | {name: values, f"{name}_scale_inv": scale}
    write_folder(tmp_path / "source", config, stored)
    extras = checkpoint.mtp_tensors(tmp_path / "source", config)
    save(tmp_path / "copy", config, tmp_path / "source", extras=extras)
    copied = read_folder(tmp_path / "copy")
    assert torch.equal(copied[name], quant.dequantize_weight(values, scale)) and f"{name}_scale_inv" not in copied


def test_an_mtp_layer_that_is_gone_or_uncounted(tmp_path: Path) -> None:
    config, _ = with_mtp(tmp_path / "source")
    extras = checkpoint.mtp_tensors(tmp_path / "source", config)
    ours = loaded(tmp_path / "source", config)
    with pytest.raises(UserError, match=r"4 tensors are unknown: model.layers.3.* and 1 more; .*MTP"):
        checkpoint.load_tensors(tmp_path / "source", sparse_config(), torch.float32)
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="gone, and with it the multi-token-prediction layer"):
        checkpoint.save_tensors(tmp_path / "copy", config.to_dict(), ours.items(), extras)
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


# what others read


def test_the_published_config_survives_export() -> None:
    published = {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "index_topk": 2048,
        "torch_dtype": "bfloat16",
    }
    quantization = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "remote.Code"}}
    assert checkpoint.export_config(published | quantization, torch.bfloat16, mtp=True) == published
    # And the detour through transformers 5's own fields comes back to it.
    detour = transformers.DeepseekV32Config(**copy.deepcopy(published)).to_dict()
    assert "rope_parameters" in detour and "rope_scaling" not in detour
    back = checkpoint.export_config(detour, torch.bfloat16, mtp=True)
    assert {key: back.get(key) for key in published} == published
    assert not back.keys() & {"rope_parameters", "layer_types", "mlp_layer_types", "head_dim", "dtype"}
    ours = SparseConfig(**SMALL, **INDEXER, index_dtype="fp8", rope_parameters=YARN)
    theirs = DeepseekV32Config.from_dict(checkpoint.export_config(ours.to_dict(), torch.bfloat16, mtp=False))
    assert theirs.rope_parameters | YARN == theirs.rope_parameters and theirs.index_dtype == "fp8"
    assert SparseConfig.from_dict(theirs.to_dict()).index_dtype == "fp8"
    plain = checkpoint.export_config(sparse_config().to_dict(), torch.float32, mtp=False)
    assert plain["rope_scaling"] is None and plain["rope_theta"] == 10000.0 and plain["torch_dtype"] == "float32"
    assert plain["num_nextn_predict_layers"] == 0


def test_exportable_says_who_cannot_open_what() -> None:
    assert checkpoint.exportable(DeepseekV32Config()) == []
    assert checkpoint.exportable(DeepseekV3Config()) == [] == checkpoint.exportable(DeepseekV2Config())
    config = SparseConfig(
        q_lora_rank=None,
        scoring_func="softmax",
        tie_word_embeddings=True,
        attention_bias=True,
        index_head_dim=64,
        kv_lora_rank=128,
    )
    reasons = checkpoint.exportable(config)
    for part in ("query latent", "softmax", "tied", "bias", "index_head_dim 128 (here 64)", "kv_lora_rank 512"):
        assert sum(part in reason for reason in reasons) == 1, part
    assert [reason.startswith("transformers") for reason in reasons] == [True, True, False, False, False]
    halves = "rotates interleaved pairs"
    assert [halves in reason for reason in checkpoint.exportable(DeepseekV3Config(rope_interleave=False))] == [True]
    assert any(halves in reason for reason in checkpoint.exportable(sparse_config(rope_interleave=False)))
    odd = sparse_config(mlp_layer_types=["sparse", "dense", "sparse"])
    assert any("mlp_layer_types" in reason for reason in checkpoint.exportable(odd))
