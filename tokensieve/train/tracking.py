"""Records of a run's figures: metrics.jsonl always, TensorBoard files and Weights & Biases if `track` names them."""

import json
from pathlib import Path
from typing import Any

from tokensieve.config import TrainConfig, UserError, to_dict
from tokensieve.files import remedy, write_text

METRICS = "metrics.jsonl"
CUT_OFF = 1 << 62  # the step of a line that a kill cut off


class Tracker:
    """Writer of one row per logged step. A resumed run first drops the rows after the step that it resumes from."""

    def __init__(self, config: TrainConfig, first_step: int):
        self.run = Path(config.out)
        self.path = self.run / METRICS
        if self.path.exists():
            lines = self.path.read_text().splitlines() if first_step else []
            earlier = [line for line in lines if _step(line) <= first_step]
            write_text(self.path, "".join(line + "\n" for line in earlier))
        self.file = self.path.open("a", encoding="utf-8")
        self.writers: list[Any] = []
        for name in config.track:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self.writers.append(SummaryWriter(str(self.run / "tensorboard"), purge_step=first_step + 1))
            elif name == "wandb":
                self.writers.append(_Wandb(config))
            else:
                raise UserError(f"track: {name!r} is unknown; use tensorboard or wandb")

    def row(self, step: int, figures: dict[str, float]) -> None:
        try:
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); "
                f"{remedy(error)}, then continue from the last checkpoint with --resume"
            ) from error
        for writer in self.writers:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        for writer in self.writers:
            writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig):
        try:
            import wandb
        except ImportError as error:
            raise UserError("track: wandb is not installed; pip install wandb, or remove it from track") from error
        self.run = wandb.init(project="tokensieve", name=Path(config.out).name, config=to_dict(config), dir=config.out)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.run.log({name: value}, step=step)

    def close(self) -> None:
        self.run.finish()


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return CUT_OFF


def history(run: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl. A last row that a kill cut off is left out."""
    path = Path(run) / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step(line) != CUT_OFF]
