"""Training: one loop (`loop.run`) and three stages."""

from tokensieve.train.loop import Interrupted, run
from tokensieve.train.tracking import history

__all__ = ["Interrupted", "history", "run"]
