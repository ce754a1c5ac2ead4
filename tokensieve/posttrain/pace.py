"""How long the parts of post-training take, and how much memory: counted rows, at a speed timed once on the model."""

import math
from dataclasses import dataclass, replace

import torch

from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.train.adapt import STAGE
from tokensieve.train.estimate import estimate

READ = 1 / 3  # of a trained row's time that a row takes which is only read: its forward pass
SAID = 10.0  # times that of a token that is read: a token of an answer (docs/results/posttraining.md)


@dataclass(frozen=True)
class Work:
    """What a part has to do: rows that are trained, prompts that are read, answers that are written."""

    trained: int = 0
    read: int = 0
    answers: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.trained + other.trained, self.read + other.read, self.answers + other.answers)


class Pace:
    """The speed of this machine on this model: first from a timed pass over a row, then from the parts that are done.

    A timed pass knows nothing of checkpoints, of the programs of a domain, or of what else the machine does meanwhile.
    """

    def __init__(self, model: DecoderForCausalLM, config: PosttrainConfig):
        self._tokens, self._answer = config.tokens + config.new_tokens, config.new_tokens
        row = PhaseConfig(steps=1, context=self._tokens, sequences=1)
        run = TrainConfig(
            "adapt", "", "", (row,), selection=config.selection != "dense" and model.is_sparse,
            activation_checkpointing=config.activation_checkpointing,
        )  # fmt: skip
        # A whole row: by its FLOPs a short one says too little (docs/results/posttraining.md).
        self._row, _ = estimate(run, STAGE, model, torch.device(config.device), affordable=math.inf)
        self._rows, self._seconds = 0.0, 0.0  # of the parts that are done

    def learn(self, work: Work, seconds: float) -> None:
        """A part with this work took so long."""
        self._rows, self._seconds = self._rows + self._in_rows(work), self._seconds + seconds

    def _in_rows(self, work: Work) -> float:
        """The rows that are trained in the time of this work."""
        return work.trained + READ * (work.read + SAID * work.answers * self._answer / self._tokens)

    def of(self, work: Work, micro_batch: int) -> cost.Estimate:
        """Memory and time of the work; tokens: of all rows. At first checkpoints and loading are left out."""
        speed = self._seconds / self._rows if self._rows else self._row.seconds
        rows = work.trained + work.read
        return replace(
            self._row,
            tokens=rows * self._tokens + work.answers * self._answer,
            seconds=speed * self._in_rows(work),
            activation_bytes=self._row.activation_bytes * micro_batch,
        )
