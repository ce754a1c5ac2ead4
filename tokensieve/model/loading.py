"""Conversion between a folder (or a bundled name) and a model: `load`, `save`, `sparsify`."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokensieve import checkpoint
from tokensieve.checkpoint import copy_tokenizer
from tokensieve.config import UserError
from tokensieve.families import TOP_K_BY_LAYER, ModelConfig, family_of, model_config
from tokensieve.model import files, index_init
from tokensieve.model.causal import DecoderForCausalLM
from tokensieve.model.files import check_savable, fill
from tokensieve.model.sharing import sharing_fields

log = logging.getLogger("tokensieve")

INDEXERS = "indexer.safetensors"
INITS = ("random", "attention")  # of a new indexer


def load(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: ModelConfig | None = None,
    keep_fp8: bool = False,
    **others: Any,
) -> DecoderForCausalLM:
    """A model of any family in `tokensieve.families`, dense or sparse, in evaluation mode.

    `name`: a folder in Hugging Face format (safetensors only; FP8 blocks are multiplied out), a GGUF file, a bundled
    name, `smollm2`, or a hub id. `dtype`: float32 on the CPU and bfloat16 elsewhere unless given; the router's bias and
    the indexer's head weights stay float32. `config`: used in place of the folder's config.json. `keep_fp8`: FP8 blocks
    stay as they are, and are multiplied as they are; such a model can neither be trained nor saved. A
    multi-token-prediction layer is not run but carried along, and written again by `save`. UserError for missing,
    damaged or unsuitable files, and for options of transformers that have another name here.
    """
    for option in others:
        instead = {"device_map": "device", "torch_dtype": "dtype"}.get(option)
        remedy = f"use {instead}" if instead else "its options are dtype, device, config and keep_fp8"
        raise UserError(f"load has no option {option}; {remedy}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"load takes a dtype of torch, not {dtype!r}; use for instance torch.bfloat16")
    return files.read(DecoderForCausalLM, name, dtype, device, config, keep_fp8)


def save(
    model: DecoderForCausalLM,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    shard_bytes: float = 5e9,
    fp8: bool = False,
) -> list[str]:
    """Writes a folder in Hugging Face format, with a model card, that transformers (in its own class), vLLM and SGLang
    open.

    Returns (and logs) the reasons if they cannot open it. The tokenizer and the multi-token-prediction layer of the
    folder that the model was loaded from go with it. `dtype`: of the floating-point tensors; their own unless given.
    `fp8`: matrices in E4M3 blocks of 128 x 128 with a power of two as scale, as DeepSeek-V3.2-Exp is published, and the
    rest in bfloat16 unless `dtype` is given. A matrix that was read from such blocks keeps its values; to keep the bits
    of FP8 files too, `tokensieve convert --fp8`.
    The old contents of `folder` stay whole until the new files are complete. What is there beside a checkpoint stays;
    of a model of another size or vocabulary, tokenizer and card are replaced. UserError on a full disk.
    """
    check_savable(model)
    dtype = torch.bfloat16 if fp8 and dtype is None else dtype
    tensors = ((name, _cast(name, tensor, dtype)) for name, tensor in model.state_dict().items())
    another = checkpoint.holds_another(Path(folder), model.config.to_dict())
    checkpoint.save_tensors(folder, model.config.to_dict(), tensors, model.extras, shard_bytes, fp8)
    source = getattr(model, "folder", None)
    if source is not None and Path(source).resolve() != Path(folder).resolve():
        copy_tokenizer(Path(source), Path(folder), replace=another)
    checkpoint.write_card(Path(folder), None if source is None else Path(source), replace=another)
    reasons = checkpoint.exportable(model.config)
    for reason in reasons:
        log.warning("%s: %s", folder, reason)
    return reasons


def save_indexers(model: DecoderForCausalLM, folder: str | Path, trunk: str, dtype: torch.dtype | None = None) -> None:
    """Writes the indexers alone, for a trunk that did not change: a small checkpoint whose index points at its files,
    with a model card.

    `trunk` is the trunk's folder (one model.safetensors), relative to `folder`. `load` opens the result like any
    checkpoint; `save` the model whole for other programs.
    """
    check_savable(model)
    with checkpoint.replacing_folder(folder) as new:
        indexers = {n: _cast(n, t, dtype).contiguous() for n, t in model.state_dict().items() if ".indexer." in n}
        save_file(indexers, new / INDEXERS, metadata={"format": "pt"})
        files = {
            name: INDEXERS if ".indexer." in name else f"{trunk}/model.safetensors"
            for name in checkpoint.expected_tensors(model.config)
        }
        (new / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}, indent=1))
        exported = checkpoint.export_config(
            model.config.to_dict(), dtype or model.model.embed_tokens.weight.dtype, False
        )
        (new / "config.json").write_text(json.dumps(exported, indent=2) + "\n")
    source = getattr(model, "folder", None)
    if source is not None:
        copy_tokenizer(Path(source), Path(folder))
    checkpoint.write_card(Path(folder), None if source is None else Path(source))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    keep = dtype is None or not tensor.is_floating_point() or name.endswith(checkpoint.FLOAT32_SUFFIXES)
    return tensor if keep else tensor.to(dtype)


def sparsify(
    model: DecoderForCausalLM,
    top_k: int | Sequence[int] = 2048,
    index_heads: int = 64,
    index_dim: int = 128,
    index_dtype: str = "bf16",
    seed: int = 0,
    share_every: int = 1,
    init: str = "random",
    calibration: Tensor | None = None,
) -> DecoderForCausalLM:
    """A sparse model with the dense model's tensors (shared, not copied) and an untrained indexer in every layer, or
    with `share_every` n in the layers 0, n, 2n, ...; the others then read the keys of the layer before them.

    `top_k` keys are selected per query; several numbers are those of the layers, which have a whole number as their
    mean. The indexer has `index_heads` heads of width `index_dim`, of which the first
    dims (MLA: qk_rope_head_dim; grouped attention: up to 64) carry positions. `init` "random": its weights are normal
    with std fan_in**-0.5 (and ones for its norm), drawn from `seed`. "attention": they are made from the layer's own
    queries and keys (`tokensieve.model.index_init`), which takes one dense pass over `calibration`: token ids (B, S)
    int64 of text, or random ones, drawn from `seed`, unless given. UserError if the model is sparse already, if a
    number is below 1, if `index_dim` cannot hold the positions, for an unknown `init`, and for unsuitable ids.
    """
    if init not in INITS:
        raise UserError(f"init is {init!r}; it is one of {', '.join(INITS)}")
    if calibration is not None and init != "attention":
        raise UserError(f'calibration is read by init="attention" alone, not by {init!r}; leave it out')
    if not isinstance(model, DecoderForCausalLM):
        raise UserError(
            f"sparsify takes a model of tokensieve, not {type(model).__name__}; load it first: "
            "tokensieve.sparsify(tokensieve.load(NAME), top_k=64)"
        )
    family = family_of(model.config)
    if family.sparse:
        raise UserError("the model already has indexers; train them with: tokensieve warmup")
    k, by_layer = _keys(top_k, model.config.num_hidden_layers)
    for name, value in (("top_k", k), ("index_heads", index_heads), ("share_every", share_every)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    indexer = {"index_topk": k, "index_n_heads": index_heads, "index_head_dim": index_dim} | by_layer
    fields = family.sparse_fields(model.config) | indexer | {"index_dtype": index_dtype}
    if share_every > 1:
        layers = model.config.num_hidden_layers
        fields |= sharing_fields(fields, ["shared" if layer % share_every else "full" for layer in range(layers)])
    config = model_config(fields)
    with torch.device("meta"):
        sparse = DecoderForCausalLM(config)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    like = model.model.embed_tokens.weight
    for name, parameter in sparse.named_parameters():
        if ".indexer." in name:
            dtype = torch.float32 if name.endswith(checkpoint.FLOAT32_SUFFIXES) else like.dtype
            state[name] = _initial(name, parameter.shape, generator).to(like.device, dtype)
    fill(sparse, iter(state.items()))
    if model.extras is not None:
        log.warning(
            "the multi-token-prediction layer is left behind: it has no indexer, and engines expect one in deepseek_v32"
        )
    sparse.folder = getattr(model, "folder", None)
    sparse.eval()
    if init == "attention":
        index_init.from_attention(sparse, calibration, seed)
    return sparse


def _keys(top_k: int | Sequence[int], layers: int) -> tuple[int, dict[str, Any]]:
    """`index_topk`, and the field that holds the numbers of the layers if they are given."""
    if isinstance(top_k, int):
        return top_k, {}
    ks = [*top_k]
    if len(ks) != layers or min(ks) < 1 or sum(ks) % layers:
        raise UserError(
            f"top_k is {ks}; give one number, or one of at least 1 for each of {layers} layers, whose mean is whole"
        )
    return sum(ks) // layers, {TOP_K_BY_LAYER: ks}


def _initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if "k_norm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(shape, generator=generator) / math.sqrt(shape[1])
