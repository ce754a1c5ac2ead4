"""Checkpoints on disk: tensor names as data, safetensors streamed in and out, folders replaced all at once.

names.py lists the tensors of a checkpoint, export.py writes the config that other programs read, reading.py streams a
checkpoint in, and writing.py streams it out. blocks.py and to_blocks.py do that in FP8, and gguf.py reads a GGUF file
in place of a folder. companions.py says which other files go with it, card.py writes the model card, folder.py replaces
one folder by another, and formats.py recognizes what is not read. demo_names.py and demo_shards.py do for the shards of
the official inference demo what names.py, reading.py and writing.py do for a checkpoint.
"""

from tokensieve.checkpoint import gguf
from tokensieve.checkpoint.blocks import in_blocks
from tokensieve.checkpoint.card import add_to_card, write_card
from tokensieve.checkpoint.companions import OTHER_WEIGHTS, copy_tokenizer, holds_another
from tokensieve.checkpoint.demo_names import check_division, demo_name, rank_file, rank_tensors, shard_axis
from tokensieve.checkpoint.demo_shards import join_shards, load_shard, shard_blocks, write_shards
from tokensieve.checkpoint.export import export_config, exportable
from tokensieve.checkpoint.folder import begin_folder, end_folder, replacing_folder, saving_folder, sync, writing_errors
from tokensieve.checkpoint.names import FLOAT32_SUFFIXES, expected_tensors, memory_layout
from tokensieve.checkpoint.reading import (
    Extras,
    Header,
    block_tensors,
    load_tensors,
    mtp_tensors,
    open_shards,
    rank_files,
    read_config,
    read_end_tokens,
    tensor_headers,
)
from tokensieve.checkpoint.to_blocks import Rounding, convert_to_blocks
from tokensieve.checkpoint.writing import ShardWriter, add_model, require_space, save_tensors, write_config

__all__ = [
    "add_to_card",
    "FLOAT32_SUFFIXES",
    "OTHER_WEIGHTS",
    "Extras",
    "Header",
    "Rounding",
    "ShardWriter",
    "add_model",
    "begin_folder",
    "block_tensors",
    "check_division",
    "convert_to_blocks",
    "copy_tokenizer",
    "demo_name",
    "end_folder",
    "expected_tensors",
    "export_config",
    "exportable",
    "gguf",
    "holds_another",
    "in_blocks",
    "join_shards",
    "load_shard",
    "load_tensors",
    "memory_layout",
    "mtp_tensors",
    "open_shards",
    "rank_file",
    "rank_files",
    "rank_tensors",
    "read_config",
    "read_end_tokens",
    "require_space",
    "replacing_folder",
    "save_tensors",
    "saving_folder",
    "shard_axis",
    "shard_blocks",
    "sync",
    "tensor_headers",
    "write_card",
    "write_config",
    "write_shards",
    "writing_errors",
]
