"""The few figures of a run, for its metrics.json."""

from typing import Any

from tokensieve.config import TrainConfig
from tokensieve.train.schedule import total_steps
from tokensieve.train.tracking import history


def summary(config: TrainConfig) -> dict[str, Any]:
    """{"stage", "steps", "tokens"} of a complete run, and {"first", "last"} for each of its losses."""
    rows = history(config.out)
    names = [k for k in ("loss", "lm", "kl") if rows and k in rows[-1]]
    losses: dict[str, Any] = {k: {"first": rows[0][k], "last": rows[-1][k]} for k in names}
    tokens = sum(p.steps * p.sequences * p.context for p in config.phases)
    return {"stage": config.stage, "steps": total_steps(config.phases), "tokens": tokens, **losses}
