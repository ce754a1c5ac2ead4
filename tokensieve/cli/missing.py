"""A package that is not installed: one line that names it, who needs it, and the command that installs it.

Imports the standard library alone, since any other package may be the one that is missing.
"""

import importlib.metadata
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def report_missing() -> Iterator[None]:
    """Ends the program with one line and status 2 if the block imports a package that is not installed.

    A module of tokensieve itself that does not exist is a defect, and raises.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        first = _first(error)
        if first.name is None or first.name.partition(".")[0] == "tokensieve":
            raise
        print(f"tokensieve: error: {_reason(first, first.name)}", file=sys.stderr)
        sys.exit(2)


def _first(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error that an error was raised from: transformers raises its own, without the package's name."""
    cause = error.__cause__
    return _first(cause) if isinstance(cause, ModuleNotFoundError) else error


def _reason(error: ModuleNotFoundError, name: str) -> str:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    importer = next(module for module in reversed(modules) if not module.startswith("importlib."))
    package = name.partition(".")[0]
    install = f"{sys.executable} -m pip"
    required = _requirement(package)
    remedy = f"{install} install '{required}'" if required else f"{install} check names the package to install"
    return f"{importer} imports {name}, which is not installed; {remedy}"


def _requirement(package: str) -> str | None:
    """What tokensieve requires of a package, as pip writes it; None if its metadata does not name the package."""
    try:
        requirements = importlib.metadata.requires("tokensieve") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        plain = requirement.partition(";")[0].strip()
        if re.split(r"[^\w.-]", plain, maxsplit=1)[0].replace("-", "_").lower() == package.lower():
            return plain
    return None
