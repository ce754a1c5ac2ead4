"""The engine with few heads to a group, sparse beside dense, on one GPU: prefill and decode at long contexts.

    python benchmarks/engine_rows.py [--lengths 32768 131072] [--only decode] [--quick] [--out FILE]

decode  one token of each of 16 sequences, whose caches are filled with noise up to the length
prefill the last 8192 tokens of a prompt, whose other tokens are cached noise; one chunk

Random weights, bf16, in two shapes: Qwen3-8B with indexers, and the widths of DeepSeek-V2-Lite with index keys in FP8
and an MLP of its first layer in every layer, which does as much work as its experts. Dense is the same model in the
same engine, with every key visible.

indexer  what the random indexer selects: neighbouring queries select nearly on their own, as no trained model's do
near     the indexer runs, and then selections are read that are drawn to overlap as on real text (gpu_few_heads.py)

A step of decoding costs what its layers do and what is done once a step (head, sampling, launching). So it is measured
at two depths: the difference is a layer's time, and gives the step of the published depth. For a prefill one depth is
enough. At the end PyTorch's flash attention decodes from a contiguous cache: what a layer's dense attention could take.
Each cell is a line; the file, written after each, says which backend every op took.
"""

import argparse
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_few_heads import NEAR, draw
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokensieve
from tokensieve.bench import Served, Workload, random_model, random_prompts, serve_load
from tokensieve.engine.runner import is_quantized
from tokensieve.families import family_of, published_config
from tokensieve.files import write_json
from tokensieve.model.entries import ContiguousKeys
from tokensieve.model.selection import SelectionContext, indexer
from tokensieve.ops.quant import LATENT_TOKEN_BYTES
from tokensieve.report.origin import environment

ROOT = Path(__file__).parents[1]
SELECTIONS = {"decode": ("indexer", "dense"), "prefill": ("indexer", "engine_rows:near", "dense")}
SEQUENCES, CHUNKS = 16, 3  # of a decode step; prefills in a row, of which the mean is taken


@dataclass(frozen=True)
class Shape:
    name: str
    family: str
    layers: int  # of the published model
    changes: dict[str, Any]
    quick: dict[str, Any]  # for sizes that are none


@dataclass(frozen=True)
class Sizes:
    lengths: tuple[int, ...] = (32768, 131072)
    depths: tuple[int, int] = (2, 6)
    last: int = 8192
    new: int = 128  # so many that a single slow step lies above the 99th percentile


TINY = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 4096, "index_n_heads": 4, "index_topk": 32}
SHAPES = (
    Shape(
        "32 heads, 8 groups x 128",
        "qwen3_dsa",
        36,
        {"max_position_embeddings": 1 << 18},
        TINY | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    ),
    Shape(
        "MLA, 16 heads",
        "deepseek_v32",
        27,
        {
            "hidden_size": 2048, "intermediate_size": 10944, "vocab_size": 102400, "num_attention_heads": 16,
            "num_key_value_heads": 16, "q_lora_rank": None, "index_n_heads": 16, "index_dtype": "fp8",
            "first_k_dense_replace": 27, "max_position_embeddings": 1 << 18,
        },
        TINY | {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32},
    ),
)  # fmt: skip


@dataclass
class Cell:
    """Milliseconds of one shape, length and kind of work, by selection."""

    shape: str
    work: str  # decode or prefill
    tokens: int
    layer: dict[str, float] = field(default_factory=dict)
    model: dict[str, float] = field(default_factory=dict)  # of the published depth
    ratio: dict[str, float] = field(default_factory=dict)  # dense / sparse, of the models
    layer_ratio: dict[str, float] = field(default_factory=dict)
    dense_tb_per_second: float | None = None  # of entries, over a layer's whole time
    served: list[dict[str, Any]] = field(default_factory=list)
    wall: float = 0.0  # seconds that the cell took, compilation included

    def line(self) -> str:
        ratios = ", ".join(f"{name} {x:.2f} (layer {self.layer_ratio[name]:.2f})" for name, x in self.ratio.items())
        times = ", ".join(f"{name} {ms:.3f} ({self.model[name]:.1f})" for name, ms in self.layer.items())
        read = "" if self.dense_tb_per_second is None else f"; dense reads {self.dense_tb_per_second:.2f} TB/s"
        memory = max(row["memory_bytes"] for row in self.served) / 2**30
        spread = max(row["next_p99_over_p50"] for row in self.served)
        return (
            f"{self.shape}, {self.work} at {self.tokens}: dense/sparse {ratios}; ms a layer (model) {times}{read}; "
            f"p99/p50 {spread:.2f}, {memory:.1f} GiB, {self.wall:.0f} s"
        )


@cache
def drawn(tokens: int, last: int, k: int, device: torch.device) -> Tensor:
    """(last, k) int32: selections of the last queries."""
    return draw(tokens, k, NEAR, device)[-last:].clone()


def near(c: SelectionContext) -> Tensor:
    """Selector: what the indexer costs, and selections that overlap as on real text. In decode steps the indexer's."""
    own = indexer(c)
    assert own is not None
    return drawn(int(c.ends_N[-1]), len(c), own.shape[1], own.device) if isinstance(c.keys, ContiguousKeys) else own


class Choices(logging.Handler):
    """Which backend each op took, as the dispatcher logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def milliseconds(served: Served, work: str, last: int) -> float:
    return 1000 * (served.next_p50 if work == "decode" else last / served.prompt_tokens_per_second)


def measure(shape: Shape, work: str, tokens: int, models: dict[int, Any], tokenizer: Any, sizes: Sizes) -> Cell:
    begin, cell = time.perf_counter(), Cell(shape.name, work, tokens)
    few, many = sizes.depths
    # The last of the new tokens is at the length: past it the page table would be twice as wide.
    decode = Workload(SEQUENCES, tokens - sizes.new, sizes.new, filled=True)
    prefill = Workload(CHUNKS, tokens, 2, filled=True, chunk=sizes.last, last=sizes.last)
    load = decode if work == "decode" else prefill
    prompts = random_prompts(load.requests, load.prompt, models[few].config.vocab_size)
    for selector in SELECTIONS[work]:
        selection, took = selector.partition(":")[2] or selector, {}
        for depth in sizes.depths if work == "decode" else (few,):
            served = serve_load(models[depth], tokenizer, Workload(**asdict(load) | {"selection": selector}), prompts)
            cell.served.append({"layers": depth, "selection": selection} | asdict(served))
            took[depth] = milliseconds(served, work, sizes.last)
        layer = (took[many] - took[few]) / (many - few) if work == "decode" else took[few] / few
        cell.layer[selection], cell.model[selection] = layer, took[few] + (shape.layers - few) * layer
    for selection in [name for name in cell.layer if name != "dense"]:
        cell.ratio[selection] = cell.model["dense"] / cell.model[selection]
        cell.layer_ratio[selection] = cell.layer["dense"] / cell.layer[selection]
    if work == "decode":
        cell.dense_tb_per_second = SEQUENCES * tokens * entry_bytes(models[few]) / cell.layer["dense"] / 1e9
    cell.wall = time.perf_counter() - begin
    return cell


def entry_bytes(model: Any) -> int:
    """Bytes of a token's entry in a layer."""
    numbers = family_of(model.config).entry(model.config).numbers
    return LATENT_TOKEN_BYTES if is_quantized(model)[0] else numbers * model.dtype.itemsize


def flash_decode(tokens: int, device: torch.device) -> float:
    """Milliseconds of PyTorch's flash attention, 16 sequences, one query of 32 heads each, 8 groups x 128."""
    q = torch.randn(SEQUENCES, 32, 1, 128, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(SEQUENCES, tokens, 8, 128, device=device, dtype=q.dtype).transpose(1, 2) for _ in range(2))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    rounds = 20
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for i in range(rounds + 3):
            if i == 3:
                marks[0].record()
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        marks[1].record()
    torch.cuda.synchronize(device)
    return marks[0].elapsed_time(marks[1]) / rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=None)
    parser.add_argument("--only", choices=("decode", "prefill"), default=None)
    parser.add_argument("--quick", action="store_true", help="sizes that are none, on any device")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "engine_rows.json")
    options = parser.parse_args()
    if not (options.quick or torch.cuda.is_available()):
        sys.exit("engine_rows: it measures a GPU, and there is none; --quick tries the road here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = Sizes((256, 512), (1, 2), 128, 4) if options.quick else Sizes()
    lengths = options.lengths or sizes.lengths
    kinds = ("decode", "prefill") if options.only is None else (options.only,)
    least = max(sizes.last, sizes.new + 1)
    if min(lengths) < least:
        sys.exit(f"engine_rows: --lengths {min(lengths)} is below the {least} tokens that are run")
    choices, log = Choices(), logging.getLogger("tokensieve.ops")
    log.addHandler(choices)
    log.setLevel(logging.INFO)
    cells: list[dict[str, Any]] = []
    figures = {"run": environment(), "sizes": asdict(sizes), "cells": cells, "backends": choices.lines, "flash_ms": {}}
    tokenizer = tokensieve.load_tokenizer("base")
    for shape in SHAPES:
        changes = shape.changes | (shape.quick if options.quick else {})
        models = {
            depth: random_model(published_config(shape.family, **changes | {"num_hidden_layers": depth}), device, dtype)
            for depth in sizes.depths
        }
        for tokens in lengths:
            for work in kinds:
                cell = measure(shape, work, tokens, models, tokenizer, sizes)
                cells.append(asdict(cell))
                write_json(options.out, figures)
                print(cell.line(), flush=True)
        del models
    for tokens in lengths if device.type == "cuda" and not options.quick and "decode" in kinds else ():
        figures["flash_ms"][str(tokens)] = flash_decode(tokens, device)
        write_json(options.out, figures)
        print(f"flash attention, 32 heads, 8 groups, {tokens}: {figures['flash_ms'][str(tokens)]:.3f} ms a layer")
    print(f"Figures: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
