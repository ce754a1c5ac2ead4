"""Small random checkpoints and what the tests of tokensieve.checkpoint do with folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV32Config

from tokensieve import checkpoint

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 512,
}
INDEXER = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def sparse_config(**changes: Any) -> DeepseekV32Config:
    return DeepseekV32Config(**(SMALL | INDEXER | changes))


def random_tensors(config: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Fill every on-disk tensor of a config, float32 where the published checkpoint has float32."""
    generator = torch.Generator().manual_seed(0)
    kinds = {True: torch.float32, False: dtype}
    return {
        name: torch.randn(shape, generator=generator).to(kinds[name.endswith(checkpoint.FLOAT32_SUFFIXES)])
        for name, shape in checkpoint.expected_tensors(config).items()
    }


def write_folder(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def loaded(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load_tensors(folder, config, dtype))


def save(folder: Path, config: Any, source: Path, **options: Any) -> None:
    checkpoint.save_tensors(
        folder, config.to_dict(), checkpoint.load_tensors(source, config, torch.bfloat16), **options
    )
