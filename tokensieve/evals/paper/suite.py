"""The paper's benchmarks of one model, in the order of its Table 1, in a record that is written after each of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokensieve.config import UserError
from tokensieve.evals.endpoint import Endpoint, Refused, served_model
from tokensieve.evals.paper import codeforces, evalscope, harbor
from tokensieve.evals.paper.asking import LOG, Asked
from tokensieve.evals.paper.benchmarks import BENCHMARKS, BY_KEY, Benchmark
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.evals.paper.needs import lacking, source
from tokensieve.evals.paper.scores import Graded, compared, figures, read_answers
from tokensieve.files import locked
from tokensieve.paper_config import PaperConfig
from tokensieve.run_record import RunRecord

# What servers call the tokens of a context in a model's card: vLLM, SGLang and we; OpenRouter and LM Studio; Groq;
# Mistral.
CONTEXT_FIELDS = "max_model_len", "context_length", "context_window", "max_context_length"
LACKING = "lacking"  # the record's key of what has no score: {key: reason}
RUN: Mapping[str, Callable[[Benchmark, PaperConfig, Asked, Path], list[Graded]]] = {
    "evalscope": evalscope.run,
    "evalscope-agents": evalscope.run,
    "harbor": harbor.run,
    "own": codeforces.run,
}


def judge_paper(
    endpoint: Endpoint,
    name: str,
    config: PaperConfig,
    folder: Path,
    resume: bool,
    announce: Callable[[str], object],
    key: str = "none",
    judge_key: str = "none",
) -> dict[str, Any]:
    """Asks the benchmarks that can be asked, and lists why the others cannot; returns the record.

    Args:
        name: of the model, by which a resumed run knows that it is the same one; a record has one model.
        folder: of metrics.json and the harnesses' files. What is finished in it is not asked again.
        announce: called with a line for whatever takes long.
        key, judge_key: of the endpoint and of the judge's.

    Returns {"settings", "seconds", KEY: `scores.figures` with "asked": its settings, "lacking": {KEY: reason}}.

    Raises:
        UserError: the endpoint is down or answers nonsense, a benchmark is unknown, or the folder holds another run,
            or one of another model. What is finished is kept.
    """
    chosen = _chosen(config)
    model, room = _served(endpoint, config)
    asked = Asked(endpoint.url, model, 1, 1, announce, key, judge_key)
    settings = {benchmark.key: _settings(benchmark, config, f"{name} {model}", room) for benchmark in chosen}
    with locked(folder):
        record = RunRecord.of(folder, dict.fromkeys(BY_KEY, ()), resume, "run of the paper's suite")
        then = record.figures["settings"]
        others = {json.loads(found)["model"] for found in then.values()} - {f"{name} {model}"}
        if others:
            raise UserError(f"{folder} holds a run of {others.pop()}, not {name} {model}; name another one with --out")
        record.match(then | {part: json.dumps(found, sort_keys=True) for part, found in settings.items()})
        record.figures.setdefault(LACKING, {})
        record.write()
        for benchmark in chosen:
            if benchmark.key in record.figures:
                continue
            how = settings[benchmark.key]
            tokens = how.get("max_tokens", 0)
            longest = None if room is None else room - tokens
            one = replace(asked, max_tokens=tokens, repeats=how["repeats"], longest_prompt=longest)
            place = folder / f"{benchmark.key}-{_digest(how)}"
            reason = lacking(benchmark, config, endpoint.url)
            if reason is None:
                announce(f"{benchmark.name}: the harness writes to {place / LOG}")
                try:
                    with record.timing(benchmark.key):
                        found = figures(RUN[benchmark.harness](benchmark, config, one, place), benchmark.is_rating)
                    reason = None if found["score"] else "no answer was graded: see its folder"
                except (Unavailable, UserError) as error:
                    reason = str(error)
                    _check(endpoint)
            if reason is None:
                record.figures[benchmark.key] = found | {"asked": how}
                record.figures[LACKING].pop(benchmark.key, None)
            else:
                record.figures[LACKING][benchmark.key] = reason
            record.write()
    return record.figures


def compare_models(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """{"key", "a", "b": scores, "difference": an Estimate as a dict, "tokens": of both} of what both records hold, and
    why benchmarks of both that were not asked alike are left out.

    The difference is that of the shares of right answers to the problems that both answered, of b less a, with the
    interval for pairs; for Codeforces too.

    Raises:
        UserError: nothing is left to compare.
    """
    rows, left_out = [], []
    for benchmark in BENCHMARKS:
        first, second = a.get(benchmark.key), b.get(benchmark.key)
        if not first or not second:
            continue
        settings = dict.fromkeys([*first["asked"], *second["asked"]])
        differing = [name for name in settings if first["asked"].get(name) != second["asked"].get(name)]
        if names := ", ".join(name for name in differing if name != "model"):
            left_out.append(f"{benchmark.name} was not asked alike: {names} differ; ask one of the models again")
            continue
        found = compared(read_answers(second["graded"]), read_answers(first["graded"]))
        if found is not None:
            scores = {"a": first["score"], "b": second["score"], "tokens": [first["tokens"], second["tokens"]]}
            rows.append({"key": benchmark.key, **scores, "difference": found.to_dict()})
    if not rows:
        raise UserError("; ".join(left_out) or "no benchmark has a score in both; ask both models the same ones")
    return rows, left_out


def _chosen(config: PaperConfig) -> list[Benchmark]:
    unknown = [key for key in config.benchmarks if key not in BY_KEY]
    if unknown:
        raise UserError(f"benchmarks: no {', '.join(unknown)}; known are {', '.join(BY_KEY)}")
    return [benchmark for benchmark in BENCHMARKS if not config.benchmarks or benchmark.key in config.benchmarks]


def _served(endpoint: Endpoint, config: PaperConfig) -> tuple[str, int | None]:
    """The model's id, and the tokens of its longest context; None if neither settings nor endpoint say."""
    model, cards = served_model(endpoint, config.model, "" if config.model else "name the model with --set model=ID")
    listed = [cards[model].get(name) for name in CONTEXT_FIELDS]
    room = next((found for found in listed if isinstance(found, int) and found > 0), None)
    return model, config.context or room


def _check(endpoint: Endpoint) -> None:
    """UserError if the endpoint is gone, which no other benchmark survives either."""
    with suppress(Refused):  # then it is there, and lists no models
        endpoint.models()


def _settings(benchmark: Benchmark, config: PaperConfig, model: str, room: int | None) -> dict[str, Any]:
    """All that a benchmark's score depends on. Nothing of how it is sampled reaches an agent of Harbor.

    UserError if answers take the whole context.
    """
    # Some servers refuse a prompt if it and max_tokens together are too long, and an agent's prompts grow.
    fits = benchmark.max_tokens if room is None else min(benchmark.max_tokens, room // (8 if benchmark.agent else 2))
    found: dict[str, Any] = {
        "model": model,
        "task": benchmark.task,
        "options": dict(benchmark.options),
        "repeats": config.repeats or benchmark.repeats,
        "limit": config.limit,
        "data": source(benchmark, config),
    }
    if benchmark.harness != "harbor":
        sampling = {"temperature": config.temperature, "top_p": config.top_p}
        tokens = config.max_tokens or fits
        if room is not None and not 0 < tokens < room:
            raise UserError(
                f"max_tokens is {tokens} and the context {room}, which leaves no room for prompts: lower max_tokens, "
                "or set context"
            )
        found |= {"max_tokens": tokens, **sampling}
    if benchmark.task == evalscope.TERMINAL:
        found["context"] = room
    if "judge" in benchmark.needs:
        found["judge_model"] = config.judge_model
    if "search" in benchmark.needs:
        found |= {"search_url": config.search_url, "steps": config.steps}
    return found


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
