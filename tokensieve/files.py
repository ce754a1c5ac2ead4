"""Files that are written whole, and folders that must be free."""

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
