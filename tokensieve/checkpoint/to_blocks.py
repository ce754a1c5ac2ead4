"""A checkpoint folder rewritten in FP8 blocks, one tensor after the other."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tokensieve.checkpoint.blocks import PUBLISHED, SCALE, quantized
from tokensieve.checkpoint.card import write_card
from tokensieve.checkpoint.companions import copy_tokenizer
from tokensieve.checkpoint.folder import replacing_folder
from tokensieve.checkpoint.names import FLOAT32_SUFFIXES, expected_tensors
from tokensieve.checkpoint.reading import FP8, check_tensors, check_tied, mtp_names, open_shards, read_config
from tokensieve.checkpoint.writing import ShardWriter
from tokensieve.families import model_config
from tokensieve.files import check_free
from tokensieve.ops.quant import dequantize_weight


@dataclass(frozen=True)
class Rounding:
    """What the blocks lost: |W - W'| / |W| in the Frobenius norm, of all rounded matrices together and of the worst.

    matrices: how many were rounded. kept: how many were in blocks before, and stayed bit for bit.
    """

    matrices: int
    kept: int
    error: float
    worst: float
    worst_name: str


def convert_to_blocks(
    source: str | Path, out: str | Path, on_step: Callable[[str], None] = lambda step: None, shard_bytes: float = 5e9
) -> Rounding:
    """Write a checkpoint folder in FP8 blocks of 128 x 128, as `blocks.py` says; returns what the rounding lost.

    out: a new or empty folder, which appears when all is on disk. Matrices that are in blocks already are copied bit
    for bit, scales included, and further ones get the same kind of blocks. The rest is written in bfloat16, or as it is
    stored if the source has blocks; the router's bias and the indexer's weights_proj stay as they are. The
    multi-token-prediction layer goes along. At most one shard is held in memory.
    Raises UserError for a source that :func:`load_tensors` refuses, for weights that are not finite, and for a folder
    that is not empty.
    """
    source, out = Path(source), Path(out)
    raw = read_config(source)
    config = model_config(raw)
    check_free(out)
    shards = open_shards(source)
    expected = expected_tensors(config)
    check_tensors(source, expected, config, shards)
    check_tied(source, config, shards)
    before = FP8 in shards.dtype.values()
    settings = (raw.get("quantization_config") if before else None) or PUBLISHED
    settings = {**settings, "weight_block_size": list(shards.block)}
    sums, worst, counts = [0.0, 0.0], (0.0, ""), [0, 0]
    with replacing_folder(out) as new:
        writer = ShardWriter(new, shard_bytes)
        for name in (*expected, *mtp_names(shards, config)):
            on_step(name)
            if shards.dtype[name] == FP8:
                counts[1] += 1
                for part in shards.with_scale(name):
                    writer.add(part, shards.piece(part))
                continue
            tensor = shards.read(name)
            stored = dict(quantized(name, tensor, settings))
            if len(stored) == 1 and not before and not name.endswith(FLOAT32_SUFFIXES):
                stored = {name: tensor.to(torch.bfloat16)}
            for part, values in stored.items():
                writer.add(part, values)
            if name + SCALE in stored:
                weight = tensor.float()
                back = dequantize_weight(stored[name], stored[name + SCALE], shards.block, torch.float32)
                lost, whole = float((weight - back).square().sum()), float(weight.square().sum())
                sums, counts[0] = [sums[0] + lost, sums[1] + whole], counts[0] + 1
                worst = max(worst, (_ratio(lost, whole), name))
        writer.close()
        kinds = {} if before else {key: "bfloat16" for key in ("torch_dtype", "dtype") if key in raw}
        text = json.dumps(raw | kinds | {"quantization_config": settings}, indent=2)
        (new / "config.json").write_text(text + "\n", encoding="utf-8")
        copy_tokenizer(source, new)
    write_card(out, source)
    return Rounding(counts[0], counts[1], _ratio(*sums), *worst)


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0
