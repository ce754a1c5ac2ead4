"""Both stages of training on one GPU or several of one host: speed, memory, MFU, and what the ranks exchange.

    python benchmarks/many_gpus.py [--stack lite] [--tokens 32768] [--mode adapt] --out one.json
    torchrun --nproc-per-node 2 benchmarks/many_gpus.py --out two.json
    python benchmarks/many_gpus.py --show one.json two.json

A cell is a stack, a mode and a length of sequences. It runs the loop's own steps, with random weights and random
tokens of one document, float32 weights, gradients and moments under bfloat16 autocast, and whole layers recomputed.
"dense" is the dense model's adaptation, a step of which is one of pretraining. Sequences of 131072 tokens and more
(--share-from) are shared by all ranks (context parallelism: strong scaling); of shorter ones each rank has its own
(FSDP: weak scaling). In both, parameters are sharded over all ranks. Stacks:

- v3: DeepSeek-V3's widths with 32 experts and a vocabulary of 16384; one dense and one mixture layer.
- lite: four mixture layers of DeepSeek-V2-Lite with indexers of 16 heads, as benchmarks/gpu_training.py has them.
- grouped: four layers of Qwen3-8B's widths, 32 query heads over 8 groups, a vocabulary of 16384.

Seconds are those of the slowest rank, in the median of the timed steps. MFU: FLOPs as `tokensieve.cost.train_flops`
counts them, without what is recomputed, over the bf16 peaks of all GPUs. Exchanged: bytes that a rank receives in a
step, and the least that it could, in bfloat16. Of parameters that is each of other ranks' once, and each gradient once;
of tokens see benchmarks/context_parallel.py. Overlap: of rank 0's time in NCCL's kernels, which includes waiting for
other ranks, the share during which another kernel ran, in one profiled step beyond the timed ones.

The file is written before and after every cell, and cells that it holds are not run again. So after a run that was
killed, the same command goes on with the next cell. A cell that runs out of memory is reported in one line. If that
happens to all ranks at one place, they go on with the next cell, else they end with status 3.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from context_parallel import Received, bytes_a_token, counting, least, pack_of
from gpu_training import BareRun, Chosen
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tokensieve import cost
from tokensieve.config import OptimizerConfig, PhaseConfig, TrainConfig
from tokensieve.cost import train_memory, train_rates
from tokensieve.families import model_config
from tokensieve.files import write_json
from tokensieve.mesh import Mesh, join_mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.files import fill
from tokensieve.report.origin import environment
from tokensieve.train import starting
from tokensieve.train.learning import learning
from tokensieve.train.parallelize import empty_model
from tokensieve.train.stage import options_of

BEGIN = time.perf_counter()
HOPELESS = 1.3  # times a GPU's memory: a plan of more is not tried
ALONE = timedelta(seconds=60)  # after which a rank that has no memory left goes on without the others
ENDED = "began, and its process ended"

LONG = {"max_position_embeddings": 1 << 20, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
V3 = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 32, "vocab_size": 16384}
STACKS: dict[str, dict[str, Any]] = {
    "v3": {"model_type": "deepseek_v32"} | V3 | LONG,
    "lite": train_rates.LITE | {"num_hidden_layers": 4} | LONG,
    "grouped": train_rates.GROUPED | {"num_hidden_layers": 4, "vocab_size": 16384} | LONG,
}
TINY = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "index_topk": 16}
TINY |= {"index_n_heads": 4, "index_head_dim": 16, "num_attention_heads": 4}
TINY_LATENT = {"moe_intermediate_size": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
TINY_LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 8}
TINY_STACKS = {
    "v3": TINY | TINY_LATENT | {"q_lora_rank": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2},
    "lite": TINY | TINY_LATENT | {"num_experts_per_tok": 2},
    "grouped": TINY | {"num_key_value_heads": 2, "head_dim": 16, "index_rope_head_dim": 8},
}

# Each is a stage of the loop, and what `tokensieve.cost` calls it.
MODES = {"adapt": ("adapt", "adapt"), "warmup": ("warmup", "warmup"), "dense": ("adapt", "pretrain")}


@dataclass
class Cell:
    """missing: why it was not measured. Lists have an item for each step; bytes are a rank's in a step."""

    stack: str
    mode: str
    tokens: int  # of a sequence
    gpus: int
    context_parallel: int
    layers: int
    sequences: int = 1  # a step
    seconds: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    tflop: float = 0.0  # a step of all ranks
    mfu: float | None = None
    peak_gib: float = 0.0  # of the rank with most
    planned_gib: float = 0.0  # by tokensieve.cost.train_memory
    received: dict[str, int] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)
    nccl_seconds: float | None = None
    hidden: float | None = None  # share of them
    missing: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return self.stack, self.mode, self.tokens, self.gpus, self.context_parallel, self.layers

    def __str__(self) -> str:
        return f"{self.stack}, {self.mode}, {self.tokens} tokens, {self.gpus} ranks"


@dataclass(frozen=True)
class KeptMesh(Mesh):
    """Grids of the same axes are the same, so that all cells use the same communicators."""

    grids: dict[str, DeviceMesh] = field(default_factory=dict)

    def axes(self, **sizes: int) -> DeviceMesh:
        return self.grids.get(str(sizes)) or self.grids.setdefault(str(sizes), super().axes(**sizes))


class RandomRun(BareRun):
    """A run whose model has no tensors before it is sharded, and then random ones."""

    def __init__(self, config: TrainConfig, model_config: Any, mesh: Mesh):
        self._model_config = model_config
        super().__init__(config, rehearse=False, mesh=mesh)

    def _begin(self, model: DecoderForCausalLM | None) -> None:
        self.model = empty_model(self._model_config)
        self.options = replace(options_of(self.stage, self.config), context=self.division.context)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within the block the model is sharded and trains."""
        with self.divided():
            fill(self.model, random_parts(self.model, self.device))
            with learning(self.model, self.stage.learners(self.config)):
                self.optimizer = starting.make_optimizer(self.config, self.model, self.device)
                self.model.train()
                self.model.model.gradient_checkpointing = True
                yield


def random_parts(model: DecoderForCausalLM, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """This rank's parts of all tensors: matrices are normal, norms 1 and biases 0."""
    for name, like in model.state_dict().items():
        part = like.to_local() if isinstance(like, DTensor) else like
        own = torch.zeros(part.shape, dtype=part.dtype, device=device)
        if like.dim() > 1:
            own.normal_(0.0, 0.02)
        elif not name.endswith("bias"):
            own.fill_(1.0)
        if isinstance(like, DTensor):
            own = DTensor.from_local(
                own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        yield name, own


def say(mesh: Mesh, text: str) -> None:
    if mesh.leads:
        print(f"{time.perf_counter() - BEGIN:4.0f} s  {text}", file=sys.stderr, flush=True)


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def config_of(cell: Cell, device: torch.device) -> TrainConfig:
    return TrainConfig(
        MODES[cell.mode][0],
        model="",
        out="",
        phases=(PhaseConfig(1000, cell.tokens, cell.sequences),),
        optimizer=OptimizerConfig(),
        selection=cell.mode != "dense",
        device=device.type,
        context_parallel=cell.context_parallel,
        activation_checkpointing=True,
    )


def measure(cell: Cell, model_config: Any, mesh: Mesh, options: argparse.Namespace, received: list[Received]) -> None:
    """Fills the cell. received: by this rank so far."""
    device = mesh.device
    run = RandomRun(config_of(cell, device), model_config, mesh)
    draw = torch.Generator().manual_seed(run.division.shard)
    ids = torch.randint(model_config.vocab_size, (1, cell.tokens), generator=draw)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(cell.tokens)[None]}
    with run.ready():
        cell.least = least_bytes(cell, run)
        begin, taken = time.perf_counter(), []
        for number in range(options.warm + options.steps):
            # The first step compiles kernels and never counts, the second one is always taken. All ranks begin at once.
            if mesh.any(time.perf_counter() - begin > options.seconds) and number > 1:
                break
            before, started = len(received), time.perf_counter()
            run.step(number, [batch])
            finish(device)
            taken.append(time.perf_counter() - started)
        for one in received[before:]:
            cell.received[one.what] = cell.received.get(one.what, 0) + one.bytes
        if device.type == "cuda":
            cell.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
            if mesh.size > 1 and options.profile:
                cell.nccl_seconds, cell.hidden = profiled(run, len(taken), batch)
    slowest = torch.tensor([*(taken[options.warm :] or taken[-1:]), cell.peak_gib], dtype=torch.float64)
    if mesh.size > 1:
        slowest = torch.stack(mesh.all_gather(slowest)).amax(0)
    *cell.seconds, cell.peak_gib = slowest.tolist()
    seconds = statistics.median(cell.seconds)
    cell.tokens_per_second = cell.tokens * cell.sequences / seconds
    flops = cell.sequences * cost.train_flops(cost.shape_of(model_config), MODES[cell.mode][1], cell.tokens)
    cell.tflop, gpu = flops / 1e12, gpu_here(device)
    cell.mfu = None if gpu is None else flops / seconds / (mesh.size * gpu.bf16)


def gpu_here(device: torch.device) -> cost.Gpu | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((gpu for gpu in cost.GPUS.values() if gpu.name in name), None)


def least_bytes(cell: Cell, run: RandomRun) -> dict[str, float]:
    """What a rank must receive in a step, in the mean over ranks. Called when the model is sharded."""
    R = cell.gpus
    if R == 1:
        return {}
    value = 2 if run.device.type == "cuda" else 4  # bytes, of bfloat16 under autocast
    exchanged = sum(p.numel() * (1 + p.requires_grad) for p in run.model.parameters())
    found = {"parameters": value * exchanged * (R - 1) / R}
    if cell.context_parallel > 1:
        shape = cost.shape_of(run.model.config)
        each = bytes_a_token(MODES[cell.mode][1], value * shape.attention.cached, value * shape.index_dim)
        pack = pack_of(torch.arange(cell.tokens)[None])
        found["context"] = cell.layers * each * least(pack, cell.context_parallel)
    return found


def profiled(run: RandomRun, number: int, batch: dict[str, Tensor]) -> tuple[float | None, float | None]:
    """Of rank 0, in one step: seconds in which a kernel of NCCL runs, and the share of them in which another one does.

    The step takes longer than others.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) if run.mesh.leads else nullcontext() as profile:
        run.step(number, [batch])
        finish(run.device)
    if profile is None:
        return None, None
    exchanging: list[tuple[float, float]] = []
    computing: list[tuple[float, float]] = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kind = exchanging if event.name.startswith("nccl") else computing
            kind.append((event.time_range.start, event.time_range.end))
    total = length(exchanging)
    return total / 1e6, common(exchanging, computing) / total if total else None


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """Of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def common(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> float:
    """The length of what lies in both unions."""
    return length(a) + length(b) - length([*a, *b])


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cells_of(options: argparse.Namespace, stacks: dict[str, dict[str, Any]], gpus: int) -> Iterator[Cell]:
    for stack, tokens, mode in itertools.product(options.stack, options.tokens, options.mode):
        shared = gpus if tokens >= options.share_from else 1
        yield Cell(stack, mode, tokens, gpus, shared, stacks[stack]["num_hidden_layers"], gpus // shared)


def read(path: Path) -> list[Cell]:
    return [Cell(**cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]] if path.exists() else []


@dataclass(frozen=True)
class Figures:
    """The file of the cells. Rank 0 writes it, or one that is left alone."""

    path: Path
    origin: dict[str, str]

    def write(self, cell: Cell) -> None:
        cells = [known for known in read(self.path) if known.key != cell.key] + [cell]
        write_json(self.path, {"run": self.origin, "cells": [asdict(known) for known in cells]})


def run_cell(
    cell: Cell, model_config: Any, mesh: Mesh, figures: Figures, options: argparse.Namespace, waiting: Any
) -> None:
    """Measures a cell and writes it. A lack of memory is written too. waiting: group of all ranks that can give up."""
    ranks = train_memory.Ranks(mesh.size, cell.context_parallel)
    parts = train_memory.memory(
        cost.shape_of(model_config), MODES[cell.mode][1], ranks, sequences=1, context=cell.tokens, checkpointing=True
    )
    cell.planned_gib = sum(part.bytes for part in parts) / 2**30
    there = torch.cuda.get_device_properties(mesh.device).total_memory / 2**30 if mesh.device.type == "cuda" else 1e9
    if cell.planned_gib > HOPELESS * there:
        cell.missing = f"not tried: planned {cell.planned_gib:.0f} GiB a GPU of {there:.0f}"
    elif mesh.leads:
        figures.write(replace(cell, missing=ENDED))  # until it has ended
    with counting() as received:
        if not cell.missing:
            try:
                measure(cell, model_config, mesh, options, received)
            except torch.OutOfMemoryError as error:
                cell.missing = f"out of memory: {str(error).splitlines()[0]}"
        if waiting is not None:
            failed = together(cell, mesh, waiting, len(received), figures)
            cell.missing = cell.missing or failed
    if mesh.leads:
        figures.write(cell)
    told = f"{statistics.median(cell.seconds):.3f} s a step" if cell.seconds else cell.missing
    say(mesh, f"{cell}: {cell.missing or told}, {cell.peak_gib:.1f} GiB")
    free()


def together(cell: Cell, mesh: Mesh, waiting: Any, calls: int, figures: Figures) -> str:
    """Why any rank has not measured the cell; "" if all have.

    Ends the process if ranks are at different places, since their next collectives would not belong together. calls:
    collectives of this rank in the cell.
    """
    found: list[tuple[str, int]] = [("", 0)] * mesh.size
    try:
        dist.all_gather_object(found, (cell.missing, calls), waiting)
    except RuntimeError:
        if cell.missing:
            alone(cell, mesh, figures, "and the others are elsewhere")
        raise
    failed = next((f"rank {rank}: {missing}" for rank, (missing, _) in enumerate(found) if missing), "")
    if failed and len({calls for _, calls in found}) > 1:
        if mesh.leads:
            cell.missing = failed
            alone(cell, mesh, figures, "and the ranks were at different places")
        sys.exit(3)
    return failed


def alone(cell: Cell, mesh: Mesh, figures: Figures, why: str) -> None:
    """Writes the cell, and ends the process at once: collectives that wait for other ranks would keep it."""
    figures.write(cell)
    print(f"{cell}: rank {mesh.rank}: {cell.missing}, {why}; run the same command again", file=sys.stderr, flush=True)
    os._exit(3)


def show(cells: Iterable[Cell]) -> None:
    """A table. The last column compares a GPU's tokens a second with those of the fewest GPUs with the same work."""
    table = Table("stack", "step", "tokens", "GPUs", "s", "tokens/s", "MFU", "peak GiB (planned)", "GB received, least")
    table.add_column("NCCL s, hidden")
    table.add_column("of linear")
    cells, first = list(cells), {}
    for cell in sorted((cell for cell in cells if cell.seconds), key=lambda cell: cell.gpus):
        first.setdefault((cell.stack, cell.mode, cell.tokens), cell)
    for cell in cells:
        shared = " shared" if cell.context_parallel > 1 else ""
        size = (cell.stack, cell.mode, f"{cell.tokens:,}{shared}", str(cell.gpus))
        if not cell.seconds:
            table.add_row(*size, cell.missing)
            continue
        base = first[cell.stack, cell.mode, cell.tokens]
        linear = cell.tokens_per_second / cell.gpus / (base.tokens_per_second / base.gpus)
        received = "\n".join(f"{k} {v / 1e9:.2f}, {cell.least[k] / 1e9:.2f}" for k, v in cell.received.items())
        table.add_row(
            *size, f"{statistics.median(cell.seconds):.3f}", f"{cell.tokens_per_second:,.0f}",
            "" if cell.mfu is None else f"{100 * cell.mfu:.1f}%", f"{cell.peak_gib:.1f} ({cell.planned_gib:.1f})",
            received, "" if cell.hidden is None else f"{cell.nccl_seconds:.3f}, {100 * cell.hidden:.0f}%",
            "" if base is cell else f"{100 * linear:.0f}%",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--tokens", nargs="+", type=int, help="of a sequence; 32768 131072")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--share-from", type=int, help="tokens from which on all ranks share a sequence; 131072")
    parser.add_argument("--warm", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=3, help="timed ones")
    parser.add_argument("--seconds", type=float, default=60, help="after which a cell takes no further step")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="measure no overlap")
    parser.add_argument("--out", type=Path, help="the file of the figures; it is continued")
    parser.add_argument("--show", nargs="+", type=Path, help="measure nothing; one table of such files")
    parser.add_argument("--quick", action="store_true", help="tiny, and on the CPU where there is no GPU")
    options = parser.parse_args()
    if options.show:
        show(cell for path in options.show for cell in read(path))
        return 0
    if options.out is None or options.steps < 1 or options.warm < 1:
        parser.error("give --out FILE, and at least 1 for --steps and --warm")
    if not (options.quick or torch.cuda.is_available()):
        print("many_gpus: torch sees no CUDA device here", file=sys.stderr)
        return 2
    options.tokens = options.tokens or ([128, 256] if options.quick else [32768, 131072])
    options.share_from = options.share_from or (256 if options.quick else 131072)
    stacks = {name: fields | (TINY_STACKS[name] if options.quick else {}) for name, fields in STACKS.items()}
    with join_mesh("auto") as joined, joined.together():
        mesh = KeptMesh(joined.rank, joined.size, joined.device)
        waiting = dist.new_group(backend="gloo", timeout=ALONE) if mesh.size > 1 else None
        figures, chosen = Figures(options.out, environment()), Chosen()
        known = {cell.key for cell in read(options.out)}
        mesh.check_same(str(options.out), str(sorted(known)))
        for cell in cells_of(options, stacks, mesh.size):
            if cell.key in known:
                say(mesh, f"{cell}: known")
                continue
            run_cell(cell, model_config(stacks[cell.stack]), mesh, figures, options, waiting)
        if mesh.leads:
            show(read(options.out))
            for text in chosen.unexpected():
                print(f"not through the kernels: {text}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
