"""Objects that a caller names as `module:name`: a selector, a domain."""

import importlib
from typing import Any

from tokensieve.config import UserError


def named_object(what: str, module: str, name: str) -> Any:
    """The object that `name`, which may have dots, is in a module. UserError, which begins with `what`: no such one.

    An error inside the module is raised as it is.
    """
    if not module or module.startswith("."):
        raise UserError(f"{what}: write MODULE:NAME with the whole name of the module, for example mine.tasks:{name}")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # the module exists, and imports one that does not
        raise UserError(f"{what}: there is no module {error.name}; is it on PYTHONPATH?") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UserError(f"{what}: module {module} has no {name}") from error
    return found
