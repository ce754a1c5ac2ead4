"""How long the parts of post-training take, and how much memory: counted rows, at a speed timed once on the model."""

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
    """The speed of this machine on this model, from a timed pass over one row."""

    def __init__(self, model: DecoderForCausalLM, config: PosttrainConfig):
        self._tokens, self._answer = config.tokens + config.new_tokens, config.new_tokens
        row = PhaseConfig(steps=1, context=self._tokens, sequences=1)
        run = TrainConfig(
            "adapt", "", "", (row,), selection=config.selection != "dense" and model.is_sparse,
            activation_checkpointing=config.activation_checkpointing,
        )  # fmt: skip
        self._row, _ = estimate(run, STAGE, model, torch.device(config.device))

    def of(self, work: Work, micro_batch: int) -> cost.Estimate:
        """Memory and time of the work; tokens: of all rows. Checkpoints and the loading of models are left out."""
        read = READ * (work.read + SAID * work.answers * self._answer / self._tokens)
        rows = work.trained + work.read
        return replace(
            self._row,
            tokens=rows * self._tokens + work.answers * self._answer,
            seconds=self._row.seconds * (work.trained + read),
            activation_bytes=self._row.activation_bytes * micro_batch,
        )
