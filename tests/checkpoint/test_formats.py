"""Weights in formats that are not read: the message names the format, not what is missing because of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import tokensieve
from tests.support.checkpoints import random_tensors, sparse_config, write_folder
from tests.support.models import config, ours
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.model import model_path

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.self_attn.o_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def nvfp4(tensors: Tensors) -> Tensors:
    scales = {f"{NAME}_scale": torch.ones(32, 1).to(torch.float8_e4m3fn), f"{NAME}_scale_2": torch.ones(())}
    return tensors | {NAME: torch.zeros(32, 8, dtype=torch.uint8)} | scales


def fp8_by_tensor(tensors: Tensors) -> Tensors:
    return tensors | {NAME: tensors[NAME].to(torch.float8_e4m3fn), f"{NAME}_scale": torch.ones(())}


def fp8_by_row(tensors: Tensors) -> Tensors:
    return tensors | {NAME: tensors[NAME].to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(32)}


def mxfp4(tensors: Tensors) -> Tensors:
    stem = NAME.removesuffix(".weight")
    parts = {f"{stem}_{part}": torch.zeros(32, 8, dtype=torch.uint8) for part in ("blocks", "scales")}
    return {name: tensor for name, tensor in tensors.items() if name != NAME} | parts


def parametrized(tensors: Tensors) -> Tensors:
    return {name.replace("o_proj.", "o_proj.parametrizations.weight.original."): t for name, t in tensors.items()}


def dense(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".indexer." not in name}


def gptq(tensors: Tensors) -> Tensors:
    stem = NAME.removesuffix("weight")
    rest = {name: tensor for name, tensor in tensors.items() if name != NAME}
    return rest | {f"{stem}qweight": torch.zeros(2, 32, dtype=torch.int32), f"{stem}scales": torch.ones(1, 32)}


def fused(tensors: Tensors) -> Tensors:
    rest = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    return rest | {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 48, 32)}


def prefixed(tensors: Tensors) -> Tensors:
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}


def unprefixed(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_adapter(tensors: Tensors) -> Tensors:
    rest = {name.replace("o_proj.weight", "o_proj.base_layer.weight"): t for name, t in tensors.items()}
    return rest | {"model.layers.0.self_attn.o_proj.lora_A.default.weight": torch.zeros(2, 16)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (nvfp4, r"quantized, as .*o_proj.weight_scale_2 shows \(NVFP4 \(4 bits\)\), .*; use the bf16 or FP8-block"),
        (fp8_by_tensor, r"o_proj.weight_scale shows \(FP8 with one scale a tensor or row\)"),
        (fp8_by_row, r"o_proj.weight_scale_inv is \(32,\), one scale a tensor or row, which is not supported"),
        (mxfp4, r"o_proj_blocks shows \(MXFP4"),
        (parametrized, r"o_proj.parametrizations.weight.* that PyTorch parametrizes; fold it into the weight first"),
        (dense, r"config.json is that of a sparse model, and the weights are those of a dense one"),
        (gptq, r"o_proj.qweight shows \(GPTQ or AWQ\)"),
        (fused, r"experts are fused \(model.layers.1.mlp.experts.gate_up_proj\), .*save_original_format=True"),
        (prefixed, r"names begin with language_model. \(language_model.lm_head.weight\).*alone"),
        (unprefixed, r"names lack the prefix model. \(embed_tokens.weight\)"),
        (with_adapter, r"tensors of an adapter \(.*lora_A.*merge it first"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("quantization", [None, FP8], ids=["plain", "left-over fp8"])
def test_other_formats(change: Callable[[Tensors], Tensors], complaint: str, quantization: Any, tmp_path: Path) -> None:
    config = sparse_config()
    folder = write_folder(tmp_path / "m", config, change(random_tensors(config)))
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=complaint) as error:
        checkpoint.load_tensors(folder, config, torch.float32)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"a PEFT adapter, not a model; merge it into its base \(owner/base\)"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sparse_config().to_dict()))
    with pytest.raises(UserError, match="a PEFT adapter, not a model"):
        checkpoint.load_tensors(tmp_path, sparse_config(), torch.float32)


def test_an_adapter_beside_a_model_is_not_left_out(tmp_path: Path) -> None:
    tokensieve.save(ours(config("v3")), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    for read in (tokensieve.load, checkpoint.read_config):
        with pytest.raises(UserError, match="a model and a PEFT adapter, which would be left out; merge it"):
            read(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    tokensieve.load(tmp_path)


def test_what_the_refusal_of_an_adapter_says_works(tmp_path: Path) -> None:
    base = ours(config("v3"))
    tokensieve.save(base, tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(tokensieve.load(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    for read in (tokensieve.load, tokensieve.load_tokenizer):
        with pytest.raises(
            UserError, match=r"a PEFT adapter, not a model; merge it into its base.*then tokensieve.save"
        ):
            read(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(tokensieve.load(tmp_path / "base"), tmp_path / "adapter").merge_and_unload()
    tokensieve.save(merged, tmp_path / "merged")
    name = "model.layers.0.self_attn.o_proj.weight"
    again = tokensieve.load(tmp_path / "merged").get_parameter(name)
    assert again.equal(merged.get_parameter(name)) and not again.equal(base.get_parameter(name))


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors: a file; give the folder that holds it"):
        model_path(single)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    config = sparse_config()
    folder = write_folder(tmp_path / "m", config, random_tensors(config))
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=f"{name}: a pointer of Git LFS, not the file itself; fetch it: git lfs pull"):
        tokensieve.load_tokenizer(tokensieve.load(folder).folder)


@pytest.mark.parametrize("value", [[], "fp8", 8])
def test_a_quantization_that_is_no_object(value: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", sparse_config(), {})
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": value}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="quantization_config is .*; it must be an object, or null"):
        checkpoint.read_config(folder)


def test_how_many_shards_are_missing(tmp_path: Path) -> None:
    config = sparse_config()
    files = {name: f"model-{i % 3:05d}-of-00003.safetensors" for i, name in enumerate(random_tensors(config))}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match="3 of 3 shards are missing .*model-00000-of-00003.safetensors the first; comp"):
        checkpoint.load_tensors(tmp_path, config, torch.float32)


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sparse_config()
    folder = write_folder(tmp_path / "m", config, random_tensors(config))

    def unmappable(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 688 GB: Cannot allocate memory (12)")

    monkeypatch.setattr("tokensieve.checkpoint.reading.safe_open", unmappable)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be mapped into memory \(unable to mmap.*ulimit"):
        checkpoint.load_tensors(folder, config, torch.float32)
