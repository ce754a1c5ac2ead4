"""Benchmarks that evalscope runs: its task as JSON, and the answers that it leaves behind.

Its files: reviews/MODEL/TASK_SUBSET.jsonl, a graded answer in each line, and predictions/ likewise.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokensieve.evals.paper.asking import Asked, kept_json, run_harness
from tokensieve.evals.paper.benchmarks import Benchmark
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.evals.paper.needs import local_data
from tokensieve.evals.paper.scores import Graded
from tokensieve.paper_config import PaperConfig

# The task comes through standard input, so that no key stands in a list of processes or in a file.
# evalscope cuts no prompts and has no setting of a model's context. Terminal-bench's agent needs one, since it sums up
# its history before that is too long: evalscope gives it max_tokens.
DRIVER = """
import json, sys
from evalscope.run import run_task
given = json.load(sys.stdin)
if given["longest_prompt"] is not None:
    from evalscope.benchmarks.terminal_bench.utils import HarborLLM
    HarborLLM.get_model_context_limit  # raises if it is called otherwise in another version
    HarborLLM.get_model_context_limit = lambda self: given["longest_prompt"]
run_task(given["task"])
"""
TERMINAL = "terminal_bench_v2"

# The same cipher and columns as BrowseComp's, under other names, in a spreadsheet.
CONVERT = """
import sys, pandas
rows = pandas.read_excel(sys.argv[1])
names = {"Question": "problem", "Answer": "answer", "Topic": "problem_topic", "canary": "canary"}
rows.rename(columns=names)[[*names.values()]].to_json(sys.argv[2], orient="records", lines=True)
"""

GRADED = ("success", "fallback")  # statuses of a score that counts
REFUSED = ("model_length", "content_filter")  # why an answer ended that is the endpoint's error message instead


def task(benchmark: Benchmark, config: PaperConfig, asked: Asked, data: Path | None, folder: Path) -> dict[str, Any]:
    """evalscope's TaskConfig. data: the folder with a copy of the benchmark's data; None: from the hub."""
    options = {**benchmark.options, **({"local_path": str(data)} if data else {})}
    found: dict[str, Any] = {
        "model": asked.model,
        "model_id": "model",  # names folders, and ids hold slashes
        "api_url": asked.url,
        "api_key": asked.key,
        "eval_type": "openai_api",
        "datasets": [benchmark.task],
        "dataset_args": {benchmark.task: options},
        "dataset_hub": config.hub,
        "generation_config": {
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_tokens": asked.max_tokens,
            "timeout": config.seconds,
            "retries": config.retries,
        },
        "eval_batch_size": config.at_once,
        "limit": config.limit or None,
        "repeats": asked.repeats,
        "work_dir": str(folder),
        "no_timestamp": True,
        "use_cache": str(folder) if (folder / "predictions").is_dir() else None,
        "seed": 0,
        "judge": {"strategy": "rule"},
    }
    if "judge" in benchmark.needs:
        judge = {"model_id": config.judge_model, "api_url": config.judge_url, "api_key": asked.judge_key}
        found["judge"] = {"strategy": "llm", "models": [{**judge, "eval_type": "openai_api"}]}
    if "search" in benchmark.needs:
        servers = [{"type": "http", "name": "search", "url": config.search_url}]
        found["agent_config"] = {"mode": "native", "max_steps": config.steps, "mcp_servers": servers}
    if "containers" in benchmark.needs:
        found["sandbox"] = {"enabled": True, "engine": "docker"}
    return found


def run(benchmark: Benchmark, config: PaperConfig, asked: Asked, folder: Path) -> list[Graded]:
    """The graded answers to a benchmark. What is finished stays in `folder`, and the next call goes on from there.

    Raises:
        Unavailable: evalscope or its environment failed.
    """
    home = asked.environment(benchmark.harness)
    data = local_data(benchmark, config)
    if benchmark.key == "browsecomp_zh" and data is not None:
        data = _converted(data, folder, asked.program(home))
    given = {
        "task": task(benchmark, config, asked, data, folder),
        "longest_prompt": asked.longest_prompt if benchmark.task == TERMINAL else None,
    }
    run_harness([asked.program(home), "-c", DRIVER], folder, given=json.dumps(given))
    return answers(benchmark, folder)


def answers(benchmark: Benchmark, folder: Path) -> list[Graded]:
    """The answers in evalscope's files. Unavailable if there are none, or none of them can be read."""
    found = [
        _graded(benchmark, path.stem, row, refused)
        for path in sorted(folder.glob(f"reviews/*/{benchmark.task}_*.jsonl"))
        for refused in [_refused(folder / "predictions" / path.parent.name / path.name)]
        for row in _rows(path)
    ]
    if not found:
        raise Unavailable(f"evalscope left no answers in {folder}")
    return found


def _graded(benchmark: Benchmark, subset: str, row: Mapping[str, Any], refused: set[int]) -> Graded:
    try:
        sample = row["sample_score"]
        score = sample["score"]
        values = score["value"]
        name = score.get("main_score_name") or benchmark.metric
        graded = score["status"] in GRADED and row["index"] not in refused
        value = float(values[name]) if graded else None
        return Graded(f"{subset}/{sample['group_id']}", value, _tokens(row))
    except (KeyError, TypeError, ValueError) as error:
        raise Unavailable(f"evalscope's answer {row.get('index')} of {subset} cannot be read: {error!r}") from error


def _tokens(row: Mapping[str, Any]) -> int | None:
    """Output tokens over all messages of an answer: an agent has many."""
    said = [message for message in row.get("messages") or () if message.get("role") == "assistant"]
    counts = [(message.get("perf_metrics") or {}).get("output_tokens") for message in said]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _refused(predictions: Path) -> set[int]:
    """The indices of answers that the endpoint did not give."""
    outputs = {row["index"]: row.get("model_output") or {} for row in _rows(predictions)}
    return {
        index
        for index, output in outputs.items()
        if output.get("error") or any(choice.get("stop_reason") in REFUSED for choice in output.get("choices") or ())
    }


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; none if it is missing. A last line that a kill has cut is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = kept_json(line)
        if isinstance(row, dict):
            yield row


def _converted(data: Path, folder: Path, python: str) -> Path:
    """BrowseComp-zh's spreadsheet as rows of BrowseComp: the folder that holds them, still encrypted."""
    sheets = sorted(data.glob("*.xlsx"))
    if not sheets:
        raise Unavailable(f"{data} holds no .xlsx file: put browsecomp-zh-encrypted.xlsx there")
    place = folder / "data"
    place.mkdir(parents=True, exist_ok=True)
    run_harness([python, "-c", CONVERT, str(sheets[0]), str(place / "test.jsonl")], folder)
    return place
