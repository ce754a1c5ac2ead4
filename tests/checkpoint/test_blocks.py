"""FP8 blocks as DeepSeek publishes them: which tensors, which bits, what was lost, and what reads them again."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tokensieve
from tests.support import commands
from tests.support.models import config, ours
from tokensieve import checkpoint
from tokensieve.checkpoint.blocks import PUBLISHED
from tokensieve.config import UserError
from tokensieve.data import train_tokenizer
from tokensieve.model import fp8
from tokensieve.ops import quant

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128}
SHAPE |= {"kv_lora_rank": 64, "v_head_dim": 32, "index_head_dim": 32, "num_hidden_layers": 2}
E4M3 = torch.float8_e4m3fn

STAY = {
    "embed_tokens.weight", "lm_head.weight", "norm.weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias",
    "input_layernorm.weight", "post_attention_layernorm.weight", "q_a_layernorm.weight", "kv_a_layernorm.weight",
    "indexer.k_norm.weight", "indexer.k_norm.bias", "indexer.weights_proj.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint with a tokenizer."""
    root = tmp_path_factory.mktemp("blocks")
    model = ours(config("v32", vocab_size=512, **SHAPE), seed=5)
    model.folder = train_tokenizer([Path(__file__).read_text() * 4], root / "tokenizer", 512)
    tokensieve.save(model, root / "plain", torch.bfloat16)
    return root / "plain"


@pytest.fixture(scope="module")
def blocks(plain: Path) -> Path:
    checkpoint.convert_to_blocks(plain, plain.parent / "blocks")
    return plain.parent / "blocks"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = [{n: t.view(torch.uint8) if t.dtype == E4M3 else t for n, t in x.items()} for x in (a, b)]
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and bits[0][n].equal(bits[1][n]) for n, t in a.items())


def test_the_tensors_and_the_config_are_as_published(plain: Path, blocks: Path) -> None:
    before, after = tensors(plain), tensors(blocks)
    stay = {name for name, tensor in after.items() if tensor.dtype != E4M3 and not name.endswith("_scale_inv")}
    assert {
        re.sub(r"model\.(layers\.\d+\.)?(self_attn\.(?!indexer))?(self_attn\.)?", "", name) for name in stay
    } == STAY
    for name in before.keys() - stay:
        values, scales = after[name], after[f"{name}_scale_inv"]
        assert values.dtype == E4M3 and scales.dtype == torch.float32 and values.shape == before[name].shape
        assert scales.shape == tuple(-(-size // 128) for size in values.shape)
        assert torch.frexp(scales).mantissa.eq(0.5).all()  # powers of two, as scale_fmt says
    raw = json.loads((blocks / "config.json").read_text())
    assert raw["quantization_config"] == PUBLISHED == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    }  # fmt: skip
    assert raw["torch_dtype"] == "bfloat16" and after["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert after["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert (blocks / "tokenizer.json").is_file() and (blocks / "README.md").is_file()


def test_both_ways_to_read_them(plain: Path, blocks: Path) -> None:
    source, rounded, held = (
        tokensieve.load(plain), tokensieve.load(blocks), tokensieve.load(blocks, keep_fp8=True)
    )  # fmt: skip
    assert fp8.holds(held)
    for name, weight in source.state_dict().items():
        error = float((rounded.state_dict()[name] - weight).norm() / weight.norm())
        assert 0.02 < error < 0.03 if checkpoint.in_blocks(name) else error == 0, name
    module, name = held.model.layers[0].self_attn.o_proj, "model.layers.0.self_attn.o_proj.weight"
    back = quant.dequantize_weight(module.weight, module.weight_scale_inv, dtype=torch.float32)
    assert back.equal(rounded.get_parameter(name))
    ids = torch.randint(16, 500, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert held(ids).logits.isfinite().all()


def test_save_writes_the_same(plain: Path, blocks: Path, tmp_path: Path) -> None:
    model = tokensieve.load(plain, torch.bfloat16)
    tokensieve.save(model, tmp_path / "a", fp8=True)
    assert same(tensors(tmp_path / "a"), tensors(blocks))
    assert checkpoint.read_config(tmp_path / "a")["quantization_config"] == PUBLISHED
    tokensieve.save(model, tmp_path / "b", fp8=True, shard_bytes=200_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2 and same(tensors(tmp_path / "b"), tensors(blocks))


def test_what_is_in_blocks_keeps_every_bit(plain: Path, blocks: Path, tmp_path: Path) -> None:
    lost = checkpoint.convert_to_blocks(blocks, tmp_path / "again")
    assert lost.matrices == 0 < lost.kept and same(tensors(tmp_path / "again"), tensors(blocks))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (blocks / "config.json").read_text()
    )
    for dtype in (torch.bfloat16, torch.float32):  # multiplied out in between
        tokensieve.save(tokensieve.load(blocks, dtype), tmp_path / str(dtype), fp8=True)
        again, first = (tokensieve.load(folder).state_dict() for folder in (tmp_path / str(dtype), blocks))
        assert all(tensor.equal(first[name]) for name, tensor in again.items()), dtype


def test_scales_of_another_kind_keep_every_bit_too(plain: Path, tmp_path: Path) -> None:
    """Float32 scales, and a matrix that is not in blocks yet: it gets the same kind."""
    stored = tensors(plain)
    new = "model.layers.0.self_attn.o_proj.weight"
    for name in [name for name in stored if checkpoint.in_blocks(name) and name != new]:
        stored[name], stored[f"{name}_scale_inv"] = quant.quantize_weight(stored[name])
    (tmp_path / "m").mkdir()
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    raw = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    lost = checkpoint.convert_to_blocks(tmp_path / "m", tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert lost.matrices == 1 and lost.worst_name == new and found[new].dtype == E4M3
    assert not torch.frexp(found[f"{new}_scale_inv"]).mantissa.eq(0.5).all()
    assert same(
        {n: t for n, t in found.items() if n in stored and n != new}, {n: t for n, t in stored.items() if n != new}
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == settings


def test_the_mtp_layer_goes_along(tmp_path: Path) -> None:
    tokensieve.save(ours(config("v32", **SHAPE), seed=5), tmp_path / "m", torch.bfloat16)
    stored = tensors(tmp_path / "m")
    for name in [n for n in stored if n.startswith("model.layers.1.")]:
        stored[name.replace("layers.1.", "layers.2.")] = stored[name].clone()
    stored["model.layers.2.eh_proj.weight"] = torch.ones(128, 256, dtype=torch.bfloat16)
    save_file(stored, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    raw = json.loads((tmp_path / "m" / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "m" / "config.json").write_text(json.dumps(raw))
    checkpoint.convert_to_blocks(tmp_path / "m", tmp_path / "a")
    tokensieve.save(tokensieve.load(tmp_path / "m", torch.bfloat16), tmp_path / "b", fp8=True)
    found = tensors(tmp_path / "a")
    assert found["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16
    assert found["model.layers.2.mlp.experts.3.up_proj.weight"].dtype == E4M3 and same(found, tensors(tmp_path / "b"))


def test_a_llama_in_blocks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import LlamaConfig

    shape = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": True}
    tokensieve.save(ours(LlamaConfig(**shape)), tmp_path / "m", torch.bfloat16)
    sparse = tokensieve.sparsify(tokensieve.load(tmp_path / "m", torch.bfloat16), 8, 4, 32)
    reasons = tokensieve.save(sparse, tmp_path / "s", fp8=True)
    assert reasons and "transformers, vLLM, SGLang" in reasons[0]
    again = tokensieve.load(tmp_path / "s", keep_fp8=True)
    assert fp8.holds(again) and again.lm_head.weight is again.model.embed_tokens.weight
    ended = commands.runner(capsys)("convert", tmp_path / "s", tmp_path / "t", "--fp8")
    assert ended.status == 0 and "kept every bit" in ended.out and "Cannot read it: transformers, vLLM" in ended.out


def test_the_command_reports_the_loss(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = commands.runner(capsys)
    ended = run("convert", plain, tmp_path / "out", "--fp8")
    assert ended.status == 0, ended
    error = re.search(r"Relative error of the rounded weights: (\d\.\d\d)%, at most (\d\.\d\d)% \(model\.", ended.out)
    assert error and 2 < float(error[1]) <= float(error[2]) < 3.2
    found = re.search(r"Perplexity of 1023 tokens of Python: ([\d.]+) before, ([\d.]+) after", ended.out)
    assert found and 0 < abs(float(found[1]) / float(found[2]) - 1) < 0.05
    card = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert f"- {found[0]}" in card and any(line.startswith(f"- {error[0]}") for line in card)
    refused = commands.refusal(run)
    refused(("exists already",), "convert", plain, tmp_path / "out", "--fp8")
    refused(("leave --reverse",), "convert", plain, tmp_path / "x", "--fp8", "--reverse")


def test_without_a_tokenizer_the_weights_are_measured_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokensieve.save(ours(config("v3")), tmp_path / "m")
    ended = commands.runner(capsys)("convert", tmp_path / "m", tmp_path / "out", "--fp8")
    assert ended.status == 0 and "Perplexity: not measured" in ended.out and "no tokenizer.json" in ended.out
    assert tensors(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.bfloat16  # from float32


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    model = ours(config("v3"))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = float("nan")
    tokensieve.save(model, tmp_path / "m")
    with pytest.raises(UserError, match=r"o_proj.weight: cannot quantize a weight with a NaN"):
        checkpoint.convert_to_blocks(tmp_path / "m", tmp_path / "out")
    with pytest.raises(UserError, match=r"o_proj.weight: cannot quantize a weight with a NaN"):
        tokensieve.save(model, tmp_path / "out", fp8=True)
    assert not (tmp_path / "out").exists()
