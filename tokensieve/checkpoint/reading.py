"""Stream a checkpoint folder in: only safetensors, with the headers checked first, and never a pickle."""

import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokensieve.checkpoint import gguf
from tokensieve.checkpoint.folder import previous_of
from tokensieve.checkpoint.formats import refuse_quantized, refuse_renamed
from tokensieve.checkpoint.names import FLOAT32_SUFFIXES, RANK_FILE, expected_tensors, memory_layout
from tokensieve.config import UserError
from tokensieve.families import family_of
from tokensieve.files import refuse_adapter, refuse_file, refuse_gguf, refuse_pointer
from tokensieve.integers import read_json
from tokensieve.ops.quant import SCALE_BLOCK, dequantize_weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RUN_STATE = "state.json"  # beside the weights in a checkpoint of a training run

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
FP8, _SCALE = "F8_E4M3", "_scale_inv"
POWERS = "F8_E8M0"  # scales that are powers of two (UE8M0)
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, FP8: 1, POWERS: 1}  # bytes of one value; no other dtype is read


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the ``config.json`` of a checkpoint folder, unchanged, or that of a GGUF file's metadata.

    Raises UserError if the folder or the file is missing, is not a JSON object, or is of another architecture.
    """
    if gguf.is_gguf(folder):
        return gguf.read_config(Path(folder))
    path = Path(folder) / "config.json"
    refuse_file(Path(folder))
    if not Path(folder).is_dir():
        previous = previous_of(Path(folder))
        hint = f"an interrupted save left it in {previous}: rename that" if previous.is_dir() else "check the path"
        raise UserError(f"{folder}: no such folder; {hint}")
    refuse_adapter(Path(folder))
    if not path.is_file():
        refuse_gguf(Path(folder))
        raise UserError(f"{path}: not found; a checkpoint folder needs the config.json that came with its weights")
    config = _read_json(path)
    family_of(config, str(path))
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise UserError(f"{path}: quantization_config is {quantization!r}; it must be an object, or null")
    return config


def read_end_tokens(folder: str | Path) -> list[int]:
    """Tokens that end an answer: those of config.json and of generation_config.json, which need not be there.

    Raises UserError for a file that is no JSON object, and for an `eos_token_id` that is neither a number nor a list.
    """
    tokens: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        named = _read_json(path).get("eos_token_id") if path.is_file() else None
        these = named if isinstance(named, list) else [] if named is None else [named]
        if not all(isinstance(token, int) for token in these):
            raise UserError(f"{path}: eos_token_id is {named!r}; it must be a token's number, or a list of them")
        tokens |= {*these}
    return sorted(tokens)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        refuse_pointer(path)
        raise UserError(f"{path}: not readable as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; copy or download it again")
    return value


class Shards:
    """Tensors in safetensors files. Only headers are read until a tensor is read.

    stored: for each name, the file and the tensor's name there. block: rows and columns of an FP8 block.
    """

    def __init__(self, stored: dict[str, tuple[Path, str]], block: tuple[int, int]) -> None:
        self.block = block
        self.file_of = {name: path for name, (path, _) in stored.items()}
        self._inside = {name: inside for name, (_, inside) in stored.items()}
        self.reopen()
        names = {path: set(handle.keys()) for path, handle in self._handles.items()}
        for path, inside in stored.values():
            if inside not in names[path]:
                raise UserError(f"{path}: lacks {inside}, which {INDEX} promises; copy or download it again")
        views = {name: self._handles[path].get_slice(inside) for name, (path, inside) in stored.items()}
        self.shape = {name: tuple(view.get_shape()) for name, view in views.items()}
        self.dtype = {name: view.get_dtype() for name, view in views.items()}
        refuse_quantized(self.file_of)
        for name, dtype in self.dtype.items():
            if dtype == FP8:
                self._check_scale(name)

    def reopen(self) -> None:
        """Open the files anew, so that parts read so far are no longer mapped, unless a tensor still aliases them."""
        self._handles = {path: open_file(path) for path in dict.fromkeys(self.file_of.values())}

    def _check_scale(self, name: str) -> None:
        blocks = tuple(math.ceil(size / step) for size, step in zip(self.shape[name], self.block, strict=False))
        scale = self.shape.get(name + _SCALE)
        if scale is not None and len(scale) < 2:
            raise UserError(
                f"{self.file_of[name]}: {name + _SCALE} is {scale}, one scale a tensor or row, which is not supported; "
                "use the bf16 or FP8-block weights"
            )
        if len(self.shape[name]) != 2 or self.shape.get(name + _SCALE) != blocks:
            raise UserError(
                f"{self.file_of[name]}: {name} is FP8 {self.shape[name]}, but {name + _SCALE} is "
                f"{self.shape.get(name + _SCALE, 'missing')} instead of {blocks}; weight_block_size in config.json "
                f"must be the one it was quantized with, now {list(self.block)}"
            )

    def names(self) -> list[str]:
        """Return the names of the tensors, without those that are the scales of another."""
        scales = {name + _SCALE for name, dtype in self.dtype.items() if dtype == FP8}
        return [name for name in self.shape if name not in scales]

    def with_scale(self, name: str) -> list[str]:
        """Return a tensor's name, followed by that of its scales if it is FP8."""
        return [name, name + _SCALE] if self.dtype[name] == FP8 else [name]

    def size(self, name: str) -> int:
        """Return the size of a stored tensor in bytes."""
        return math.prod(self.shape[name]) * _BYTES[self.dtype[name]]

    def read(self, name: str, fp8_dtype: torch.dtype = torch.bfloat16, rows: slice = slice(None)) -> torch.Tensor:
        """Return rows of a tensor as stored, FP8 blocks multiplied out in ``fp8_dtype``. May alias the file."""
        if self.dtype[name] == FP8:
            return dequantize_weight(self.piece(name), self.piece(name + _SCALE), self.block, fp8_dtype)[rows]
        if rows == slice(None):
            return self.piece(name)
        return self._handles[self.file_of[name]].get_slice(self._inside[name])[rows]

    def piece(self, name: str, axis: int | None = None, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Return one of ``parts`` equal slices along ``axis`` (None: the whole), as stored. May alias the file."""
        handle, inside = self._handles[self.file_of[name]], self._inside[name]
        if axis is None or parts == 1:
            return handle.get_tensor(inside)
        size = self.shape[name][axis] // parts
        span = slice(part * size, (part + 1) * size)
        view = handle.get_slice(inside)
        return view[span] if axis == 0 else view[:, span].contiguous()


def open_file(path: Path) -> Any:
    """Open a safetensors file and read its header. Raises UserError if it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing though the index names it; {_replacement(path)}") from error
    except RuntimeError as error:  # torch's, on a file that does not fit into the address space
        raise UserError(
            f"{path}: cannot be mapped into memory ({' '.join(str(error).split())[:200]}); raise the limit of the "
            "address space (ulimit -v), or free memory"
        ) from error
    except (SafetensorError, OSError) as error:
        refuse_pointer(path)
        raise UserError(f"{path}: truncated or corrupt ({error}); {_replacement(path)}") from error


def _replacement(path: Path) -> str:
    """How to replace a damaged file: nobody can download what a training run wrote."""
    if (path.parent / RUN_STATE).is_file():
        return f"remove {path.parent} to resume from the checkpoint before it"
    return "copy or download it again"


def _stored(folder: Path) -> dict[str, tuple[Path, str]]:
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        path = _find_single(folder)
        names = open_file(path).keys()
        return {name: (path, name) for name in names}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: has no weight_map of file names; copy or download it again")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if len(missing) > 1:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing though {INDEX} names them, {missing[0]} the "
            "first; complete the download"
        )
    return {name: (folder / file, name) for name, file in weight_map.items()}


def rank_files(folder: Path) -> dict[int, set[str]]:
    """Return the names of the inference demo's shards in a folder, by the number of ranks that they are for."""
    by_ranks: dict[int, set[str]] = {}
    if gguf.is_gguf(folder):
        return by_ranks
    for path in folder.iterdir():
        if file := RANK_FILE.fullmatch(path.name):
            by_ranks.setdefault(int(file[2]), set()).add(path.name)
    return by_ranks


def _find_single(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    if by_ranks := rank_files(folder):
        count = max(by_ranks)
        raise UserError(
            f"{folder}: holds the shards of the inference demo for {count} ranks; torchrun --nproc-per-node {count} -m "
            f"tokensieve generate {folder} --interactive runs them, tokensieve convert {folder} NEW_FOLDER --reverse "
            "makes a checkpoint of them"
        )
    refuse_adapter(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{folder}: {len(files)} safetensors files and no {INDEX}; copy the index beside them")
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if pickles:
        raise UserError(
            f"{folder}: {pickles[0]} is a pickle, which can run code and is never loaded; if you trust it, convert "
            "with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    refuse_gguf(folder)
    raise UserError(f"{folder}: no safetensors file; a checkpoint needs {SINGLE}, or shards and {INDEX}")


def open_shards(folder: str | Path) -> Shards:
    """Open a checkpoint folder. Raises UserError for damaged files and for a quantization that is not FP8 in blocks."""
    if gguf.is_gguf(folder):
        raise UserError(
            f"{folder}: a GGUF file, and safetensors are needed here; write them: "
            f"tokensieve.save(tokensieve.load({str(folder)!r}), FOLDER)"
        )
    block = fp8_block(folder)
    return Shards(_stored(Path(folder)), block)


def fp8_block(folder: str | Path) -> tuple[int, int]:
    """Return rows and columns of the FP8 blocks, from config.json; if it names none, those of the published weights."""
    # Read from the file, since a config object describes the model in memory, which is never quantized.
    quantization = read_config(folder).get("quantization_config") or {}
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise UserError(f"{folder}: quantized with {method}, which is not supported; use the bf16 or FP8-block weights")
    block = quantization.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise UserError(
            f"{folder}: weight_block_size is {block}, not the rows and columns of an FP8 block; correct it in "
            "config.json, [128, 128] for the published weights"
        )
    return block[0], block[1]


def mtp_names(shards: Shards, config: Any) -> list[str]:
    """Return the tensors of the layers past the last, as many layers as the config counts, without their scales."""
    first = config.num_hidden_layers
    layers = range(first, first + (getattr(config, "num_nextn_predict_layers", None) or 0))
    return [name for name in shards.names() if (at := _LAYER.match(name)) and int(at[1]) in layers]


def check_tensors(folder: str | Path, expected: dict[str, tuple[int, ...]], config: Any, shards: Shards) -> None:
    """Raise UserError, naming tensor and remedy, unless ``shards`` holds all ``expected`` tensors and no other."""
    for name, shape in expected.items():
        if name in shards.shape and shards.shape[name] != shape:
            raise UserError(
                f"{shards.file_of[name]}: {name} is {shards.shape[name]}, but config.json makes it {shape}; "
                "use the config.json that belongs to these weights"
            )
        for part in shards.with_scale(name) if name in shards.shape else ():
            if shards.dtype[part] not in _BYTES or (shards.dtype[part] == POWERS and part == name):
                raise UserError(
                    f"{shards.file_of[part]}: {part} is stored as {shards.dtype[part]}; use bf16 or FP8 weights"
                )
    ignored = set(mtp_names(shards, config)) | {"lm_head.weight"}  # a tied lm_head is compared instead
    present = [name for name in shards.names() if not name.endswith(".rotary_emb.inv_freq")]
    missing = [name for name in expected if name not in shards.shape]
    surplus = [name for name in present if name not in expected and name not in ignored]
    if missing:
        refuse_renamed(Path(folder), missing, present)
    for names, complaint, remedy in (
        (missing, "missing", "complete the download, or use the config.json that belongs to these weights"),
        (surplus, "unknown", "use the config.json that belongs to these weights (its layer, expert and MTP counts)"),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            is_are = "tensor is" if len(names) == 1 else "tensors are"
            raise UserError(f"{folder}: {len(names)} {is_are} {complaint}: {', '.join(names[:3])}{more}; {remedy}")


@dataclass(frozen=True)
class Header:
    """Description of a stored tensor: its file, shape, and dtype as safetensors writes it ("BF16", "F8_E4M3")."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def tensor_headers(folder: str | Path, config: Any) -> dict[str, Header]:
    """Return name -> :class:`Header` of every tensor in a checkpoint folder, scales and MTP layers included.

    Only headers are read. Raises UserError as :func:`load_tensors` does.
    """
    shards = open_shards(folder)
    check_tensors(folder, expected_tensors(config), config, shards)
    check_tied(folder, config, shards)
    return {name: Header(file, shards.shape[name], shards.dtype[name]) for name, file in shards.file_of.items()}


def block_tensors(folder: str | Path, config: Any) -> set[str]:
    """Return the in-memory names whose tensors a checkpoint folder stores in FP8 blocks of 128 x 128.

    The parts of a fused tensor must consist of whole blocks.
    """
    return set() if gguf.is_gguf(folder) else blocks_in(open_shards(folder), memory_layout(config))


def blocks_in(shards: Shards, layout: dict[str, list[str]]) -> set[str]:
    """Return :func:`block_tensors` of opened files that hold the tensors of ``layout``."""
    if shards.block != (SCALE_BLOCK, SCALE_BLOCK):
        return set()
    return {
        name
        for name, parts in layout.items()
        if all(shards.dtype.get(part) == FP8 for part in parts)
        and (len(parts) == 1 or all(shards.shape[part][0] % SCALE_BLOCK == 0 for part in parts))
    }


def load_tensors(
    folder: str | Path,
    config: Any,
    dtype: torch.dtype,
    kept: Collection[str] = (),
    rows: Callable[[str], slice] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream the tensors of a checkpoint folder: (in-memory name, tensor), in the order of the model.

    folder: a ``model.safetensors``, or shards and their index, and the ``config.json`` that describes their
    quantization. config: the transformers config made from it. Tensors come on the CPU in ``dtype``, owning their
    memory; the router's correction bias and the indexer's ``weights_proj`` stay float32. FP8 blocks are multiplied out
    by ``weight_scale_inv``. Names in ``kept``, a subset of :func:`block_tensors`, come as stored, each followed by its
    scales as NAME_scale_inv. Besides the tensor last yielded, at most one layer's fused experts are held. A tied
    ``lm_head`` is not yielded. rows: for an in-memory name, the rows (of fused experts, the experts) that are wanted;
    no others are read, but for a GGUF file, which is read whole. Not together with ``kept``.
    Headers are checked before this returns: raises UserError, naming file, tensor and remedy, for a truncated or
    corrupt file, a missing, unknown or misshapen tensor, an unknown quantization, or a folder that holds only pickles.
    A GGUF file is read by `gguf.load_tensors` instead.
    """
    if gguf.is_gguf(folder):
        whole = gguf.load_tensors(Path(folder), config, dtype)
        return whole if rows is None else ((name, tensor[rows(name)]) for name, tensor in whole)
    shards = open_shards(folder)
    check_tensors(folder, expected_tensors(config), config, shards)
    check_tied(folder, config, shards)
    return stream(shards, memory_layout(config), dtype, kept, rows)


def check_tied(folder: str | Path, config: Any, shards: Shards) -> None:
    """Raise UserError if the config ties ``lm_head`` to the embedding and the stored ``lm_head`` differs from it."""
    tied_twice = config.tie_word_embeddings and "lm_head.weight" in shards.shape
    if tied_twice and not torch.equal(shards.read("lm_head.weight"), shards.read("model.embed_tokens.weight")):
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding to which config.json ties it; "
            "set tie_word_embeddings to false in config.json"
        )


def stream(
    shards: Shards,
    layout: dict[str, list[str]],
    dtype: torch.dtype,
    kept: Collection[str] = (),
    rows: Callable[[str], slice] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (in-memory name, tensor) for the ``layout`` of :func:`memory_layout`; the rest as :func:`load_tensors`."""
    for name, parts in layout.items():
        if name in kept:
            for tail in ("", _SCALE):
                pieces = [shards.piece(part + tail) for part in parts]
                if tail:
                    pieces = [piece.float() for piece in pieces]  # UE8M0 scales are powers of two: exact
                if parts == [name]:
                    yield name + tail, pieces[0].clone()
                    continue
                experts = len(parts) // (2 if name.endswith("gate_up_proj") else 1)
                yield name + tail, torch.cat(pieces).unflatten(0, (experts, -1))
            continue
        kind = torch.float32 if name.endswith(FLOAT32_SUFFIXES) else dtype
        own = slice(None) if rows is None else rows(name)
        if parts == [name]:
            yield name, shards.read(name, kind, own).to(kind, copy=True)
            continue
        per_expert = 2 if name.endswith("gate_up_proj") else 1
        parts = parts if rows is None else parts[own.start * per_expert : own.stop * per_expert]
        height = sum(shards.shape[part][0] for part in layout[name][:per_expert])
        fused = torch.empty(len(parts) // per_expert, height, shards.shape[layout[name][0]][1], dtype=kind)
        for part, target in zip(parts, fused.flatten(0, 1).split([shards.shape[p][0] for p in parts]), strict=True):
            target.copy_(shards.read(part, kind))
        yield name, fused


@dataclass(frozen=True)
class Extras:
    """Tensors that the model does not use and a save must not lose: they stay in ``folder``, and a save reads them."""

    folder: Path
    names: tuple[str, ...]

    def check(self) -> "Shards":
        """Return the files that hold them, opened. Raises UserError if the folder or a tensor is gone."""
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder}: gone, and with it the multi-token-prediction layer to be saved; put it back, or set "
                "num_nextn_predict_layers to 0 to save without"
            )
        shards = open_shards(self.folder)
        for name in self.names:
            if name not in shards.shape:
                raise UserError(f"{self.folder}: {name} is gone since the model was loaded; put it back")
        return shards

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors bit for bit, FP8 blocks multiplied out to bfloat16. Raises UserError as :meth:`check`."""
        shards = self.check()
        for name in self.names:
            yield name, shards.read(name)


def mtp_tensors(folder: str | Path, config: Any) -> Extras | None:
    """Return the multi-token-prediction tensors of a checkpoint (published: ``model.layers.61.*``), or None.

    They belong to the ``num_nextn_predict_layers`` layers from ``num_hidden_layers`` on. Only headers are read. A
    config that counts such a layer while the folder has none is fine. Raises UserError for an unreadable file.
    """
    names = [] if gguf.is_gguf(folder) else mtp_names(open_shards(folder), config)
    return Extras(Path(folder).resolve(), tuple(names)) if names else None
