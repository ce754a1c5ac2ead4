"""Checkpoints of a run: written atomically, rotated, and sufficient to continue as if nothing had happened.

A checkpoint is a folder `step-000120` of the run. It holds the model in Hugging Face format (under LoRA the adapter in
PEFT's), the optimizer's moments and the random state as safetensors, and state.json (step, phases, fingerprint of
config and data, checksums of the safetensors). Data order needs no state: a sequence is a function of seed and number.
"""

import json
import shutil
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokensieve import checkpoint
from tokensieve.config import PhaseConfig, UserError
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.loading import copy_tokenizer
from tokensieve.train.lora import save_adapter
from tokensieve.train.parallelize import as_sharded, whole
from tokensieve.train.tracking import METRICS

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"  # of a checkpoint
CONFIG = "config.json"  # of the run
NAMED = 3  # the most settings that a message names


@dataclass(frozen=True)
class RunState:
    step: int  # finished steps
    fingerprint: str  # of the config and the data
    phases: tuple[PhaseConfig, ...] = ()  # of that config; empty in checkpoints of earlier versions
    checksums: dict[str, int] = field(default_factory=dict)  # CRC-32 by file; empty in those too


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


class WholeState(NamedTuple):
    """The tensors of a checkpoint: of the model by name, and of the optimizer by name|moment."""

    model: dict[str, Tensor]
    moments: dict[str, Tensor]


def whole_state(model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, keep: bool = True) -> WholeState:
    """The tensors of a checkpoint, gathered from the ranks that share them. All ranks call this.

    keep: on this rank; otherwise gathered tensors are empty.
    """

    def gathered(tensor: Tensor) -> Tensor:
        all_of_it = whole(tensor)
        if all_of_it is tensor:
            return tensor.contiguous()
        return all_of_it.cpu() if keep else torch.empty(0)

    names = {id(p): n for n, p in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}|{key}": gathered(torch.as_tensor(value))
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return WholeState({name: gathered(tensor) for name, tensor in model.state_dict().items()}, moments)


def save_state(
    run: Path,
    model: DecoderForCausalLM,
    tensors: WholeState,
    state: RunState,
    keep: int,
    shard_bytes: float = 5e9,
    adapter: Any = None,
) -> Path:
    """Writes a checkpoint and removes the oldest ones beyond `keep`.

    adapter: PEFT's model; the checkpoint then holds what it trains instead of the model.

    UserError on a full disk, with all older checkpoints intact.
    """
    folder = folder_of(run, state.step)
    with checkpoint.replacing_folder(folder) as new:
        if adapter is None:
            checkpoint.save_tensors(new, model.config.to_dict(), tensors.model.items(), model.extras, shard_bytes)
        else:
            save_adapter(adapter, new)
        moments = dict(tensors.moments)
        moments["rng|cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            moments["rng|cuda"] = torch.cuda.get_rng_state()
        save_file(moments, new / OPTIMIZER)
        checksums = {path.name: _checksum(path) for path in sorted(new.glob("*.safetensors"))}
        (new / STATE).write_text(json.dumps(asdict(replace(state, checksums=checksums))))
        if getattr(model, "folder", None) is not None:
            copy_tokenizer(Path(model.folder), new)
    source = getattr(model, "folder", None)
    adapted = None if adapter is None else model.config.to_dict()
    checkpoint.write_card(folder, None if source is None else Path(source), adapted=adapted)
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


def newest(run: Path, resume: bool) -> Path | None:
    """The checkpoint that a run in this folder continues from; None if it begins.

    Raises:
        UserError: without `resume`, the folder holds a run, finished or not, or a checkpoint's config.json.
    """
    done = checkpoints(run)
    if resume or not (done or (run / METRICS).exists() or (run / CONFIG).exists()):
        return done[-1] if done else None
    if not done and not (run / METRICS).exists():
        raise UserError(f"{run} holds a {CONFIG} already, which a run would replace; name another folder")
    reached = f"up to {done[-1].name}" if done else "without a checkpoint so far"
    raise UserError(f"{run} holds a run already ({reached}); add --resume to continue it, or name another folder")


def read_state(folder: Path) -> RunState:
    """The state of the checkpoint `folder`. UserError if one of its files is damaged."""
    try:
        raw: dict[str, Any] = json.loads((folder / STATE).read_text())
        phases = tuple(PhaseConfig(**phase) for phase in raw.get("phases", ()))
        state = RunState(raw["step"], raw["fingerprint"], phases, dict(raw.get("checksums", {})))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(folder, STATE, f"cannot be read ({error})") from error
    for name, checksum in state.checksums.items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise _damaged(folder, name, f"cannot be read ({error.strerror})") from error
        if found != checksum:
            raise _damaged(folder, name, "is damaged: its content has changed since it was saved")
    return state


def _damaged(folder: Path, name: str, how: str) -> UserError:
    return UserError(f"{folder / name}: {how}; remove {folder} to resume from the checkpoint before it")


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the losses; others, such as the run folder or the saving interval, become constants."""
    data = settings["data"] | {"cache": ""}
    lora = settings.get("lora")
    # Checkpoints from before these settings have none of them.
    rest = {k: v for k, v in settings.items() if k not in ("lora", "context_parallel") and (k, v) != ("kl_every", 1)}
    return (rest | {"lora": lora | {"merge": True}} if lora else rest) | {
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
    other = _other(here, there)
    if not other:
        return "the data differ from those of the run that is there: a source's text or the tokenizer has changed"
    differences = "; ".join(
        f"{name} is {_value(here, name)}, in the run that is there {_value(there, name)}" for name in other[:NAMED]
    )
    return differences + (f"; {len(other) - NAMED} more settings differ" if len(other) > NAMED else "")


def began_as(run: Path, settings: dict[str, Any]) -> bool:
    """Whether the run of this folder, which has no checkpoint yet, has the same settings; True if there is none."""
    if not (run / CONFIG).exists():
        return True
    try:
        there = decisive(json.loads((run / CONFIG).read_text()))
    except (ValueError, KeyError, TypeError, OSError):
        return False  # `what_differs` says it
    return not _other(_by_name(decisive(settings)), _by_name(there))


def _other(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [name for name in here | there if here.get(name) != there.get(name)]


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
    try:
        tensors = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise _damaged(folder, OPTIMIZER, f"cannot be read ({error})") from error
    torch.set_rng_state(tensors.pop("rng|cpu"))
    cuda = tensors.pop("rng|cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, moment = key.partition("|")
        parameter = parameters[name]
        if moment != "step":
            value = as_sharded(value, parameter)
        elif optimizer.param_groups[0].get("fused"):  # else the optimizer keeps the step count on the CPU
            value = value.to(parameter.device)
        optimizer.state[parameter][moment] = value
