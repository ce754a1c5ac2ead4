"""Checkpoint folders and models of any class: finding a folder, filling a model from it, writing a model into one."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.families import ModelConfig, model_config
from tokensieve.files import is_gguf, known_folder
from tokensieve.model import fp8

Model = TypeVar("Model", bound=nn.Module)


def model_path(name: str | Path) -> Path:
    """The folder of a checkpoint, or its GGUF file: a path as given, a bundled model by name (`base`, `sparse`), one
    that a package brings (`smollm2`), or one of the hub's.

    A hub id (owner/name) is the folder in the Hugging Face cache.
    """
    return known_folder(name) or _hub_folder(str(name))


def _hub_folder(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, ignore_patterns=list(checkpoint.OTHER_WEIGHTS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {repository!r}: not a folder here and not to be had from the hub ({reason}); download it first"
        ) from error


def read(
    kind: type[Model],
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: ModelConfig | None = None,
    keep_fp8: bool = False,
) -> Model:
    """A model of class `kind` from a folder; the other arguments as for `load`."""
    folder = model_path(name)
    if config is None:
        config = model_config(checkpoint.read_config(folder))
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model: Any = kind(config)
        block_names = fp8.holdable(model, checkpoint.block_tensors(folder, config)) if keep_fp8 else set()
        fp8.hold(model, block_names)
    tensors = checkpoint.load_tensors(folder, config, dtype, block_names)
    fill(model, ((name, tensor.to(device)) for name, tensor in tensors))
    model.extras = checkpoint.mtp_tensors(folder, config)
    came_from(model, folder)
    return model.eval()


def stored_dtype(name: str | Path) -> torch.dtype | None:
    """The dtype that config.json gives to the weights of a folder or file; None if it names none of torch's."""
    raw = checkpoint.read_config(model_path(name))
    kind = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return kind if isinstance(kind, torch.dtype) else None


def fitting_device(device_map: Any) -> torch.device:
    """The one device that a `device_map` of transformers names: "auto" is a GPU if there is one; None is the CPU.

    UserError for a map of parts to devices, and for a device that torch does not know.
    """
    whole = device_map.get("", device_map) if isinstance(device_map, dict) else device_map
    if whole is None or whole == "auto":
        return torch.device("cuda" if whole and torch.cuda.is_available() else "cpu")
    try:
        return torch.device(whole)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"device_map {device_map!r}: a model lies on one device; use 'auto', or a device such as 'cuda:0'"
        ) from error


def came_from(model: Any, folder: Path) -> None:
    """Notes the folder that a model was read from, and the tokens that end an answer, which its files name."""
    model.folder = folder
    named = model.config.eos_token_id if is_gguf(folder) else checkpoint.read_end_tokens(folder)
    model.generation_config.eos_token_id = named or None


def fill(model: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Replaces the model's meta tensors by the tensors of the same names. UserError if one is missing or left over."""
    state = dict(tensors)
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, surplus = model.load_state_dict(state, strict=False, assign=True)
    if missing or surplus:
        raise UserError(
            f"checkpoint does not fit its config: missing {missing[:3]}, surplus {surplus[:3]}; "
            "use the config.json that belongs"
        )
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def check_savable(model: Any, state: dict[str, Tensor] | None = None) -> None:
    """UserError for a model whose tensors are not those of its config: FP8 blocks for inference, adapters, shards.

    state: the tensors to write, if they are not the model's own.
    """
    if fp8.holds(model):
        raise UserError("the model holds FP8 blocks for inference; to save it, load it again without keep_fp8")
    known = {*checkpoint.memory_layout(model.config), "lm_head.weight"}
    state = model.state_dict() if state is None else state
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        raise UserError(
            "the model is sharded over ranks; under a trainer, call trainer.save_model(FOLDER) on all of them"
        )
    foreign = [name for name in state if name not in known]
    if foreign:
        raise UserError(
            f"the model holds adapters or other tensors that its config does not know ({foreign[0]}); merge them first "
            "(PEFT: model.merge_and_unload()), or save the adapter by itself (PEFT: model.save_pretrained)"
        )


def save_into(model: Any, folder: Path, state: dict[str, Tensor], shard_bytes: float) -> None:
    """Writes the checkpoint of `state` into a folder that may hold other files, such as a trainer's state.

    UserError on a full disk.
    """
    check_savable(model, state)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary) / "model"
        checkpoint.save_tensors(new, model.config.to_dict(), state.items(), model.extras, shard_bytes)
        files = list(new.iterdir())
        for stale in folder.glob("model*.safetensors*"):
            stale.unlink()
        for path in files:
            os.replace(path, folder / path.name)
    source = getattr(model, "folder", None)
    if source is not None:
        checkpoint.copy_tokenizer(Path(source), folder)
    checkpoint.write_card(folder, None if source is None else Path(source))
