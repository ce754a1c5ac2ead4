"""Tiny checkpoints that vLLM and SGLang could serve, and ways to damage them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config

from tests.support import checkpoints
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.deploy import plan
from tokensieve.families import SparseConfig
from tokensieve.model import model_path

# The attention widths of the 671B model; everything else is small.
WIDTHS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
WIDTHS |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 4096}
WIDTHS |= {"num_hidden_layers": 2, "intermediate_size": 256, "moe_intermediate_size": 256}
INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LINEAR = (
    "q_a_proj q_b_proj q_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj indexer.wq_b indexer.wk"
).split()

SCALE = "model.layers.0.self_attn.o_proj.weight_scale_inv"

Damage = Callable[[Path], None]


def config(kind: type = SparseConfig, **changes: Any) -> Any:
    return kind(**(checkpoints.SMALL | WIDTHS | (INDEXER if kind is SparseConfig else {}) | changes))


def make(folder: Path, made: Any, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint as tokensieve saves it, with the tokenizer of the bundled base."""
    source = checkpoints.write_folder(
        folder.parent / f"{folder.name}-source", made, checkpoints.random_tensors(made, dtype)
    )
    checkpoint.save_tensors(folder, made.to_dict(), checkpoint.load_tensors(source, made, dtype))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path("base") / name, folder)
    return folder


def edit(name: str = "config.json", **changes: Any) -> Damage:
    """Set fields of a JSON file, or remove them if the value is `...`."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def quantize(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(tuple(f".{x}" for x in LINEAR))]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(-(-rows // 128), -(-columns // 128))


def fp8(folder: Path) -> None:
    edit_tensors(quantize)(folder)
    edit(quantization_config=FP8)(folder)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def make_home(folder: Path) -> Path:
    """A folder with sparse/, dense/ and fp8/ (sparse in FP8), all with the 671B model's attention widths."""
    make(folder / "sparse", config())
    make(folder / "dense", config(DeepseekV3Config, q_lora_rank=None))
    shutil.copytree(folder / "sparse", folder / "fp8")
    fp8(folder / "fp8")
    return folder


def reasons(engine: str, folder: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as refused:
        plan(engine, str(folder), **options)
    assert all(reason == " ".join(reason.split()) for reason in refused.value.args), "a reason is one line"
    return refused.value.args
