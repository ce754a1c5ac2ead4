"""How an engine serves a checkpoint: its command, and the memory that this takes on each device."""

import logging
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokensieve.checkpoint import Header, exportable, read_config, tensor_headers
from tokensieve.config import UserError
from tokensieve.cost import index_bytes, latent_bytes, shape_of
from tokensieve.deploy.hardware import HARDWARE, Hardware
from tokensieve.deploy.refusals import (
    config_reasons,
    has_chat_template,
    split_reasons,
    tensor_reasons,
    tokenizer_reasons,
)
from tokensieve.engine.runner import QUANTIZED_ENTRY
from tokensieve.families import ModelConfig, family_of, is_sparse, model_config
from tokensieve.model import model_path

log = logging.getLogger("tokensieve")

LABELS = {"vllm": "vLLM", "sglang": "SGLang"}
# For chats of DeepSeek-V3.2, which has no template: the options for the engine's own encoder, and for its parsers.
ENCODER = {"vllm": ("--tokenizer-mode", "deepseek_v32"), "sglang": ()}
PARSERS = {
    "vllm": (
        *("--reasoning-parser", "deepseek_v3"),
        *("--tool-call-parser", "deepseek_v32", "--enable-auto-tool-choice"),
    ),
    "sglang": ("--reasoning-parser", "deepseek-v3", "--tool-call-parser", "deepseekv32"),
}
USABLE = 0.9  # share of a device's memory that both engines give to weights and cache; the rest is for activations

# Parts of a layer that tensor parallelism repeats on every device, and those that data-parallel attention repeats too.
REPEATED = (".indexer.", ".q_a_proj.", ".kv_a_proj_with_mqa.", "norm.", ".mlp.gate.")
REPEATED_BY_REQUESTS = (".self_attn.", "embed_tokens.")


@dataclass(frozen=True)
class Target:
    """Where a checkpoint is to be served. context: tokens of the longest sequence; None: all that the model has.

    Raises UserError for an engine or hardware that is not known here, and for a pair that does not go together.
    """

    engine: str
    gpus: int
    hardware: str
    context: int | None

    def __post_init__(self) -> None:
        for name, known in ((self.engine, LABELS), (self.hardware, HARDWARE)):
            if name not in known:
                raise UserError(f"{name!r} is not known here; choose one of {', '.join(known)}")
        if self.engine == "vllm" and self.machine.maker != "nvidia":
            raise UserError(f"vLLM is set up for h200 and b200 here, not for {self.hardware}; use sglang for it")

    @property
    def label(self) -> str:
        return LABELS[self.engine]

    @property
    def program(self) -> tuple[str, ...]:
        """The command's words before the checkpoint."""
        return ("vllm", "serve") if self.engine == "vllm" else ("python", "-m", "sglang.launch_server", "--model")

    @property
    def machine(self) -> Hardware:
        return HARDWARE[self.hardware]

    @property
    def by_requests(self) -> bool:
        """Whether attention is data parallel: every device has all heads, and attends for requests of its own."""
        return self.engine == "sglang" and self.machine.maker == "nvidia" and self.gpus > 1


@dataclass(frozen=True)
class Deployment:
    """A checkpoint and how an engine serves it.

    parsers: options that separate thoughts and tool calls from the text, for chats that the engine itself encodes.
    weights, cache: bytes on one device; the cache is that of one sequence of `context` tokens.
    """

    engine: str
    folder: Path
    gpus: int
    hardware: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    parsers: tuple[str, ...]
    weights: float
    cache: float
    context: int

    def command(self, model: str | None = None, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The words of the command. model: the checkpoint's path, its folder by default. more: options before ours."""
        return (*self.program, model or str(self.folder), *more, *self.arguments)

    def line(self) -> str:
        """The command as a shell reads it."""
        return shlex.join(self.command())

    def estimate(self) -> str:
        machine = HARDWARE[self.hardware]
        return (
            f"{_gigabytes(self.weights + self.cache)} on each of {self.gpus} {machine.label} of "
            f"{_gigabytes(machine.memory)}: {_gigabytes(self.weights)} of weights, "
            f"{_gigabytes(self.cache)} of cache for one sequence of {self.context:,} tokens"
        )


def plan(
    engine: str,
    model: str,
    gpus: int = 8,
    hardware: str = "h200",
    context: int | None = None,
    options: Sequence[str] = (),
) -> Deployment:
    """How `engine` serves a checkpoint on `gpus` devices of one machine.

    model: a folder, a bundled name or a hub id.
    context: tokens of the longest sequence; by default the model's own. options: passed to the engine unchanged.
    Raises UserError with every reason why the engine could not serve it, one reason an argument.
    """
    target = Target(engine, gpus, hardware, context)
    folder = model_path(model).absolute()
    if folder.is_file():
        raise UserError(
            f"{folder}: a GGUF file, and deploy plans for folders; write one with "
            f"tokensieve.save(tokensieve.load(FILE), FOLDER), or {_serve(folder)}"
        )
    raw = read_config(folder)
    config = model_config(raw)
    family = family_of(config)
    family.check(config)
    if not family.engine_fields:
        raise UserError(*_without_plan(target, folder, config))
    headers, reasons = _refusals(target, folder, raw, config)
    sparse = family.sparse
    encoded = family.engines_encode_chat and not has_chat_template(folder)
    shape = shape_of(config)
    per_token = latent_bytes(shape, "fp8" if engine == "vllm" and sparse else "bf16") + index_bytes(shape, "fp8")
    tokens = context or config.max_position_embeddings
    deployment = Deployment(
        engine=engine,
        folder=folder,
        gpus=gpus,
        hardware=hardware,
        program=target.program,
        arguments=(*_arguments(target, raw, config), *(ENCODER[engine] if encoded else ()), *options),
        parsers=PARSERS[engine] if encoded and not options else (),
        weights=_weights(headers, config.num_hidden_layers, target),
        cache=shape.layers * per_token * tokens,
        context=tokens,
    )
    if deployment.weights + deployment.cache > USABLE * target.machine.memory:
        reasons.append(
            f"too large: {deployment.estimate()}; about {USABLE:.0%} of a device can be used; "
            "take more --gpus, a shorter --context or other --hardware"
        )
    if reasons:
        raise UserError(*reasons)
    if raw.get("index_dtype", "fp8") != "fp8":
        log.warning("%s scores in FP8, not in the model's index_dtype: a few selections may differ", target.label)
    return deployment


def _without_plan(target: Target, folder: Path, config: ModelConfig) -> list[str]:
    """Why there is no plan for a family: the engine does not run it, or nobody has planned it yet."""
    by_hand = shlex.join((*target.program, str(folder)))
    reason = f"{folder}: deploy plans DeepSeek models only so far, not {family_of(config).model_type}; "
    return _engine_reasons(target, folder, config) or [reason + f"try {by_hand}, or {_serve(folder)}"]


def _engine_reasons(target: Target, folder: Path, config: ModelConfig) -> list[str]:
    """Why the engine does not run such a model, whatever is in the folder."""
    reasons = [reason for reason in exportable(config) if target.label in reason.partition(":")[0]]
    return [f"{reason}; {_serve(folder)} serves it as it is" for reason in reasons]


def _serve(folder: Path) -> str:
    return shlex.join(("tokensieve", "serve", str(folder)))


def _refusals(
    target: Target, folder: Path, raw: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Header], list[str]]:
    """The tensors' headers, empty if they cannot be read; and every reason not to serve except memory."""
    machine, reasons = target.machine, config_reasons(raw)
    headers: dict[str, Header] = {}
    reasons += _engine_reasons(target, folder, config)
    try:
        headers = tensor_headers(folder, config)
    except UserError as error:
        reasons.append(str(error))
    if headers:
        reasons += tensor_reasons(folder, raw, config, headers)
    if raw.get("quantization_config") and not machine.fp8:
        reasons.append(f"{machine.label}s have no FP8; save the checkpoint in bfloat16 (tokensieve.save)")
    reasons += tokenizer_reasons(folder, config)
    reasons += split_reasons(raw, config, target.gpus, 1 if target.by_requests else target.gpus)
    if target.gpus > machine.devices:
        one_machine = f"the command is for one machine, which has {machine.devices} {machine.label}"
        reasons.append(f"--gpus {target.gpus}: {one_machine}")
    longest = config.max_position_embeddings
    if target.context is not None and target.context > longest:
        reasons.append(f"--context {target.context}: the model has {longest} positions; give at most as many")
    return headers, reasons


def _arguments(target: Target, raw: Mapping[str, Any], config: ModelConfig) -> list[str]:
    machine, sparse = target.machine, is_sparse(config)
    if target.engine == "vllm":
        arguments = ["--tensor-parallel-size", str(target.gpus)]
    else:
        arguments = ["--tp", str(target.gpus)]
        if target.by_requests:
            arguments += ["--dp", str(target.gpus), "--enable-dp-attention"]
        arguments += [*machine.arguments, *(machine.sparse_arguments if sparse else ())]
        if not sparse and machine.fp8 and family_of(config).entry(config) != QUANTIZED_ENTRY:
            arguments += ["--attention-backend", "triton"]  # the default kernels are built for these widths only
    stored = str(raw.get("torch_dtype") or raw.get("dtype") or "").removeprefix("torch.")
    if stored != "bfloat16":  # SGLang would read float32 as float16, which the sparse kernels do not support
        arguments += ["--dtype", "bfloat16"]
    if target.context is not None:
        arguments += ["--max-model-len" if target.engine == "vllm" else "--context-length", str(target.context)]
    return arguments


def _weights(headers: Mapping[str, Header], layers: int, target: Target) -> float:
    """Bytes of weights on one device. Engines read floats as bfloat16, and do not read MTP layers."""
    parts_of_names = REPEATED + REPEATED_BY_REQUESTS if target.by_requests else REPEATED
    repeated = re.compile("|".join(map(re.escape, parts_of_names)))
    total = 0.0
    for name, header in headers.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            width = 1 if header.dtype == "F8_E4M3" else 4 if name.endswith("_scale_inv") else 2
            parts = 1 if repeated.search(name) else target.gpus
            total += math.prod(header.shape) * width / parts
    return total


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
