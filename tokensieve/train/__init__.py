"""Training: one loop (`loop.run`) and three stages; `training` for trainers that are not ours."""

from tokensieve.train.loop import Interrupted, Run, run
from tokensieve.train.tracking import history

__all__ = ["Interrupted", "Run", "history", "run"]
