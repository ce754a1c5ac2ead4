"""Training: one loop (`loop.run`) and three stages. `callbacks.training` serves other trainers."""

from tokensieve.train.loop import Interrupted, Run, run
from tokensieve.train.tracking import history

__all__ = ["Interrupted", "Run", "history", "run"]
