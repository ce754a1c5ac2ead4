"""Hand an exported checkpoint to vLLM or SGLang: check it, print or run their command, write a compose file.

The commands and images are those of the release and of the engines' own pages for it; what is not in them is not
passed, so that their defaults apply. Sources, read in 2026: the README of DeepSeek-V3.2-Exp (SGLang's images, and its
command on H200), SGLang's announcement of its support (MI350, NPUs) and its pages on Ascend NPUs and AMD GPUs (devices
and volumes of a container), vLLM's recipe for DeepSeek-V3.2 and its page on Docker.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tokensieve.checkpoint import Header, exportable, read_config, tensor_headers
from tokensieve.config import UserError
from tokensieve.cost import index_bytes, latent_bytes, shape_of
from tokensieve.engine.runner import QUANTIZED_ENTRY
from tokensieve.families import ModelConfig, family_of, is_sparse, model_config
from tokensieve.model import model_path
from tokensieve.serve.refusals import config_reasons, split_reasons, tensor_reasons, tokenizer_reasons

log = logging.getLogger("tokensieve")

LABELS = {"vllm": "vLLM", "sglang": "SGLang"}
VLLM_IMAGE = "vllm/vllm-openai:latest"
USABLE = 0.9  # of a device's memory: what both leave to weights and cache, about; the rest is for activations
CONTAINER_MODEL = "/model"

# Of a layer, what tensor parallelism repeats on every device, and what attention by requests repeats besides.
REPEATED = (".indexer.", ".q_a_proj.", ".kv_a_proj_with_mqa.", "norm.", ".mlp.gate.")
REPEATED_BY_REQUESTS = (".self_attn.", "embed_tokens.")


@dataclass(frozen=True)
class Hardware:
    """One machine. memory: bytes of a device. image, sparse, arguments, environment: SGLang's for it."""

    label: str
    devices: int
    memory: float
    image: str
    arguments: tuple[str, ...] = ()
    sparse_arguments: tuple[str, ...] = ()
    sparse_environment: Mapping[str, str] = field(default_factory=dict)
    fp8: bool = True


_NPU = (
    *("--attention-backend", "ascend", "--mem-fraction-static", "0.85"),
    *("--chunked-prefill-size", "32768", "--disable-radix-cache"),
)
HARDWARE = {
    "h200": Hardware("H200", 8, 141e9, "lmsysorg/sglang:dsv32"),
    "mi350": Hardware(
        "MI350",
        8,
        288e9,
        "lmsysorg/sglang:dsv32-rocm",
        sparse_arguments=(
            *("--disable-cuda-graph", "--mem-fraction-static", "0.85", "--page-size", "64"),
            *("--nsa-prefill", "tilelang", "--nsa-decode", "aiter"),
        ),
        sparse_environment={
            "SGLANG_NSA_FUSE_TOPK": "false",
            "SGLANG_NSA_KV_CACHE_STORE_FP8": "false",
            "SGLANG_NSA_USE_REAL_INDEXER": "true",
            "SGLANG_NSA_USE_TILELANG_PREFILL": "True",
        },
    ),
    "npu-a2": Hardware("A2 NPU", 8, 64e9, "lmsysorg/sglang:dsv32-a2", _NPU, fp8=False),
    "npu-a3": Hardware("A3 NPU", 16, 64e9, "lmsysorg/sglang:dsv32-a3", _NPU, fp8=False),
}


@dataclass(frozen=True)
class Deployment:
    """A checkpoint and how an engine serves it. weights, cache: bytes on one device, for one sequence of `context` tokens."""

    engine: str
    folder: Path
    gpus: int
    hardware: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    weights: float
    cache: float
    context: int

    def command(self, model: str | None = None, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The words of the command, for the checkpoint's folder unless another place is given."""
        return (*self.program, model or str(self.folder), *more, *self.arguments)

    def line(self) -> str:
        """The command as a shell reads it."""
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(self.command())])

    def estimate(self) -> str:
        return (
            f"{_gigabytes(self.weights + self.cache)} on each of {self.gpus} {HARDWARE[self.hardware].label} of "
            f"{_gigabytes(HARDWARE[self.hardware].memory)}: {_gigabytes(self.weights)} of weights, "
            f"{_gigabytes(self.cache)} of cache for one sequence of {self.context:,} tokens"
        )


def deploy(
    engine: str,
    model: str,
    gpus: int = 8,
    hardware: str = "h200",
    context: int | None = None,
    options: Sequence[str] = (),
    compose: Path | None = None,
    run: bool = False,
) -> None:
    """`plan`, then write the compose file if one is asked for, and print the command or become it.

    Raises UserError as `plan` does, and where a file stands already or the program is not installed.
    """
    found = plan(engine, model, gpus, hardware, context, options)
    log.info("%s: about %s", found.folder, found.estimate())
    if compose is not None:
        write_compose(found, compose)
        log.info("%s: start it with docker compose -f %s up", compose, shlex.quote(str(compose)))
    if run:
        become(found)
    print(found.line())


def plan(
    engine: str,
    model: str,
    gpus: int = 8,
    hardware: str = "h200",
    context: int | None = None,
    options: Sequence[str] = (),
) -> Deployment:
    """How `engine` serves the checkpoint `model` (a folder, a bundled name or a hub id) on `gpus` devices of one machine.

    context: tokens of the longest sequence, the model's own unless given. options: handed to the engine as they are.
    Raises UserError with every reason why it could not, one an argument.
    """
    for name, known in ((engine, LABELS), (hardware, HARDWARE)):
        if name not in known:
            raise UserError(f"{name!r} is not known here; choose one of {', '.join(known)}")
    machine = HARDWARE[hardware]
    if engine == "vllm" and hardware != "h200":
        raise UserError(f"vLLM is set up for h200 here, not for {hardware}; use sglang for it")
    folder = model_path(model).absolute()
    raw = read_config(folder)
    config = model_config(raw)
    family_of(config).check(config)
    by_requests = engine == "sglang" and hardware == "h200" and gpus > 1
    reasons = config_reasons(raw)
    reasons += [reason for reason in exportable(config) if LABELS[engine] in reason.partition(":")[0]]
    headers: dict[str, Header] = {}
    try:
        headers = tensor_headers(folder, config)
    except UserError as error:
        reasons.append(str(error))
    if headers:
        reasons += tensor_reasons(folder, raw, config, headers)
    if raw.get("quantization_config") and not machine.fp8:
        reasons.append(f"{machine.label}s have no FP8; save the checkpoint in bfloat16 (tokensieve.save)")
    reasons += tokenizer_reasons(folder, config)
    reasons += split_reasons(raw, config, gpus, 1 if by_requests else gpus)
    if gpus > machine.devices:
        reasons.append(f"--gpus {gpus}: the command is for one machine, which has {machine.devices} {machine.label}")
    longest = config.max_position_embeddings
    if context is not None and context > longest:
        reasons.append(f"--context {context}: the model has {longest} positions; give at most as many")
    sparse = is_sparse(config)
    shape = shape_of(config)
    per_token = latent_bytes(shape, "fp8" if engine == "vllm" and sparse else "bf16") + index_bytes(shape, "fp8")
    found = Deployment(
        engine=engine,
        folder=folder,
        gpus=gpus,
        hardware=hardware,
        program=("vllm", "serve") if engine == "vllm" else ("python", "-m", "sglang.launch_server", "--model"),
        arguments=(*_arguments(engine, raw, config, gpus, hardware, context), *options),
        environment=machine.sparse_environment if engine == "sglang" and sparse else {},
        weights=_weights(headers, config.num_hidden_layers, gpus, by_requests),
        cache=shape.layers * per_token * (context or longest),
        context=context or longest,
    )
    if found.weights + found.cache > USABLE * machine.memory:
        reasons.append(
            f"too large: {found.estimate()}; about {USABLE:.0%} of a device can be used; "
            "take more --gpus, a shorter --context or other --hardware"
        )
    if reasons:
        raise UserError(*reasons)
    if raw.get("index_dtype", "fp8") != "fp8":
        log.warning("%s scores in FP8, not in the model's index_dtype: a few selections may differ", LABELS[engine])
    return found


def _arguments(
    engine: str, raw: Mapping[str, Any], config: ModelConfig, gpus: int, hardware: str, context: int | None
) -> list[str]:
    machine, sparse = HARDWARE[hardware], is_sparse(config)
    if engine == "vllm":
        arguments = ["--tensor-parallel-size", str(gpus)]
    else:
        arguments = ["--tp", str(gpus)]
        if hardware == "h200" and gpus > 1:
            arguments += ["--dp", str(gpus), "--enable-dp-attention"]
        arguments += [*machine.arguments, *(machine.sparse_arguments if sparse else ())]
        if not sparse and machine.fp8 and family_of(config).entry(config) != QUANTIZED_ENTRY:
            arguments += ["--attention-backend", "triton"]  # the default kernels are built for these widths alone
    stored = str(raw.get("torch_dtype") or raw.get("dtype") or "").removeprefix("torch.")
    if stored != "bfloat16":  # SGLang would take float16 for float32, which the sparse kernels do not read
        arguments += ["--dtype", "bfloat16"]
    if context is not None:
        arguments += ["--max-model-len" if engine == "vllm" else "--context-length", str(context)]
    return arguments


def _weights(headers: Mapping[str, Header], layers: int, gpus: int, by_requests: bool) -> float:
    """Bytes of weights on one device. Floats become bfloat16 when they are read; MTP layers are not read."""
    repeated = REPEATED + REPEATED_BY_REQUESTS if by_requests else REPEATED
    total = 0.0
    for name, header in headers.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < layers:
            width = 1 if header.dtype == "F8_E4M3" else 4 if name.endswith("_scale_inv") else 2
            parts = 1 if any(part in name for part in repeated) else gpus
            total += math.prod(header.shape) * width / parts
    return total


def compose_file(found: Deployment) -> dict[str, Any]:
    """The contents of a compose file with one service: the engine in its image, the checkpoint mounted read-only.

    The server answers this machine only: neither engine asks who calls.
    """
    port = 8000 if found.engine == "vllm" else 30000
    npu = found.hardware.startswith("npu")
    volumes = {str(found.folder): CONTAINER_MODEL}
    # SGLang listens to its own loopback unless told otherwise, which in a container nobody reaches.
    listen = ("--host", "0.0.0.0", "--port", str(port)) if found.engine == "sglang" and not npu else ()
    service: dict[str, Any] = {
        "image": VLLM_IMAGE if found.engine == "vllm" else HARDWARE[found.hardware].image,
        "entrypoint": list(found.command(CONTAINER_MODEL, listen)),
        "ipc": "host",
    }
    if found.environment:
        service["environment"] = dict(found.environment)
    if npu:  # the devices want the host's network and its driver
        service |= {"privileged": True, "network_mode": "host", "shm_size": "16gb"}
        names = [*(f"davinci{i}" for i in range(found.gpus)), "davinci_manager", "hisi_hdc"]
        service["devices"] = [f"/dev/{name}:/dev/{name}" for name in names]
        driver = (
            "/usr/local/sbin",
            "/usr/local/Ascend/driver",
            "/usr/local/Ascend/firmware",
            "/etc/ascend_install.info",
        )
        volumes |= {path: path for path in driver}
    else:
        service["ports"] = [f"127.0.0.1:{port}:{port}"]
    if found.hardware == "mi350":
        service |= {"devices": ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"], "group_add": ["video"]}
        service |= {"cap_add": ["SYS_PTRACE"], "security_opt": ["seccomp=unconfined"]}
    if found.hardware == "h200":
        devices = [{"driver": "nvidia", "count": found.gpus, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    service["volumes"] = [
        {"type": "bind", "source": source, "target": target, "read_only": True} for source, target in volumes.items()
    ]
    return {"services": {found.engine: service}}


def write_compose(found: Deployment, path: Path) -> None:
    """Write the compose file, as JSON, which is YAML too: so it takes no library. UserError where `path` stands already."""
    if path.exists():
        raise UserError(f"{path} exists already; name another file, or remove it first")
    if any(file.is_symlink() for file in found.folder.iterdir()):
        raise UserError(
            f"{found.folder} holds links, which lead nowhere in a container; copy it with cp -rL and name the copy"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(compose_file(found), indent=2, ensure_ascii=False).replace("$", "$$")  # compose fills in $NAME
    path.write_text(text + "\n", encoding="utf-8")


def become(found: Deployment) -> NoReturn:
    """Replace this process by the engine, so that signals and the exit status are its own. UserError where it is not installed."""
    command = found.command()
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on PATH; install {LABELS[found.engine]} in the active environment, or write a container "
            "with --compose FILE"
        )
    sys.stdout.flush()
    os.execvpe(command[0], command, os.environ | found.environment)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
