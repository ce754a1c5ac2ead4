"""GGUF files as checkpoints: transformers reads them, weights multiplied out, config and tokenizer included.

The package gguf decodes the file, and transformers undoes what llama.cpp's conversion did to names and layouts. What
transformers would drop without a word is refused here: scaled and partly rotated positions, windows, tensors that it
does not know, tensors that are missing, parts of a file.
"""

import copy
import importlib.util
import io
import json
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from tokensieve.checkpoint.names import FLOAT32_SUFFIXES, expected_tensors
from tokensieve.config import UserError
from tokensieve.families import FAMILIES, family_of
from tokensieve.families.unsupported import nearest
from tokensieve.files import is_gguf

__all__ = ["is_gguf", "load_tensors", "read_config", "read_licence", "read_tokenizer", "save_tokenizer"]

_ORIGINAL = "use the safetensors that it was made from"
_FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, OSError, struct.error)
_PLAIN = {0: "float32", 1: "float16"}  # `general.file_type` of files whose weights are not quantized
# Sizes that transformers replaces by its defaults, in some families or in all.
_SIZES = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_ABOUT = {
    "num_attention_heads": "attention.head_count",
    "num_experts": "expert_count",
    "kv_lora_rank": "attention.kv_lora_rank",
}


@contextmanager
def _alone(path: Path) -> Iterator[dict[str, Any]]:
    """Arguments of transformers' from_pretrained for a GGUF file. No other file of its folder is seen.

    Raises UserError for a missing package, and for what the block raises about the file.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{path}: reading a GGUF file needs {' and '.join(missing)}; pip install 'tokensieve[gguf]'")
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / path.name).symlink_to(path.resolve())
            yield {"pretrained_model_name_or_path": folder, "gguf_file": path.name}
    except NotImplementedError as error:
        raise UserError(f"{path}: of a kind that is not supported ({_line(error)}); {_ORIGINAL}") from error
    except _FAULTS as error:
        if "not supported" in str(error):
            raise UserError(f"{path}: {_line(error)}; {_ORIGINAL}") from error
        raise UserError(
            f"{path}: cannot be read as GGUF, truncated or corrupt ({_line(error)}); copy or download it again"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json, from a GGUF file's metadata.

    `dtype` is that of the weights, bfloat16 for quantized ones. `eos_token_id` are the tokens that end an answer.
    Raises UserError for a damaged file, an architecture that transformers or tokensieve does not read, positions that
    are scaled or rotate a part of each head, an attention window, and one part of a model in several files.
    """
    from transformers import AutoConfig

    with _alone(path) as source:
        from transformers.integrations.gguf import read_gguf_metadata

        metadata, names = read_gguf_metadata(str(path))
        own = {key.partition(".")[2]: value for key, value in metadata.items()}  # without the architecture's name
        try:
            raw = AutoConfig.from_pretrained(**source).to_dict()
        except ValueError as error:
            if "is not supported" in str(error):
                raise UserError(f"{path}: {_unread(metadata, own)}") from error
            raise
    family = family_of(raw, str(path))
    raw |= {field: own[key] for key, field in _SIZES.items() if key in own}
    scaling = [key for key, value in metadata.items() if key.endswith(".rope.scaling.type") and value != "none"]
    scaling += [key for key in metadata if key.endswith((".rope.scaling.factor", ".rope.scale_linear"))]
    scaling += [name for name in names if name.startswith("rope_")]
    if scaling:
        raise UserError(f"{path}: its positions are scaled ({scaling[0]}), which transformers drops; {_ORIGINAL}")
    width = family.rope(family.config.from_dict(raw))[0]
    if (rotated := own.get("rope.dimension_count", width)) != width:
        raise UserError(
            f"{path}: {rotated} of the {width} dims of a head are rotated (rope.dimension_count), which transformers "
            f"drops; {_ORIGINAL}"
        )
    if (window := own.get("attention.sliding_window", 0)) and window < raw["max_position_embeddings"]:
        raise UserError(f"{path}: it has an attention window of {window}, which transformers drops; {_ORIGINAL}")
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path}: one part of a split model; join them first (llama-gguf-split --merge)")
    bos, eos, eot, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding"))
    ends = sorted({token for token in (eos, eot) if token is not None})
    dtype = _PLAIN.get(metadata.get("general.file_type", -1), "bfloat16")
    return raw | {"dtype": dtype, "bos_token_id": bos, "eos_token_id": ends or None, "pad_token_id": pad}


def load_tensors(path: Path, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (in-memory name, tensor) as :func:`tokensieve.checkpoint.load_tensors` does, quantized weights multiplied
    out in ``dtype``.

    Raises UserError for a damaged file, a quantization that transformers does not read, and tensors that are missing,
    of another shape, or not the model's.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    dense = copy.deepcopy(config)  # transformers notes its folder in it
    with (
        _alone(path) as source,
        redirect_stderr(io.StringIO()),
    ):  # transformers' bars, and its report of what is missing
        _refuse_surplus(path, config)
        model, report = AutoModelForCausalLM.from_pretrained(
            **source,
            config=dense,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    misshapen = {name for name, *_ in report["mismatched_keys"]}
    lacking = sorted({*report["missing_keys"], *misshapen} - {"lm_head.weight"})
    if lacking:
        raise UserError(f"{path}: {len(lacking)} tensors are missing or misshapen, {lacking[0]} the first; {_ORIGINAL}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield name, tensor.to(torch.float32 if name.endswith(FLOAT32_SUFFIXES) else dtype)


def _unread(metadata: dict[str, Any], own: dict[str, Any]) -> str:
    """A line on an architecture that transformers does not read from GGUF."""
    kind = metadata["general.architecture"]
    fields = {name: own.get(key) for name, key in _ABOUT.items()}
    near = nearest(kind, fields, FAMILIES)
    return f"architecture {kind!r} is not read from GGUF; use safetensors of a model of type {', '.join(FAMILIES)}" + (
        f"; the nearest family is {near}" if near else ""
    )


def _refuse_surplus(path: Path, config: Any) -> None:
    """Raises UserError for a tensor that a model of this config does not have: transformers would leave it out."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, names = read_gguf_metadata(str(path))
    architectures = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    known = get_tensor_name_map(architectures[metadata["general.architecture"]], config.num_hidden_layers)
    ours = (re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in expected_tensors(config))
    surplus = sorted({*names} - {known.get_name(name, (".weight", ".bias")) for name in ours})
    if surplus:
        raise UserError(f"{path}: {surplus[0]} is no tensor of a {config.model_type} model; {_ORIGINAL}")


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file's metadata, chat template included, with the file's tokens and no other.

    Raises UserError if transformers reads none.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _alone(path) as source:
        from transformers.integrations.gguf import read_gguf_metadata

        count = read_gguf_metadata(str(path))[0]["tokenizer.ggml.tokens"]  # of an array it gives the length
        read = AutoTokenizer.from_pretrained(**source)
        parts = json.loads(read.backend_tokenizer.to_str())
    # transformers' classes add the special tokens of their own families, which the model has no embedding for.
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < count]
    special = {key: token for key, token in read.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        name_or_path=str(path),
        **{key: token for key, token in special.items() if read.convert_tokens_to_ids(token) < count},
    )


def read_licence(path: Path) -> str | None:
    """The licence that a GGUF file states, as the hub writes it."""
    from transformers.integrations.gguf import read_gguf_metadata

    with _alone(path):
        return read_gguf_metadata(str(path))[0].get("general.license")


def save_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of a GGUF file into a checkpoint folder, as tokenizer.json and its settings."""
    read_tokenizer(path).save_pretrained(folder)
