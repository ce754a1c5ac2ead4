"""Replace a folder by another at once, so that a full disk or a kill never damages the old one."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tokensieve.checkpoint.companions import is_companion
from tokensieve.config import UserError

_CHECKPOINT_FILE = re.compile(
    r"config\.json|model(-\d{5}-of-\d{5}|\d+-mp\d+)?\.safetensors|model\.safetensors\.index\.json"
)


def previous_of(folder: Path) -> Path:
    """Return the path of the old folder between the two renames that replace it on systems without an exchange."""
    return _sibling(folder, "previous")


def _sibling(folder: Path, role: str) -> Path:
    return folder.resolve().with_name(f".{folder.resolve().name}.{role}")


@contextmanager
def writing_errors(folder: Path) -> Iterator[None]:
    """Raise UserError for a full disk, and for other failures of the system while the checkpoint ``folder`` is written.

    Until it is whole its files lie in another folder, so nothing has been changed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a failed write as its own error
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or re.search(
            r"os error (28|122)", str(error)
        )
        remedy = "the disk is full; free space or save elsewhere" if full else "check the path and its permissions"
        raise UserError(f"{folder}: cannot write the checkpoint ({error}); {remedy}; nothing was changed") from error


def saving_folder(folder: Path) -> Path:
    """Return the path of the folder in which the files of the checkpoint ``folder`` are written."""
    return _sibling(folder, "saving")


def begin_folder(folder: Path) -> Path:
    """Make the empty folder :func:`saving_folder`, which :func:`end_folder` will put in the place of ``folder``.

    Raises UserError if ``folder`` is a file or holds folders other than those of :func:`is_companion`.
    """
    new = saving_folder(folder)
    if folder.exists() and (
        not folder.is_dir() or any(path.is_dir() and not is_companion(path) for path in folder.iterdir())
    ):
        raise UserError(f"{folder}: is a file or holds folders, so it is no checkpoint to replace; save elsewhere")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)  # left behind by a save that was killed
    new.mkdir()
    return new


def end_folder(folder: Path) -> None:
    """Put the files of :func:`saving_folder` on the disk, and the folder in the place of ``folder`` at once.

    Files of the old folder that do not belong to a checkpoint are carried over.
    """
    new = saving_folder(folder)
    mode = new.stat().st_mode & 0o666  # a new file's mode under the umask
    for path in new.rglob("*.safetensors"):
        path.chmod(mode)  # safetensors makes files that only their owner may read
    for path in folder.iterdir() if folder.exists() else ():
        if not _CHECKPOINT_FILE.fullmatch(path.name) and not (new / path.name).exists():
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, new / path.name)
    for path in (*new.rglob("*"), new):
        sync(path)
    _swap(new, folder)
    sync(folder.parent)
    shutil.rmtree(new, ignore_errors=True)  # the old folder, if the two were exchanged


@contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends without an error, it takes the place of ``folder`` at once.

    Until then ``folder`` is untouched, and a kill at any moment leaves either the old or the new one whole. Raises
    UserError as :func:`begin_folder`, and if the disk is full.
    """
    folder = Path(folder).resolve()  # a symbolic link stays: its target is replaced
    try:
        with writing_errors(folder):
            yield begin_folder(folder)
            end_folder(folder)
    finally:
        shutil.rmtree(saving_folder(folder), ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        previous = previous_of(folder)
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        new.rename(folder)
        shutil.rmtree(previous)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step and return True, if the system can (Linux). Python has no call for it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
