"""Files that are written whole, folders that must be free, and the folders that models are named by."""

import importlib.resources
import json
from pathlib import Path
from typing import Any

from tokensieve.config import UserError


def write_text(path: str | Path, text: str) -> Path:
    """Writes a UTF-8 file, making its folder if it is missing; returns the path.

    The old file stays until the new one is complete, so neither a full disk nor a kill leaves half a file.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        remedy = "free some space or choose another folder"
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy}") from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON that ends with a newline; otherwise as `write_text`."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def is_free(folder: str | Path) -> bool:
    """Whether a folder can be made here: nothing has the name, or an empty folder has it."""
    folder = Path(folder)
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_free(folder: str | Path) -> None:
    """UserError if something stands where the folder is to be made."""
    if not is_free(folder):
        raise UserError(f"{folder} exists already; name a new folder, or remove it first")


def refuse_file(path: Path) -> None:
    """Raises UserError if the path of a checkpoint folder is that of a file."""
    if path.suffix == ".gguf" and path.is_file():
        raise UserError(f"{path}: a GGUF file, which is not read; give the folder of the safetensors it was made from")
    if path.is_file():
        raise UserError(f"{path}: a file; give the folder that holds it, its config.json and its tokenizer")


def known_folder(model: str | Path) -> Path | None:
    """The folder of a model that is on this machine: a path as given, or a bundled model by name (`base`, `sparse`).

    None for the name of one on the hub (owner/name), which is not looked up here. UserError for any other name, and for
    a file's.
    """
    path = Path(model)
    if path.is_dir():
        return path
    refuse_file(path)
    root = Path(str(importlib.resources.files("tokensieve") / "bundled"))
    if (root / str(model)).is_dir():
        return root / str(model)
    if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return None
    bundled = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir()))
    raise UserError(
        f"model {str(model)!r}: no such folder, and not a bundled model ({bundled}); "
        "give a checkpoint folder or owner/name"
    )
