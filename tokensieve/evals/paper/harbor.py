"""Benchmarks that Harbor runs: its command, and the trials that it leaves behind.

Its files: JOBS/job/TRIAL/result.json, one for each answer to each task.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokensieve.evals.paper.asking import Asked, run_harness
from tokensieve.evals.paper.benchmarks import Benchmark
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.evals.paper.needs import local_data
from tokensieve.evals.paper.scores import Graded
from tokensieve.paper_config import PaperConfig

KEY = "OPENAI_API_KEY"


def command(harbor: str, benchmark: Benchmark, config: PaperConfig, asked: Asked, folder: Path) -> list[str]:
    """The command that begins a job, or goes on with the one that lies in `folder`. harbor: path of its program."""
    if (folder / "job" / "config.json").is_file():
        return [harbor, "job", "resume", "--job-path", str(folder / "job")]
    data = local_data(benchmark, config)
    tasks = ["--path", str(data)] if data else ["--dataset", benchmark.task]
    limit = ["--n-tasks", str(config.limit)] if config.limit else []
    return [
        *(harbor, "run", *tasks, *limit),
        *("--agent", "aider", "--model", f"openai/{asked.model}", "--base-url", asked.url, "--api-key-name", KEY),
        *("--jobs-dir", str(folder), "--job-name", "job"),
        *("--n-attempts", str(asked.repeats), "--n-concurrent", str(config.at_once)),
        *("--max-retries", str(config.retries), "--yes", "--quiet"),
    ]


def run(benchmark: Benchmark, config: PaperConfig, asked: Asked, folder: Path) -> list[Graded]:
    """The graded answers to a benchmark. What is finished stays in `folder`, and the next call goes on from there.

    Raises:
        Unavailable: Harbor or its environment failed.
    """
    harbor = asked.program(asked.environment(benchmark.harness), "harbor")
    run_harness(command(harbor, benchmark, config, asked, folder), folder, **{KEY: asked.key})
    return answers(benchmark, folder)


def answers(benchmark: Benchmark, folder: Path) -> list[Graded]:
    """The answers in Harbor's files. Unavailable if there are none, or one of them cannot be read."""
    found = [_graded(benchmark, path) for path in sorted(folder.glob("job/*/result.json"))]
    if not found:
        raise Unavailable(f"Harbor left no trials in {folder}")
    return found


def _graded(benchmark: Benchmark, path: Path) -> Graded:
    """A trial's reward; no score if an exception ended it before there was one."""
    try:
        trial = json.loads(path.read_text(encoding="utf-8"))
        rewards = (trial.get("verifier_result") or {}).get("rewards")
        value = None if rewards is None else float(rewards[benchmark.metric])
        if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"{benchmark.metric} is {value}")
        return Graded(trial["task_name"], value, _tokens(trial))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{path} cannot be read: {error!r}") from error


def _tokens(trial: Mapping[str, Any]) -> int | None:
    steps = [trial, *(trial.get("step_results") or ())]
    counts = [(step.get("agent_result") or {}).get("n_output_tokens") for step in steps]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
