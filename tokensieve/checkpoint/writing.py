"""Stream a checkpoint folder out, in shards, in the published layout."""

import errno
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from tokensieve.checkpoint.blocks import PUBLISHED, quantized
from tokensieve.checkpoint.export import export_config
from tokensieve.checkpoint.folder import replacing_folder
from tokensieve.checkpoint.names import expected_tensors, memory_layout
from tokensieve.checkpoint.reading import Extras

T = TypeVar("T")


def save_tensors(
    folder: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    extras: Extras | None = None,
    shard_bytes: float = 5e9,
    in_fp8: bool = False,
) -> None:
    """Write a checkpoint folder in the published layout; the old one stays whole until all is on disk.

    config: a dict of config fields, rewritten by :func:`export_config`. tensors: (in-memory name, tensor) in any order,
    on any device; they are written in their own dtype, experts split up again, a tied ``lm_head`` left out. extras: the
    result of :func:`mtp_tensors`. in_fp8: matrices are quantized in blocks, as `blocks.py` says. The folder gets shards
    of at most ``shard_bytes`` (a larger tensor gets one of its own) and an index, or a single file. Other files of the
    folder (tokenizer, README) stay. Raises UserError for a full disk or a folder that cannot be replaced, ValueError
    for tensors that do not make up ``config``'s model.
    """
    with replacing_folder(folder) as new:
        writer = ShardWriter(new, shard_bytes)
        exported = add_model(writer, config, tensors, extras, in_fp8)
        writer.close()
        write_config(new, exported)


def add_model(
    writer: "ShardWriter",
    config: dict[str, Any],
    tensors: Iterable[tuple[str, torch.Tensor]],
    extras: Extras | None = None,
    in_fp8: bool = False,
) -> dict[str, Any]:
    """Add the tensors of a model to a writer, under the names of the published layout. Return their config.json.

    The arguments, and the errors of unsuitable tensors, are those of :func:`save_tensors`. A layer's fused experts may
    come in several tensors of one name, some experts in each, in their order.
    """
    model = SimpleNamespace(**config)
    shapes, layout = expected_tensors(model), memory_layout(model)
    dtype: torch.dtype | None = None
    for name, tensor in tensors:
        if name == "lm_head.weight" and model.tie_word_embeddings:
            continue
        if name not in layout:
            raise ValueError(f"{name} is not a tensor of this {model.model_type}, or came twice")
        parts = layout.pop(name)
        rows = tensor.detach().flatten(0, 1) if len(parts) > 1 or tensor.dim() == 3 else tensor.detach()
        ends = list(itertools.accumulate(shapes[part][0] for part in parts))
        if rows.shape[0] not in ends or shapes[parts[0]][1:] != rows.shape[1:]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, which does not make up {parts[0]} {shapes[parts[0]]}")
        count = ends.index(rows.shape[0]) + 1
        if count < len(parts):
            layout[name] = parts[count:]
        if dtype is None:  # nearly all tensors have one dtype, so the first one is enough to know the total size
            writer.expect(sum(math.prod(shape) for shape in shapes.values()) * tensor.element_size())
        if dtype is None or name == "model.embed_tokens.weight":
            dtype = tensor.dtype
        for part, piece in zip(parts[:count], rows.split([shapes[part][0] for part in parts[:count]]), strict=True):
            for stored, values in quantized(part, piece) if in_fp8 else ((part, piece),):
                writer.add(stored, values)
    if layout or dtype is None:
        raise ValueError(f"{len(layout)} tensors are missing, the first is {next(iter(layout), None)}")
    for name, tensor in extras.read() if extras else ():
        for stored, values in quantized(name, tensor) if in_fp8 else ((name, tensor),):
            writer.add(stored, values)
    exported = export_config(config, dtype, mtp=extras is not None)
    return exported | ({"quantization_config": PUBLISHED} if in_fp8 else {})


def write_config(folder: Path, exported: dict[str, Any]) -> None:
    """Write the config.json that :func:`add_model` returned."""
    (folder / "config.json").write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")


def require_space(folder: Path, size: int) -> None:
    """Raise the OSError of a full disk before ``size`` bytes are written in vain."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.3g} GB are needed, {free / 1e9:.3g} GB are free")


class ShardWriter:
    """Collects tensors and writes them in files of about equal size.

    Several ranks add the same tensors in the same order. Rank r of R keeps and writes the files r, r + R, ..., and rank
    0 the index.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: float,
        stem: str = "model",
        rank: int = 0,
        ranks: int = 1,
        later: bool = False,
    ) -> None:
        """stem: the files are stem.safetensors, or stem-00001-of-00002.safetensors and so on with an index.

        later: tensors are copied to host memory, and nothing is written before `close`.
        """
        self.folder, self.shard_bytes, self.stem = folder, shard_bytes, stem
        self.rank, self.ranks, self.later = rank, ranks, later
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []
        self.kept: dict[int, dict[str, torch.Tensor]] = {}  # by number of the file

    def expect(self, size: int) -> None:
        """Raise the OSError of a full disk if ``size`` bytes cannot be written now.

        With `later` the caller has asked, since an error of one rank alone would leave the others waiting.
        """
        if not self.later:
            require_space(self.folder, size)

    def add(self, name: str, tensor: torch.Tensor, blocks: Iterable[torch.Tensor] | None = None) -> None:
        """blocks: the rows of a tensor that is not all here, some at a time, in their order."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > self.shard_bytes:
            self._end_file()
        own = len(self.shards) % self.ranks == self.rank
        if blocks is not None:
            self.pending[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if own else "meta")
            left = self.pending[name]
            for block in blocks:
                left[: len(block)].copy_(block)
                left = left[len(block) :]
        elif not own:
            self.pending[name] = tensor.to("meta")
        else:
            self.pending[name] = tensor.to("cpu", copy=self.later).contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def own(self, files: Sequence[T]) -> Sequence[T]:
        """Those of all ranks' files that this rank writes."""
        return files[self.rank :: self.ranks]

    def _end_file(self) -> None:
        number = len(self.shards)
        self.shards.append(list(self.pending))
        if number % self.ranks == self.rank:
            self.kept[number] = self.pending
            if not self.later:
                self._write()
        self.pending, self.pending_bytes = {}, 0

    def _write(self) -> None:
        for number in list(self.kept):
            tensors = self.kept.pop(number)
            require_space(self.folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
            save_file(tensors, self.folder / f"{self.stem}.{number}.part", metadata={"format": "pt"})

    def close(self) -> list[str]:
        """Write what is left. Return the names of all files, those of other ranks included."""
        self._end_file()
        self._write()
        count = len(self.shards)
        names = [f"{self.stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [f"{self.stem}.safetensors"]
        for number in self.own(range(count)):
            (self.folder / f"{self.stem}.{number}.part").rename(self.folder / names[number])
        if count > 1 and self.rank == 0:
            file_of = {tensor: name for name, tensors in zip(names, self.shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(file_of.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")
        return names
