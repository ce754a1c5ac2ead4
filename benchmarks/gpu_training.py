"""Training on one GPU: the kernels' losses beside the reference's, and the speed and memory of a 16B-class layer stack.

    python benchmarks/gpu_training.py [--part losses|speed] [--out FILE] [--quick]

losses: `pretrain` (going on with the bundled base), `warmup` (the base with untrained indexers) and `adapt` (the
bundled sparse model) on Python's standard library, through `train.run` under bfloat16 autocast. The same run four
times: on the reference backend; on it with every step cut into two micro-batches, which only sums in another order; and
twice on the backends that `auto` takes. The last two against each other, and the first two, are the noise floor. What
`auto` took is logged, and on a GPU none of it may be the reference.

speed: one sequence a step through the loop's own step, random bfloat16 weights and tokens, whole layers recomputed in
the backward pass, gradients clipped, fused AdamW with bfloat16 moments. The stack is DeepSeek-V2-Lite's with its
embedding and head, every layer a mixture, and an indexer of 16 heads x 128: with 64 heads a score would cost more than
the attention of 16 heads that it saves. As many layers as fit, or as the time allows. The first step of each is not
counted; of the others the fastest is told.

Tables to standard output, figures to a JSON file after every row; exit status 1 when losses differ, a backend is not
the expected one, or something was not measured; 2 without a GPU. With --quick everything is tiny, and runs on the CPU
where there is no GPU.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import tokensieve
from tokensieve import cost
from tokensieve.config import (
    DataConfig,
    OptimizerConfig,
    PhaseConfig,
    SourceConfig,
    TrainConfig,
    load_config,
)
from tokensieve.data import read_documents
from tokensieve.families import SparseConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.report.origin import environment
from tokensieve.train import loop, starting
from tokensieve.train.learning import learning
from tokensieve.train.stage import options_of

ROOT = Path(__file__).resolve().parents[1]
BEGIN = time.perf_counter()

MEAN, LARGEST = 0.005, 0.02  # of the relative differences of a loss curve: what is allowed
SECONDS = {"losses": 180, "speed": 240}  # after which a part begins nothing new

Write = Callable[[list[Any]], None]


@dataclass(frozen=True)
class Sizes:
    """What --quick makes smaller."""

    steps: int
    context: int  # tokens of a sequence; two of them a step
    layers: int  # of the bundled models
    top_k: int
    text: int  # bytes read
    stack: dict[str, Any]
    cells: tuple[tuple[int, int, int], ...]  # context in tokens, layers, steps


LITE = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "first_k_dense_replace": 0,
    "max_position_embeddings": 163840,
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 2048,
}
# A layer's 0.59 billion parameters take 4.7 GB: weight, gradient and two moments in bfloat16. One layer's activations
# of 128K tokens take about 40 GB while they are recomputed; 20 layers would fit beside those of 32K, and at 128K eight
# are what there is time for.
FULL = Sizes(50, 2048, 8, 512, 4_000_000, LITE, ((8192, 20, 4), (32768, 20, 3), (131072, 8, 2)))
TINY = {"vocab_size": 128, "hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "kv_lora_rank": 16}
TINY |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "index_head_dim": 16}
QUICK = Sizes(
    2, 64, 2, 16, 50_000, LITE | TINY | {"num_key_value_heads": 2, "index_topk": 16}, ((32, 2, 2), (64, 2, 2))
)


@dataclass
class Curve:
    """How far the kernels' losses of a stage are from the reference's, relative, over the steps."""

    stage: str
    loss: str
    steps: dict[str, list[float]]  # by arm
    mean: float
    largest: float
    floor: dict[str, tuple[float, float]]  # mean and largest difference of two runs that should be the same
    seconds: dict[str, float]  # of a step, by arm

    @property
    def is_wrong(self) -> bool:
        return not (self.mean <= MEAN and self.largest <= LARGEST)  # NaN is wrong too


@dataclass
class Speed:
    stage: str
    context: int
    layers: int
    seconds: float = 0.0  # of a step
    tflop: float = 0.0  # of a step, as `tokensieve.cost` counts it: without what is recomputed
    peak_gib: float = 0.0
    held_gib: float = 0.0  # between steps
    missing: str = ""  # why it was not measured


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGIN:4.0f} s  {text}", file=sys.stderr)


class Chosen(logging.Handler):
    """Which backend `auto` took for each op, in its own words, as it is told once."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        logger = logging.getLogger("tokensieve.ops")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def unexpected(self) -> list[str]:
        return [text for text in self.told if " on cuda: reference backend" in text]


# losses


ARMS = {  # backend, micro-batches of a step
    "reference": ("reference", 1),
    "reference, cut": ("reference", 2),
    "kernels": ("auto", 1),
    "kernels again": ("auto", 1),
}
FLOOR = {"reference": ("reference", "reference, cut"), "kernels": ("kernels", "kernels again")}
STAGES = {"pretrain": ("base", ("lm",)), "warmup": ("warmup", ("kl",)), "adapt": ("adapt", ("lm", "kl"))}


def text(folder: Path, limit_bytes: int) -> DataConfig:
    """A sample of the `python` source, read once: every run would list all packages of the machine anew."""
    path = folder / "python.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for document in read_documents("python", "train", 0.0, limit_bytes):
            file.write(json.dumps({"text": document.text}) + "\n")
    return DataConfig((SourceConfig(str(path)),), tokenizer="base", cache=str(folder), held_out_share=0.0)


def start(stage: str, sizes: Sizes) -> DecoderForCausalLM:
    """The model that a stage begins with. Pretraining goes on with the base: from nothing, two runs diverge."""
    model = tokensieve.load("sparse" if stage == "adapt" else "base", torch.float32)
    c = model.config
    model.model.layers, c.num_hidden_layers = model.model.layers[: sizes.layers], sizes.layers
    if stage == "adapt":  # the config of a sparse model lists the kind of each layer
        c.mlp_layer_types = c.mlp_layer_types[: sizes.layers]
    if stage == "warmup":
        return tokensieve.sparsify(model, sizes.top_k, index_heads=8, index_dim=32)
    model.config.index_topk = sizes.top_k
    return model


def curve(stage: str, arm: str, sizes: Sizes, device: torch.device, data: DataConfig) -> dict[str, list[float]]:
    """The figures of every step of a run, by name."""
    backend, parts = ARMS[arm]
    found: dict[str, list[float]] = {}

    def on_step(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            found.setdefault(name, []).append(value)

    with tempfile.TemporaryDirectory() as out:
        config = load_config(TrainConfig, STAGES[stage][0])
        config = replace(
            config,
            out=out,
            phases=(PhaseConfig(sizes.steps, sizes.context, sequences=2, micro_batch=2 // parts),),
            data=data,
            shape=config.shape | ({"num_hidden_layers": sizes.layers} if config.shape else {}),
            device=device.type,
            backend=backend,
            compile=False,
            workers=0,
            save_every=0,
            track=(),
        )
        loop.run(config, start(stage, sizes), on_step=on_step, progress=False)
    return found


def apart(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and largest relative difference."""
    each = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=True)]
    return statistics.fmean(each), max(each)


def losses(sizes: Sizes, device: torch.device, write: Write) -> list[Curve]:
    begin = time.perf_counter()
    rows: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        data = text(Path(folder), sizes.text)
        for stage, (_, names) in STAGES.items():
            found = {}
            for arm in ARMS:
                if time.perf_counter() - begin > SECONDS["losses"]:
                    say(f"{stage}: not compared, {SECONDS['losses']} s are over")
                    return rows
                found[arm] = curve(stage, arm, sizes, device, data)
                say(f"{stage}, {arm}: loss {found[arm]['loss'][0]:.4f} -> {found[arm]['loss'][-1]:.4f}")
            for name in names:
                line = {arm: figures[name] for arm, figures in found.items()}
                seconds = {arm: statistics.median(figures["seconds"]) for arm, figures in found.items()}
                floor = {of: apart(line[b], line[a]) for of, (a, b) in FLOOR.items()}
                rows.append(Curve(stage, name, line, *apart(line["kernels"], line["reference"]), floor, seconds))
                write(rows)
    return rows


def show_losses(rows: list[Curve]) -> None:
    table = Table(
        "stage", "loss", "reference", "mean and largest difference", "kernels twice", "reference, cut", "ms a step"
    )
    for row in rows:
        table.add_row(
            row.stage, row.loss, "{:.4f} -> {:.4f}".format(row.steps["reference"][0], row.steps["reference"][-1]),
            f"{row.mean:.1e}  {row.largest:.1e}" + ("  wrong" if row.is_wrong else ""),
            *("{:.1e}  {:.1e}".format(*row.floor[name]) for name in ("kernels", "reference")),
            f"{1000 * row.seconds['kernels']:.0f}, reference {1000 * row.seconds['reference']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


# speed


# Each is a stage of the loop, and what `tokensieve.cost` calls it.
MODES = {"dense": ("adapt", "pretrain"), "warmup": ("warmup", "warmup"), "adapt": ("adapt", "adapt")}


def stack(sizes: Sizes, layers: int, device: torch.device) -> DecoderForCausalLM:
    """Made on the device itself, in bfloat16 but for what stays float32 in every model."""
    torch.manual_seed(0)
    config = SparseConfig(**sizes.stack, num_hidden_layers=layers, pad_token_id=None, bos_token_id=0, eos_token_id=1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return DecoderForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def tokens(context: int, vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(vocabulary, (1, context), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(context)[None]}


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BareRun(loop.Run):
    """A run without a folder, of a model as it is: in whatever dtype, and nothing is resumed or saved."""

    def _newest(self) -> None:
        return None

    def _begin(self, model: DecoderForCausalLM | None) -> None:
        self.model, self.options = model, options_of(self.stage, self.config)


def measure(row: Speed, model: DecoderForCausalLM, steps: int, device: torch.device) -> None:
    """Fills the row with the fastest of the steps but the first."""
    config = TrainConfig(
        MODES[row.stage][0],
        model="",
        out="",
        phases=(PhaseConfig(steps, row.context, 1),),
        optimizer=OptimizerConfig(),
        selection=row.stage != "dense",
        device=device.type,
        activation_checkpointing=True,
    )
    run = BareRun(config, model, rehearse=False)
    model.train()
    model.model.gradient_checkpointing = config.activation_checkpointing
    with learning(model, run.stage.learners(config)):
        taken = _steps(run, row, steps, device)
    row.seconds = min(taken[1:])
    row.tflop = cost.train_flops(cost.shape_of(model.config), MODES[row.stage][1], row.context) / 1e12
    if device.type == "cuda":
        row.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30


def _steps(run: loop.Run, row: Speed, steps: int, device: torch.device) -> list[float]:
    """Seconds of every step."""
    run.optimizer = starting.make_optimizer(run.config, run.model, device)
    batch, taken = tokens(row.context, run.model.config.vocab_size), []
    for step in range(steps):
        finish(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            row.held_gib = torch.cuda.memory_allocated(device) / 2**30
        begin = time.perf_counter()
        run.step(step, [batch])
        finish(device)
        taken.append(time.perf_counter() - begin)
    return taken


def speed(sizes: Sizes, device: torch.device, write: Write) -> list[Speed]:
    begin, model = time.perf_counter(), None
    rows: list[Speed] = []
    for context, layers, steps in sizes.cells:
        for mode in MODES:
            row = Speed(mode, context, layers)
            if time.perf_counter() - begin > SECONDS["speed"]:
                row.missing = f"the part's {SECONDS['speed']} s were over"
            else:
                if model is None or len(model.model.layers) != layers:
                    model = None  # before the next one is made
                    free()
                    model = stack(sizes, layers, device)
                try:
                    measure(row, model, steps, device)
                except torch.OutOfMemoryError as error:
                    row.missing = f"out of memory: {str(error).splitlines()[0]}"
                model.zero_grad(set_to_none=True)
                free()
            rows.append(row)
            write(rows)
            told = row.missing or f"{row.seconds:.3f} s a step, {row.peak_gib:.1f} GiB"
            say(f"{mode}, {context} tokens, {layers} layers: {told}")
    return rows


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def show_speed(rows: list[Speed]) -> None:
    table = Table("step", "tokens", "layers", "s", "tokens/s", "TFLOP/s", "of dense", "peak GiB", "held GiB")
    dense = {row.context: row.seconds for row in rows if row.stage == "dense"}
    for row in rows:
        size = (row.stage, f"{row.context:,}", str(row.layers))
        if row.missing:
            table.add_row(*size, row.missing)
            continue
        table.add_row(
            *size, f"{row.seconds:.3f}", f"{row.context / row.seconds:,.0f}", f"{row.tflop / row.seconds:.0f}",
            f"{row.seconds / dense[row.context]:.2f}" if dense.get(row.context) else "",
            f"{row.peak_gib:.1f}", f"{row.held_gib:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=SECONDS, help="may be given twice; both unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_training.json")
    parser.add_argument("--quick", action="store_true", help="tiny, and on the CPU where there is no GPU")
    options = parser.parse_args()
    if not (options.quick or torch.cuda.is_available()):
        print("gpu_training: torch sees no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes, parts, chosen = QUICK if options.quick else FULL, options.part or list(SECONDS), Chosen()
    figures: dict[str, Any] = {"run": environment(), "allowed": {"mean": MEAN, "largest": LARGEST}}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write_as(name: str) -> Write:
        def write(rows: list[Any]) -> None:
            figures[name], figures["backends"] = [asdict(row) for row in rows], chosen.told
            options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

        return write

    wrong = False
    if "losses" in parts:
        curves = losses(sizes, device, write_as("losses"))
        show_losses(curves)
        wrong = any(row.is_wrong for row in curves) or {row.stage for row in curves} != set(STAGES)
    if "speed" in parts:
        speeds = speed(sizes, device, write_as("speed"))
        show_speed(speeds)
        wrong = wrong or any(row.missing for row in speeds)
    for text in chosen.unexpected():
        print(f"not through the kernels: {text}", file=sys.stderr)
    return int(wrong or bool(chosen.unexpected()))


if __name__ == "__main__":
    sys.exit(main())
