"""Checkpoints on disk: tensor names as data, safetensors streamed in and out, folders replaced all at once.

names.py says what a checkpoint holds, export.py what other programs read, reading.py streams it in, writing.py out, and
folder.py replaces one folder by another.
"""

from tokensieve.checkpoint.export import export_config, exportable
from tokensieve.checkpoint.folder import replacing_folder
from tokensieve.checkpoint.names import ARCHITECTURES, FLOAT32_SUFFIXES, expected_tensors, memory_layout
from tokensieve.checkpoint.reading import Extras, load_tensors, mtp_tensors, read_config
from tokensieve.checkpoint.writing import save_tensors

__all__ = [
    "ARCHITECTURES",
    "FLOAT32_SUFFIXES",
    "Extras",
    "expected_tensors",
    "export_config",
    "exportable",
    "load_tensors",
    "memory_layout",
    "mtp_tensors",
    "read_config",
    "replacing_folder",
    "save_tensors",
]
