"""Checkpoints of a run: sufficient to continue as if nothing had happened.

A checkpoint is a folder `step-000120` of the run. It holds the model in Hugging Face format (under LoRA the adapter in
PEFT's), the optimizer's moments and the random state as safetensors, and state.json (step, phases, fingerprint of
config and data, checksums of the safetensors). Data order needs no state: a sequence is a function of seed and number.
Tensors are whole, whatever number of ranks has written them (`tokensieve/train/saving.py`) or reads them.
"""

import json
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.nn import Parameter

from tokensieve.config import PhaseConfig, UserError
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.tracking import METRICS

OPTIMIZER, STATE = "optimizer", "state.json"  # of a checkpoint: the stem of some files, and a file
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


def read_state(folder: Path, mesh: Mesh) -> RunState:
    """The state of the checkpoint `folder`. Each rank checks some of its files. UserError if one is damaged."""
    try:
        raw: dict[str, Any] = json.loads((folder / STATE).read_text())
        phases = tuple(PhaseConfig(**phase) for phase in raw.get("phases", ()))
        state = RunState(raw["step"], raw["fingerprint"], phases, dict(raw.get("checksums", {})))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise damaged(folder, STATE, f"cannot be read ({error})") from error
    for name, checksum in list(state.checksums.items())[mesh.rank :: mesh.size]:
        try:
            found = checksum_of(folder / name)
        except OSError as error:
            raise damaged(folder, name, f"cannot be read ({error.strerror})") from error
        if found != checksum:
            raise damaged(folder, name, "is damaged: its content has changed since it was saved")
    return state


def damaged(folder: Path, name: str, how: str) -> UserError:
    """The error of a checkpoint one of whose files cannot be used."""
    return UserError(f"{folder / name}: {how}; remove {folder} to resume from the checkpoint before it")


def checksum_of(path: Path) -> int:
    """CRC-32 of a file's content."""
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
    free = ("lora", "context_parallel", "expert_parallel", "offload")
    defaults = (("kl_every", 1), ("budget", None))
    rest = {k: v for k, v in settings.items() if k not in free and (k, v) not in defaults}
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


def optimizer_tensors(model: DecoderForCausalLM, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter|moment, sharded as the parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}|{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def random_states(mesh: Mesh) -> dict[str, Tensor]:
    """The state of each kind of random numbers, (ranks, bytes) uint8. All ranks call this."""
    states = {"rng|cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng|cuda"] = torch.cuda.get_rng_state(mesh.device if mesh.device.type == "cuda" else "cuda")
    return {name: torch.stack(mesh.all_gather(state) if mesh.size > 1 else [state]) for name, state in states.items()}


def restore_optimizer(folder: Path, model: DecoderForCausalLM, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
    """Restores the moments, of which every rank reads its parts, and the random state. All ranks call this.

    The checkpoint may come from any number of ranks. A rank that it has no random state of takes another one's.
    UserError, on all ranks, if a file is damaged or missing on one of them.
    """
    parameters = dict(model.named_parameters())
    moments, random = mesh.agree(lambda: _read_headers(folder, parameters))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in one process that is right
            dcp.load(moments, storage_reader=HuggingFaceStorageReader(str(folder)))
    except dcp.CheckpointException as error:  # of all ranks
        reason, _ = next(iter(error.failures.values()))
        raise damaged(folder, f"{OPTIMIZER}*.safetensors", f"cannot be read ({reason})") from error
    # Copies, since torch reads a state from the begin of its storage.
    own = {kind: states[mesh.rank % len(states)].clone() for kind, states in random.items()}
    torch.set_rng_state(own["cpu"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    for key, value in moments.items():
        name, _, moment = key.partition("|")
        if moment == "step" and optimizer.param_groups[0].get("fused"):  # else the optimizer keeps it on the CPU
            value = value.to(parameters[name].device)
        optimizer.state[parameters[name]][moment] = value


def _read_headers(folder: Path, parameters: dict[str, Parameter]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Zeros for the moments that a checkpoint holds, divided as the parameters, and its random states."""
    moments: dict[str, Tensor] = {}
    random: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{OPTIMIZER}*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    name, _, moment = key.partition("|")
                    if name == "rng":
                        random[moment] = torch.atleast_2d(file.get_tensor(key))  # earlier ones are of one process
                    else:
                        like = parameters[name].detach()
                        moments[key] = torch.zeros(()) if moment == "step" else torch.zeros_like(like)
        except (SafetensorError, OSError) as error:
            raise damaged(folder, path.name, f"cannot be read ({error})") from error
    if "cpu" not in random:
        raise damaged(folder, f"{OPTIMIZER}*.safetensors", "missing, or without the random state")
    return moments, random
