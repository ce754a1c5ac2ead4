"""GGUF files as checkpoints: transformers reads them, weights multiplied out, config and tokenizer included.

The package gguf decodes the file, and transformers undoes what llama.cpp's conversion did to names and layouts. What
transformers would drop without a word is refused here: scaled positions, tensors that are missing, parts of a file.
"""

import importlib.util
import io
import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from tokensieve.checkpoint.names import FLOAT32_SUFFIXES
from tokensieve.config import UserError
from tokensieve.families import family_of
from tokensieve.files import is_gguf

__all__ = ["is_gguf", "load_tensors", "read_config", "read_licence", "read_tokenizer", "save_tokenizer"]

_ORIGINAL = "use the safetensors that it was made from"
_FAULTS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, OSError, struct.error)
_PLAIN = {0: "float32", 1: "float16"}  # `general.file_type` of files whose weights are not quantized


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
    are scaled, and one part of a model in several files.
    """
    from transformers import AutoConfig

    with _alone(path) as source:
        from transformers.integrations.gguf import read_gguf_metadata

        metadata, names = read_gguf_metadata(str(path))
        raw = AutoConfig.from_pretrained(**source).to_dict()
    family_of(raw, str(path))
    scaling = [key for key, value in metadata.items() if key.endswith(".rope.scaling.type") and value != "none"]
    scaling += [key for key in metadata if key.endswith((".rope.scaling.factor", ".rope.scale_linear"))]
    scaling += [name for name in names if name.startswith("rope_")]
    if scaling:
        raise UserError(f"{path}: its positions are scaled ({scaling[0]}), which transformers drops; {_ORIGINAL}")
    if metadata.get("split.count", 1) > 1:
        raise UserError(f"{path}: one part of a split model; join them first (llama-gguf-split --merge)")
    bos, eos, eot, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding"))
    ends = sorted({token for token in (eos, eot) if token is not None})
    dtype = _PLAIN.get(metadata.get("general.file_type", -1), "bfloat16")
    return raw | {"dtype": dtype, "bos_token_id": bos, "eos_token_id": ends or None, "pad_token_id": pad}


def load_tensors(path: Path, config: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (in-memory name, tensor) as :func:`tokensieve.checkpoint.load_tensors` does, quantized weights multiplied
    out in ``dtype``.

    Raises UserError for a damaged file, a quantization that transformers does not read, and missing tensors.
    """
    from transformers import AutoModelForCausalLM

    with (
        _alone(path) as source,
        redirect_stderr(io.StringIO()),
    ):  # transformers' bars, and its report of what is missing
        model, report = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    lacking = sorted({*report["missing_keys"], *report["mismatched_keys"]} - {"lm_head.weight"})
    if lacking:
        raise UserError(f"{path}: {len(lacking)} tensors are missing or misshapen, {lacking[0]} the first; {_ORIGINAL}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield name, tensor.to(torch.float32 if name.endswith(FLOAT32_SUFFIXES) else dtype)


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
