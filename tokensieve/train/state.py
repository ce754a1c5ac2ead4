"""Checkpoints of a run: written atomically, rotated, and sufficient to continue as if nothing had happened.

A checkpoint is a folder `step-000120` of the run. It holds the model in Hugging Face format, the optimizer's moments
and the random state as safetensors, and state.json (step, fingerprint of config and data). Data order needs no state: a
sequence is a function of seed and number.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.loading import copy_tokenizer

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"  # of a checkpoint
CONFIG = "config.json"  # of the run
NAMED = 3  # the most settings that a message names


@dataclass(frozen=True)
class RunState:
    step: int  # finished steps
    fingerprint: str  # of the config and the data


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def save_state(
    run: Path,
    model: DecoderForCausalLM,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    keep: int,
    shard_bytes: float = 5e9,
) -> Path:
    """Writes a checkpoint and removes the oldest ones beyond `keep`.

    UserError on a full disk, with all older checkpoints intact.
    """
    folder = folder_of(run, state.step)
    names = {id(p): n for n, p in model.named_parameters()}
    with checkpoint.replacing_folder(folder) as new:
        checkpoint.save_tensors(new, model.config.to_dict(), model.state_dict().items(), model.extras, shard_bytes)
        tensors: dict[str, Tensor] = {}
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                tensors[f"{names[id(parameter)]}|{key}"] = torch.as_tensor(value).contiguous()
        tensors["rng|cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng|cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, new / OPTIMIZER)
        (new / STATE).write_text(json.dumps({"step": state.step, "fingerprint": state.fingerprint}))
        if getattr(model, "folder", None) is not None:
            copy_tokenizer(Path(model.folder), new)
    newest = checkpoints(run)[-max(1, keep) :]
    for old in run.glob("step-*"):
        if old.is_dir() and old not in newest:
            _leave(model, old, folder)
            (old / STATE).unlink(missing_ok=True)  # first, so that after a kill the rest does not look complete
            shutil.rmtree(old)
    return folder


def _leave(model: DecoderForCausalLM, old: Path, new: Path) -> None:
    """Points a resumed model to `new` for its tokenizer and carried tensors, if they are in `old`, soon removed."""
    if getattr(model, "folder", None) is not None and Path(model.folder).resolve() == old.resolve():
        model.folder = new
    if model.extras is not None and model.extras.folder == old.resolve():
        model.extras = replace(model.extras, folder=new.resolve())


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder that a kill left half-written has another name."""
    return sorted(p for p in run.glob("step-*") if (p / STATE).is_file())


def read_state(folder: Path) -> RunState:
    """The state of the checkpoint `folder`. UserError if the file is damaged."""
    try:
        raw: dict[str, Any] = json.loads((folder / STATE).read_text())
        return RunState(raw["step"], raw["fingerprint"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{folder / STATE}: cannot be read ({error}); remove {folder} to resume from the checkpoint before it"
        ) from error


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the losses; others, such as the run folder or the saving interval, become constants."""
    data = settings["data"] | {"cache": ""}
    return settings | {
        "out": "",
        "save_every": 0,
        "keep": 0,
        "log_every": 1,
        "workers": 0,
        "track": (),
        "device": "auto",
        "backend": "auto",
        "data": data,
    }


def what_differs(run: Path, settings: dict[str, Any]) -> str:
    """Why a run cannot continue with `settings`: the first that differ from its own config.json, with both values."""
    try:
        there = _by_name(decisive(json.loads((run / CONFIG).read_text())))
    except (ValueError, KeyError, TypeError, OSError) as error:
        return f"config or data differ from the run that is there, whose {CONFIG} cannot be read ({error})"
    here = _by_name(decisive(settings))
    other = [name for name in here | there if here.get(name) != there.get(name)]
    if not other:
        return "the data differ from those of the run that is there: a source's text or the tokenizer has changed"
    differences = "; ".join(
        f"{name} is {_value(here, name)}, in the run that is there {_value(there, name)}" for name in other[:NAMED]
    )
    return differences + (f"; {len(other) - NAMED} more settings differ" if len(other) > NAMED else "")


def _by_name(settings: Any, name: str = "") -> dict[str, Any]:
    """Flat settings: {"optimizer.lr": 0.001, "phases.0.steps": 200, ...}."""
    if isinstance(settings, list | tuple) and settings:
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict):
        return {name: list(settings) if isinstance(settings, tuple) else settings}
    return {k: v for key, value in settings.items() for k, v in _by_name(value, f"{name}.{key}".lstrip(".")).items()}


def _value(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not given"


def restore_optimizer(folder: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Restores moments and random state from the checkpoint `folder`. UserError if the file is damaged."""
    path = folder / OPTIMIZER
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove {folder} to resume from the checkpoint before it"
        ) from error
    torch.set_rng_state(tensors.pop("rng|cpu"))
    cuda = tensors.pop("rng|cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, moment = key.partition("|")
        parameter = parameters[name]
        # The step count stays on the CPU if the optimizer keeps it there.
        stays = moment == "step" and not _fused(optimizer)
        optimizer.state[parameter][moment] = value if stays else value.to(parameter.device)


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))
