"""metrics.json of a run in several parts: the figures of those that are done, and the seconds of every part.

The same command continues such a run where it was stopped, by Ctrl-C, by a kill, or on purpose.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.files import is_free, write_json

NOTED = 10  # seconds of a part's time that a kill can lose, at most


class Clock:
    """The time of one part in metrics.json. `tick` brings it up to date now and then, lest a kill lose all of it."""

    def __init__(self, record: "RunRecord", part: str):
        self.record, self.part = record, part
        self.before, self.begin = record.figures["seconds"].get(part, 0.0), time.perf_counter()
        self.note()

    def note(self) -> None:
        """Writes the time so far, and whatever else the figures now hold."""
        self.noted = time.perf_counter()
        self.record.figures["seconds"][self.part] = self.before + self.noted - self.begin
        self.record.write()

    def on_step(self, step: int, figures: dict[str, float]) -> None:
        """What a training run calls after every step."""
        self.tick()

    def tick(self) -> None:
        """`note`, if `NOTED` seconds have passed since the last one."""
        if time.perf_counter() - self.noted > NOTED:
            self.note()


class RunRecord:
    """metrics.json: {"settings": digests by part, "seconds": by part, and the figures of each part that is done}.

    leaves: the parts in their order, each with the folders that it leaves; the last of them is its model. A part
    without folders leaves its figures alone, by the part that they are of.
    """

    def __init__(self, path: Path, leaves: Mapping[str, tuple[str, ...]], figures: dict[str, Any]):
        self.path, self.leaves, self.figures = path, leaves, figures

    @classmethod
    def of(cls, out: Path, leaves: Mapping[str, tuple[str, ...]], resume: bool, kind: str) -> "RunRecord":
        """UserError if the folder holds something else, or without `resume` a run. kind: of run, as messages name it.

        It is written first of all.
        """
        path = out / "metrics.json"
        if is_free(out):
            return cls(path, leaves, {"settings": {}, "seconds": {}})
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
            known = isinstance(figures["settings"], dict) and isinstance(figures["seconds"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known or (figures["settings"] and figures["settings"].keys().isdisjoint(leaves)):
            raise UserError(f"{out} is there and is no folder of a {kind}; name another one with --out")
        if not resume:
            done = [part for part in leaves if part in figures]
            reached = f" (up to {done[-1]})" if done else ""
            raise UserError(f"{out} holds a run already{reached}; add --resume to continue it, or name another folder")
        return cls(path, leaves, figures)

    def match(self, settings: dict[str, str]) -> None:
        """Takes these settings. Forgets what is gone or was measured by others; UserError if others trained."""
        then = self.figures["settings"]
        for part, leaves in self.leaves.items():
            if part not in then:
                continue
            changed, trained = then[part] != settings[part], self._folders([part])
            if changed and trained:
                others = [name for name in self.leaves if then.get(name) != settings[name]]
                raise UserError(
                    f"{self.path.parent}: config differs from the run that is there, from {part} on; resume with the "
                    f"same one, name another folder, or remove {', '.join(self._folders(others))} to do that again"
                )
            if changed or (leaves and leaves[-1] not in trained):
                self.figures.pop(part, None)
                for name in (name for name, folders in self.leaves.items() if not folders):
                    self.figures.get(name, {}).pop(part, None)
            if not trained and (changed or leaves):
                self.figures["seconds"].pop(part, None)
        self.figures["settings"] = then | settings

    def _folders(self, parts: list[str]) -> list[str]:
        """The folders that the parts have left."""
        names = [name for part in parts for name in self.leaves[part]]
        return [name for name in names if (self.path.parent / name).exists()]

    @contextmanager
    def timing(self, part: str) -> Iterator[Clock]:
        """Adds the block's time to that of the part."""
        clock = Clock(self, part)
        try:
            yield clock
        finally:
            clock.note()

    def write(self) -> None:
        write_json(self.path, self.figures)
