"""The shards of the official inference demo: names and slices against a list written by hand, and every way back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV32Config

import tokensieve
from tests.support import commands
from tests.support.checkpoints import (
    INDEXER,
    SMALL,
    assert_same,
    listing,
    loaded,
    random_tensors,
    read_folder,
    write_folder,
)
from tokensieve import checkpoint
from tokensieve.checkpoint import writing
from tokensieve.config import UserError
from tokensieve.families import SparseConfig
from tokensieve.ops import quant

FOUR_HEADS = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4}
# Wide enough that four ranks get whole blocks of 128 rows or columns; the axes that nobody divides stay ragged.
WIDE = FOUR_HEADS | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 128, "v_head_dim": 128, "num_hidden_layers": 2}
WIDE |= {"intermediate_size": 512, "moe_intermediate_size": 512}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}

CONFIGS = {
    "sparse": SparseConfig(**FOUR_HEADS, **INDEXER),
    "no query latent": SparseConfig(**(FOUR_HEADS | {"q_lora_rank": None}), **INDEXER),
    "two shared experts, no bias": SparseConfig(
        **(FOUR_HEADS | {"n_shared_experts": 2}), **INDEXER, scoring_func="softmax"
    ),
    "tied": SparseConfig(**FOUR_HEADS, **INDEXER, tie_word_embeddings=True),
    "v3": DeepseekV3Config(**FOUR_HEADS, num_nextn_predict_layers=0),
    "v2": DeepseekV2Config(**(FOUR_HEADS | {"q_lora_rank": None, "n_shared_experts": 2})),
    "fp8": SparseConfig(**WIDE, **(INDEXER | {"index_head_dim": 128}), quantization_config=FP8),
}


def tensors_of(config: Any) -> dict[str, torch.Tensor]:
    """Random tensors, in FP8 those that the published checkpoint has in FP8."""
    tensors = random_tensors(config)
    if getattr(config, "quantization_config", None):
        bf16 = re.compile(r"embed_tokens|lm_head|norm|mlp\.gate\.|weights_proj")
        for name in [name for name in tensors if not bf16.search(name)]:
            tensors[name], tensors[f"{name}_scale_inv"] = quant.quantize_weight(tensors[name], (128, 128))
    return tensors


def by_hand(tensors: dict[str, torch.Tensor], config: Any, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """What the demo's model (inference/model.py) has on one rank, tensor by tensor."""
    shard = {}

    def put(new: str, old: str, axis: int | None = None) -> None:
        for a, b in (
            ("weight", "weight"),
            ("bias", "bias"),
            ("scale", "weight_scale_inv"),
            ("bias", "e_score_correction_bias"),
        ):
            if f"{old}.{b}" in tensors:
                whole = tensors[f"{old}.{b}"]
                shard[f"{new}.{a}"] = whole if axis is None else whole.chunk(ranks, axis)[rank].contiguous()

    put("embed", "model.embed_tokens", 0)
    put("norm", "model.norm")
    put("head", "model.embed_tokens" if config.tie_word_embeddings else "lm_head", 0)
    for i in range(config.num_hidden_layers):
        new, old = f"layers.{i}", f"model.layers.{i}"
        put(f"{new}.attn_norm", f"{old}.input_layernorm")
        put(f"{new}.ffn_norm", f"{old}.post_attention_layernorm")
        put(f"{new}.attn.wq", f"{old}.self_attn.q_proj", 0)
        put(f"{new}.attn.wq_a", f"{old}.self_attn.q_a_proj")
        put(f"{new}.attn.q_norm", f"{old}.self_attn.q_a_layernorm")
        put(f"{new}.attn.wq_b", f"{old}.self_attn.q_b_proj", 0)
        put(f"{new}.attn.wkv_a", f"{old}.self_attn.kv_a_proj_with_mqa")
        put(f"{new}.attn.kv_norm", f"{old}.self_attn.kv_a_layernorm")
        put(f"{new}.attn.wkv_b", f"{old}.self_attn.kv_b_proj", 0)
        put(f"{new}.attn.wo", f"{old}.self_attn.o_proj", 1)
        for part in ("wq_b", "wk", "k_norm", "weights_proj"):
            put(f"{new}.attn.indexer.{part}", f"{old}.self_attn.indexer.{part}")
        put(f"{new}.ffn.gate", f"{old}.mlp.gate")
        own = config.n_routed_experts // ranks
        widths: list[tuple[str, bool]] = [("", True), (".shared_experts", True)]
        widths += [(f".experts.{expert}", False) for expert in range(rank * own, rank * own + own)]
        for where, divided in widths:
            put(f"{new}.ffn{where}.w1", f"{old}.mlp{where}.gate_proj", 0 if divided else None)
            put(f"{new}.ffn{where}.w2", f"{old}.mlp{where}.down_proj", 1 if divided else None)
            put(f"{new}.ffn{where}.w3", f"{old}.mlp{where}.up_proj", 0 if divided else None)
    return shard


# there, back, and one rank of it


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back(kind: str, ranks: int, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    tensors = tensors_of(config)
    source, out, back = write_folder(tmp_path / "hf", config, tensors), tmp_path / "shards", tmp_path / "back"
    beside = {"tokenizer.json": b"{1}", "tokenizer_config.json": b"{2}", "chat_template.jinja": b"3"}
    for name, text in beside.items():
        (source / name).write_bytes(text)
    (source / "README.md").write_text("of the checkpoint")
    checkpoint.write_shards(source, out, ranks, config.n_routed_experts)

    beside["config.json"] = (source / "config.json").read_bytes()
    names = [f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    written = listing(out)
    assert sorted(written) == sorted([*names, *beside]) and {name: written[name] for name in beside} == beside
    for rank, name in enumerate(names):
        want = by_hand(tensors, config, rank, ranks)
        assert_identical(load_file(out / name), want)
        apart = {key: tensor.clone() for key, tensor in want.items()}  # a tied head may not share memory
        save_file(apart, tmp_path / "by hand.safetensors")
        assert written[name] == (tmp_path / "by hand.safetensors").read_bytes()

    checkpoint.join_shards(out, back)
    assert_identical(read_folder(back), tensors)
    assert {name: data for name, data in listing(back).items() if name in beside} == beside
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """As bytes: torch.equal knows no FP8."""
    assert {name: (t.dtype, t.shape) for name, t in a.items()} == {name: (t.dtype, t.shape) for name, t in b.items()}
    assert_same({n: t.view(torch.uint8) for n, t in a.items()}, {n: t.view(torch.uint8) for n, t in b.items()})


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_ranks_together_are_the_model(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]
    source = write_folder(tmp_path / "hf", config, tensors_of(config))
    whole, ranks = loaded(source, config, torch.float32), 2
    checkpoint.write_shards(source, tmp_path / "s", ranks)
    parts = [dict(checkpoint.load_shard(tmp_path / "s", config, rank, ranks, torch.float32)) for rank in range(ranks)]
    assert list(parts[0]) == list(parts[1]) == list(whole)
    for name, tensor in whole.items():
        pieces = [part[name] for part in parts]
        axis = 0 if ".mlp.experts." in name else checkpoint.shard_axis(name)
        if axis is None:
            assert all(torch.equal(piece, tensor) for piece in pieces), name
        else:
            assert torch.equal(torch.cat(pieces, axis), tensor), name
    assert parts[1]["model.layers.1.mlp.experts.down_proj"].shape[0] == config.n_routed_experts // ranks


def test_the_model_that_comes_back_computes_the_same(tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    source = write_folder(tmp_path / "hf", config, tensors_of(config))
    checkpoint.write_shards(source, tmp_path / "s", 4)
    checkpoint.join_shards(tmp_path / "s", tmp_path / "back", shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 5
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(tokensieve.load(source)(ids).logits, tokensieve.load(tmp_path / "back")(ids).logits)


def test_a_checkpoint_in_many_files_and_an_interrupted_conversion(tmp_path: Path, monkeypatch) -> None:
    config = CONFIGS["sparse"]
    tensors = tensors_of(config)
    write_folder(tmp_path / "one", config, tensors)
    (tmp_path / "many").mkdir()
    writer = writing.ShardWriter(tmp_path / "many", 9000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    (tmp_path / "many" / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    for name in ("one", "many"):
        checkpoint.write_shards(tmp_path / name, tmp_path / f"{name}-s", 2)
    assert listing(tmp_path / "one-s") == listing(tmp_path / "many-s")

    def interrupted(step: str) -> None:
        if step in ("rank 1 of 2", "model.layers.2"):
            raise KeyboardInterrupt

    for convert, folder, options in (
        (checkpoint.write_shards, "one", {"ranks": 2}),
        (checkpoint.join_shards, "one-s", {"shard_bytes": 9000}),
    ):
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / folder, tmp_path / "new", on_step=interrupted, **options)
        with monkeypatch.context() as patch, pytest.raises(UserError, match="disk is full; free space"):
            patch.setattr(writing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
            convert(tmp_path / folder, tmp_path / "new", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "many-s", "one", "one-s"]


def test_the_multi_token_prediction_layer_stays_behind(tmp_path: Path, caplog) -> None:
    config = SparseConfig(**FOUR_HEADS, **INDEXER, num_nextn_predict_layers=1)
    tensors = tensors_of(config)
    mtp = {
        "model.layers.3.eh_proj.weight": torch.ones(32, 64),
        "model.layers.3.embed_tokens.weight": torch.ones(64, 32),
    }
    source = write_folder(tmp_path / "hf", config, tensors | mtp)
    checkpoint.write_shards(source, tmp_path / "s", 2)
    assert "multi-token-prediction layer is left behind" in caplog.text
    assert not any("layers.3." in name for name in load_file(tmp_path / "s" / "model0-mp2.safetensors"))
    checkpoint.join_shards(tmp_path / "s", tmp_path / "back")
    assert_same(read_folder(tmp_path / "back"), tensors)
    raw = [checkpoint.read_config(tmp_path / name) for name in ("hf", "back")]
    assert raw[0].pop("num_nextn_predict_layers") == 1 and raw[1].pop("num_nextn_predict_layers") == 0
    assert raw[0] == raw[1]


def test_a_rank_of_the_671b_model() -> None:
    config = DeepseekV32Config()
    shapes = checkpoint.rank_tensors(config, 3, 8)
    experts = {int(name.split(".")[5]) for name in shapes if ".mlp.experts." in name}
    assert experts == set(range(96, 128))
    attention, new = "model.layers.60.self_attn", {checkpoint.demo_name(name) for name in shapes}
    for name, shape in {
        "model.embed_tokens.weight": (16160, 7168),
        f"{attention}.q_b_proj.weight": (3072, 1536),
        f"{attention}.kv_b_proj.weight": (4096, 512),
        f"{attention}.o_proj.weight": (7168, 2048),
        f"{attention}.indexer.wq_b.weight": (8192, 1536),
        "model.layers.2.mlp.down_proj.weight": (7168, 2304),
        "model.layers.3.mlp.shared_experts.up_proj.weight": (256, 7168),
        "model.layers.3.mlp.experts.96.up_proj.weight": (2048, 7168),
        "lm_head.weight": (16160, 7168),
    }.items():
        assert shapes[name] == shape, name
    assert len(new) == len(shapes) and {"layers.60.attn.wq_b.weight", "layers.60.attn.indexer.wq_b.weight"} <= new
    assert checkpoint.demo_name("model.layers.3.mlp.gate.e_score_correction_bias") == "layers.3.ffn.gate.bias"


# FP8 blocks across ranks


@pytest.mark.parametrize(("width", "possible"), [(192, "1$"), (384, "1$"), (256, "1, 2$"), (768, "1, 2$")])
def test_fp8_blocks_are_never_cut(width: int, possible: str, tmp_path: Path) -> None:
    """192 rows have two rows of scales, and halves of 96 rows would each get one: the second rank's would be wrong."""
    config = SparseConfig(**(WIDE | {"intermediate_size": width}), **INDEXER, quantization_config=FP8)
    source = write_folder(tmp_path / "hf", config, tensors_of(config))
    refused = 2 if width in (192, 384) else 4
    match = rf"{refused} ranks do not divide .*gate_proj.* FP8 blocks .*{width} by 128.*: {possible}"
    with pytest.raises(UserError, match=match):
        checkpoint.write_shards(source, tmp_path / "s", refused)
    assert not (tmp_path / "s").exists()
    checkpoint.write_shards(source, tmp_path / "s", 1)
    if width != 192:
        return
    # The official conversion makes these shards; put together again they are right, a rank alone is not.
    for rank in range(2):
        save_file(by_hand(tensors_of(config), config, rank, 2), tmp_path / "s" / f"model{rank}-mp2.safetensors")
    with pytest.raises(UserError, match=match):
        checkpoint.load_shard(tmp_path / "s", config, 1, 2, torch.bfloat16)
    checkpoint.join_shards(tmp_path / "s", tmp_path / "back", ranks=2)
    assert_identical(read_folder(tmp_path / "back"), tensors_of(config))


def test_fp8_in_other_blocks_is_refused(tmp_path: Path) -> None:
    config = SparseConfig(**WIDE, **INDEXER, quantization_config=FP8 | {"weight_block_size": [64, 64]})
    tensors = random_tensors(config)
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = quant.quantize_weight(tensors[name], (64, 64))
    source = write_folder(tmp_path / "hf", config, tensors)
    with pytest.raises(UserError, match="blocks of 64 x 64, and the demo reads 128 x 128 only"):
        checkpoint.write_shards(source, tmp_path / "s", 2)


# the command


def test_the_command(run, tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    source = write_folder(tmp_path / "hf", config, tensors_of(config))
    shards, back, refused = tmp_path / "s", tmp_path / "back", commands.refusal(run)
    ended = run("convert", source, shards, "--n-experts", 4, "--model-parallel", 2)
    assert ended.status == 0 and ended.out == f"{shards}: 2 shards, model0-mp2.safetensors the first\n"
    before = listing(shards)
    refused(("exists already", "name a new folder"), "convert", source, shards, "--model-parallel", 4)
    refused(("--n-experts 8", "n_routed_experts 4"), "convert", shards, back, "--reverse", "--n-experts", 8)
    refused(
        ("no shards for 4 ranks, those there are for 2",), "convert", shards, back, "--reverse", "--model-parallel", 4
    )
    refused(("shards of the inference demo", "--reverse"), "convert", shards, back, "--model-parallel", 2)
    refused(("shards of the inference demo", "--reverse"), "generate", shards, "--prompt", "x")
    refused(("no such folder",), "convert", tmp_path / "nowhere", back, "--reverse")
    assert listing(shards) == before and not back.exists()
    assert run("convert", shards, back, "--reverse", "--n-experts", 4, "--model-parallel", 2).status == 0
    assert_same(read_folder(back), read_folder(source))
    with pytest.raises(UserError, match=r"model0-mp4.safetensors: missing; copy it"):
        checkpoint.load_shard(shards, config, 0, 4, torch.bfloat16)
    with pytest.raises(ValueError, match="ranks count from 0"):
        checkpoint.load_shard(shards, config, 2, 2, torch.bfloat16)
    assert checkpoint.rank_file(0, 2) in before
