"""Training runs on several ranks: what they lost, how they ended, and the same runs in one process."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ranks
from tokensieve import train
from tokensieve.config import TrainConfig, UserError
from tokensieve.train import saving
from tokensieve.train.state import checkpoints

SEVERAL = 30_000  # bytes of a file, of which the tiny model then has several
ROUNDING = 1e-4  # of losses, relative, after some steps with sums in another order


@dataclass(frozen=True)
class Ended:
    """A run on one rank: its losses, why it ended if it failed, and what it found after each step."""

    losses: list[float]
    error: str = ""
    found: tuple[list[str], ...] = ()


# in a rank's process


def trained(
    settings: TrainConfig,
    resume: bool = False,
    stop: int = 0,
    prepare: Callable[[pytest.MonkeyPatch, int], Callable[[int], None] | None] | None = None,
) -> Ended:
    """A run on this rank.

    stop: the step in which it is given up. prepare: changes this rank; what it returns is called after each step.
    """
    mesh, losses, found = ranks.HERE[0], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "FILE_BYTES", SEVERAL)
        after = prepare(patch, mesh.rank) if prepare else None

        def on_step(done: int, figures: dict[str, float]) -> None:
            losses.append(figures["loss"])
            found.append(sorted(path.name for path in Path(settings.out).glob("*step-*")))
            if after is not None:
                after(done)
            if done == stop:
                raise KeyboardInterrupt

        try:
            train.run(settings, resume=resume, on_step=on_step, progress=False, mesh=mesh)
        except UserError as error:
            return Ended(losses, str(error), tuple(found))
        except KeyboardInterrupt:
            pass
    return Ended(losses, "", tuple(found))


def waiting(patch: pytest.MonkeyPatch, rank: int) -> None:
    """Every checkpoint is finished in the step that it is taken in."""
    settle = saving.Saver.settle
    patch.setattr(saving.Saver, "settle", lambda saver, wait=True: settle(saver))


# here


def run(group: ranks.Group, *arguments: Any) -> Ended:
    """All ranks' answer, which is one."""
    answers = group.ask(trained, *arguments)
    assert all((a.losses, a.error) == (answers[0].losses, answers[0].error) for a in answers)
    return answers[0]


def alone(settings: TrainConfig, resume: bool = False) -> list[float]:
    losses: list[float] = []
    train.run(settings, resume=resume, on_step=lambda _, row: losses.append(row["loss"]), progress=False)
    return losses


def content(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, and the moments."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items() if "rng" not in n}


def assert_same_content(a: Path, b: Path) -> None:
    left, right = content(a), content(b)
    assert left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def back_to(out: str, step: int) -> None:
    """The folder as if a kill had come after this step."""
    for later in checkpoints(Path(out)):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
