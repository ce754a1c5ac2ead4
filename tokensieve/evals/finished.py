"""Measurements of an evaluation that takes long: each is kept as soon as it is made, so that a stopped run goes on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.files import write_json


class Finished:
    """Measurements by name, as JSON has them, and in a file if one is named: {"asked", "ended", "measured": {name}}.

    path: of the file; None keeps them for this process alone. asked: everything that the measurements depend on.
    """

    def __init__(self, path: Path | None = None, asked: Mapping[str, Any] | None = None):
        self.path = path
        self._record: dict[str, Any] = {"asked": _as_json(asked or {}), "ended": False, "measured": {}}

    @classmethod
    def of(cls, path: Path, asked: Mapping[str, Any], resume: bool) -> "Finished":
        """The measurements of a run that is begun, or with `resume` of the one that the file holds.

        Raises:
            UserError: without `resume`, the file holds a run that was stopped; with it, none, or one that asked for
                something else.
        """
        new = cls(path, asked)
        if not path.exists():
            if resume:
                raise UserError(f"{path} is not there, so nothing can be resumed; leave --resume out")
            return new
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            ended, known, measured = before["ended"], {**before["asked"]}, {**before["measured"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read; remove it, or name another folder with --out") from error
        if not resume:
            if not ended:
                raise UserError(
                    f"{path.parent} holds a run that was stopped after {len(measured)} measurements; add --resume to "
                    f"go on with it, remove {path.name} to begin anew, or name another folder with --out"
                )
            return new
        asks = new._record["asked"]
        changed = [name for name in {**known, **asks} if known.get(name) != asks.get(name)]
        if changed:
            raise UserError(
                f"--resume: {', '.join(changed)} differ from those of {path}; repeat the same command, or name another "
                "folder with --out"
            )
        new._record["measured"] = measured
        return new

    def __contains__(self, name: str) -> bool:
        return name in self._record["measured"]

    def __getitem__(self, name: str) -> Any:
        return self._record["measured"][name]

    def add(self, name: str, figures: Any) -> Any:
        """Keeps the figures and returns them, as JSON has them."""
        self._record["measured"][name] = _as_json(figures)
        self._write()
        return self[name]

    def end(self) -> None:
        """Nothing is left to measure."""
        self._record["ended"] = True
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self._record)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
