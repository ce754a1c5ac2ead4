"""metrics.json of a run: its few figures."""

import json
from pathlib import Path
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


def write_figures(path: Path, figures: dict[str, Any]) -> Path:
    """Writes JSON. The old file stays until the new one is complete. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
