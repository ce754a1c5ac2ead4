"""Write the shards of the official inference demo from a checkpoint folder, and read them back.

Rank i of R reads ``model{i}-mp{R}.safetensors``. It holds a slice of every matrix that the ranks divide, E / R
consecutive experts whole, and a copy of all the rest, under names of its own. Values are moved and never changed: FP8
stays FP8, and rotated dimensions keep the order of the published checkpoint (interleaved for the attention, half-split
for the indexer), as in the official conversion. Legend: R ranks, E experts.

Source: inference/convert.py (names and slices), inference/model.py and generate.py (their readers) of
DeepSeek-V3.2-Exp. The demo reads the shape from a JSON file of its own; the shards here keep the checkpoint's
config.json, which is all that the reverse needs.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tokensieve.checkpoint.companions import copy_tokenizer
from tokensieve.checkpoint.demo_names import (
    DEMO_BLOCK,
    EXPERT,
    check_divisible,
    check_division,
    demo_name,
    rank_file,
    rank_tensors,
    shard_axis,
)
from tokensieve.checkpoint.folder import replacing_folder
from tokensieve.checkpoint.names import expected_tensors, memory_layout
from tokensieve.checkpoint.reading import (
    FP8,
    Shards,
    blocks_in,
    check_tensors,
    check_tied,
    fp8_block,
    mtp_names,
    open_file,
    open_shards,
    rank_files,
    read_config,
    stream,
)
from tokensieve.checkpoint.writing import ShardWriter, require_space
from tokensieve.config import UserError
from tokensieve.families import TOP_K_BY_LAYER, model_config
from tokensieve.files import check_free

log = logging.getLogger("tokensieve")

_LAYER = re.compile(r"model\.layers\.\d+\.")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write_shards(
    source: str | Path,
    out: str | Path,
    ranks: int,
    n_experts: int | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> None:
    """Write the demo's shards of a checkpoint folder, byte for byte those of the official conversion.

    source: a folder in Hugging Face format. out: a new or empty folder, which appears when all is on disk. ranks: files
    to write. n_experts: compared with config.json if given. At most one rank's tensors are held in memory.
    config.json and the tokenizer are copied beside the shards. The multi-token-prediction layer is left behind, as the
    demo has none; a tied ``lm_head``, which the demo does not know, is written as a copy of the embedding.
    Raises UserError for a checkpoint that :func:`load_tensors` refuses, for another number of experts, for a number of
    ranks that does not divide heads, vocabulary, experts and widths or that would cut through an FP8 block (for which
    the official conversion stops or gives a rank the wrong scales), for biases, for layers that share indexers or
    have a k of their own, and for a folder that is not empty.
    """
    source, out = Path(source), Path(out)
    raw = read_config(source)
    config = model_config(raw)
    check_divisible(source, config)
    if "shared" in (getattr(config, "indexer_types", None) or ()):
        raise UserError(f"{source}: layers share indexers, and the official demo has one in every layer; serve it here")
    if getattr(config, TOP_K_BY_LAYER, None) is not None:
        raise UserError(
            f"{source}: every layer has a k of its own, and the official demo has one for all; serve it here"
        )
    check_free(out)
    _check_experts(source, config, n_experts)
    shards = open_shards(source)
    check_tensors(source, expected_tensors(config), config, shards)
    check_tied(source, config, shards)
    check_division(source, config, shards, ranks)
    if FP8 in shards.dtype.values() and shards.block != DEMO_BLOCK:
        raise UserError(
            f"{source}: FP8 in blocks of {shards.block[0]} x {shards.block[1]}, and the demo reads 128 x 128 only; "
            "convert the bf16 weights"
        )
    with replacing_folder(out) as new:
        require_space(new, sum(_rank_bytes(shards, config, rank, ranks) for rank in range(ranks)))
        for rank in range(ranks):
            on_step(f"rank {rank} of {ranks}")
            save_file(_of_rank(shards, config, rank, ranks), new / rank_file(rank, ranks))
            shards.reopen()
        copy_tokenizer(source, new)
        shutil.copyfile(source / "config.json", new / "config.json")
    if mtp_names(shards, config):
        log.warning("%s: the multi-token-prediction layer is left behind: the demo has none", out)


def _of_rank(shards: Shards, config: Any, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    tensors = {
        demo_name(part): shards.piece(part, shard_axis(name), rank, ranks)
        for name in rank_tensors(config, rank, ranks)
        for part in shards.with_scale(name)
    }
    if config.tie_word_embeddings:
        tensors[demo_name(_HEAD)] = tensors[demo_name(_EMBEDDING)].clone()  # safetensors stores no tensor twice
    return tensors


def _rank_bytes(shards: Shards, config: Any, rank: int, ranks: int) -> int:
    total = 0
    for name in rank_tensors(config, rank, ranks):
        divided = 1 if shard_axis(name) is None else ranks
        copies = 2 if name == _EMBEDDING and config.tie_word_embeddings else 1
        total += copies * sum(shards.size(part) for part in shards.with_scale(name)) // divided
    return total


def join_shards(
    source: str | Path,
    out: str | Path,
    ranks: int | None = None,
    n_experts: int | None = None,
    shard_bytes: float = 5e9,
    on_step: Callable[[str], None] = lambda step: None,
) -> None:
    """Write the checkpoint folder that the demo's shards were made from, bit for bit; the reverse of `write_shards`.

    source: a folder with every ``model{i}-mp{ranks}.safetensors`` and the config.json of the checkpoint (the official
    conversion does not copy it: put it there). out: a new or empty folder. ranks: needed only if the folder holds
    shards for several numbers of ranks. One file of ``shard_bytes`` and one layer are held in memory. config.json is
    copied, except that it no longer counts a multi-token-prediction layer, which the shards do not hold.
    Raises UserError for a missing, damaged or foreign file, and for ranks whose common tensors differ.
    """
    source, out = Path(source), Path(out)
    raw = read_config(source)
    config = model_config(raw)
    check_divisible(source, config)
    check_free(out)
    _check_experts(source, config, n_experts)
    ranks = _find_ranks(source, ranks)
    opened = [_open_rank(source, config, rank, ranks) for rank in range(ranks)]
    check_division(source, config, opened[0], ranks, whole_blocks=False)
    size = 0
    for rank, shards in enumerate(opened):
        shapes = rank_tensors(config, rank, ranks)
        check_tensors(source, shapes, config, shards)
        check_tied(source, config, shards)
        unshared = [name for name in shapes if rank == 0 or shard_axis(name) is not None or EXPERT.search(name)]
        size += sum(shards.size(part) for name in unshared for part in shards.with_scale(name))
    with replacing_folder(out) as new:
        require_space(new, size)
        writer = ShardWriter(new, shard_bytes)
        for place, names in groupby(expected_tensors(config), _place):
            on_step(place)
            for name in names:
                for part, tensor in _whole(name, opened):
                    writer.add(part, tensor)
            for shards in opened:
                shards.reopen()
        writer.close()
        copy_tokenizer(source, new)
        if raw.get("num_nextn_predict_layers"):
            text = json.dumps(raw | {"num_nextn_predict_layers": 0}, indent=2)
            (new / "config.json").write_text(text + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source / "config.json", new / "config.json")


def _place(name: str) -> str:
    layer = _LAYER.match(name)
    return layer[0].rstrip(".") if layer else name


def _whole(name: str, opened: list[Shards]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor, and its scales if it is FP8, joined from the ranks that hold it."""
    holders, axis = [shards for shards in opened if name in shards.shape], shard_axis(name)
    for part in holders[0].with_scale(name):
        pieces = [shards.piece(part) for shards in holders]
        if any(piece.dtype != pieces[0].dtype for piece in pieces):
            raise _mixed(part, holders)
        if axis is not None:
            yield part, torch.cat(pieces, axis)
            continue
        for piece in pieces[1:]:
            if not torch.equal(piece.view(torch.uint8), pieces[0].view(torch.uint8)):
                raise _mixed(part, holders)
        yield part, pieces[0]


def _mixed(name: str, holders: list[Shards]) -> UserError:
    folder = holders[0].file_of[name].parent
    return UserError(f"{folder}: the ranks' {name} do not agree; the files are of several conversions: convert again")


def shard_blocks(folder: str | Path, config: Any, rank: int, ranks: int) -> set[str]:
    """Return :func:`block_tensors` of one rank's shard."""
    return blocks_in(_open_rank(Path(folder), config, rank, ranks), _rank_layout(config, rank, ranks))


def load_shard(
    folder: str | Path, config: Any, rank: int, ranks: int, dtype: torch.dtype, kept: Collection[str] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream one rank's tensors out of its shard: (in-memory name, this rank's slice), in the order of the model.

    Reads ``model{rank}-mp{ranks}.safetensors`` and config.json of the folder, and no other rank's file. Names, dtypes
    and memory are as for :func:`load_tensors`; ``kept`` is a subset of :func:`shard_blocks`. Slices are along
    :func:`shard_axis`; the fused experts of a layer are this rank's E / R, beginning with expert rank * E / R. A tied
    ``lm_head`` is not yielded: this rank's rows of it are those of the embedding. Headers are checked before this
    returns. Raises UserError as `load_tensors` does, and for a number of ranks that does not divide the model;
    ValueError for a rank outside 0 ... ranks - 1.
    """
    folder = Path(folder)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}: ranks count from 0")
    shards = _open_rank(folder, config, rank, ranks)
    check_division(folder, config, shards, ranks)
    shapes = rank_tensors(config, rank, ranks)
    check_tensors(folder, shapes, config, shards)
    check_tied(folder, config, shards)
    return stream(shards, _rank_layout(config, rank, ranks), dtype, kept)


def _rank_layout(config: Any, rank: int, ranks: int) -> dict[str, list[str]]:
    shapes = rank_tensors(config, rank, ranks)
    return {name: [part for part in parts if part in shapes] for name, parts in memory_layout(config).items()}


def _open_rank(folder: Path, config: Any, rank: int, ranks: int) -> Shards:
    """One rank's file, with its tensors under their names in a checkpoint."""
    path = folder / rank_file(rank, ranks)
    if not path.is_file():
        raise UserError(f"{path}: missing; copy it from where the checkpoint was converted, or convert it again")
    names = [*expected_tensors(config), *([_HEAD] if config.tie_word_embeddings else [])]
    scales = [f"{name}_scale_inv" for name in names if name.endswith(".weight")]
    on_disk = {demo_name(name): name for name in names + scales}
    inside = list(open_file(path).keys())
    foreign = [name for name in inside if name not in on_disk]
    if foreign:
        raise UserError(
            f"{path}: {foreign[0]} is no tensor of this model in the demo's names; use the config.json that belongs to "
            "these shards"
        )
    return Shards({on_disk[name]: (path, name) for name in inside}, fp8_block(folder))


def _find_ranks(folder: Path, requested: int | None) -> int:
    files = rank_files(folder)
    if requested is None and len(files) > 1:
        raise UserError(
            f"{folder}: holds shards for {' and for '.join(map(str, sorted(files)))} ranks; "
            "choose one with --model-parallel"
        )
    ranks = requested if requested is not None else next(iter(files), 0)
    if not files.get(ranks):
        others = f"those there are for {', '.join(map(str, sorted(files)))}" if files else "it holds none"
        absent = f"shards for {ranks} ranks" if ranks else "shards (model0-mp8.safetensors and so on)"
        raise UserError(f"{folder}: no {absent}, {others}; give the folder that convert wrote")
    missing = [name for name in (rank_file(rank, ranks) for rank in range(ranks)) if name not in files[ranks]]
    if missing:
        raise UserError(
            f"{folder}: {', '.join(missing[:3])} {'is' if len(missing) == 1 else 'are'} missing; "
            f"copy all {ranks} shards into one folder"
        )
    return ranks


def _check_experts(folder: Path, config: Any, n_experts: int | None) -> None:
    experts = config.n_routed_experts
    if n_experts is not None and n_experts != experts:
        raise UserError(
            f"--n-experts {n_experts}: {folder}/config.json has n_routed_experts {experts}; say --n-experts {experts}, "
            "or leave it out"
        )
