"""What evalscope 1.14.1 and Harbor 0.25.0 leave behind, in their own formats, and rows of open-r1/codeforces."""

import json
from pathlib import Path
from typing import Any


def assistant(tokens: int | None = 7) -> dict[str, Any]:
    perf = {"latency": 0.5, "ttft": None, "input_tokens": 83, "output_tokens": tokens, "tpot": None}
    return {
        "id": "0ccd3aef",
        "content": "\\boxed{70}",
        "source": "generate",
        "metadata": None,
        "internal": None,
        "perf_metrics": None if tokens is None else perf,
        "role": "assistant",
        "tool_calls": None,
        "model": "model",
    }


def review(
    index: int,
    value: dict[str, Any],
    group: int | None = None,
    main: str | None = None,
    status: str = "success",
    said: int = 1,
    tokens: int | None = 7,
) -> dict[str, Any]:
    """A line of reviews/. value: as {"acc": 1.0}. said: messages of the model, each of `tokens` output tokens."""
    question = {"id": "fb136af5", "content": "What is 2+2?", "perf_metrics": None, "role": "user", "tool_call_id": None}
    score = {
        "value": value,
        "status": status,
        "judge_summary": None,
        "extracted_prediction": "70",
        "prediction": "\\boxed{70}",
        "explanation": None,
        "metadata": {"math_reason": "equivalent"},
        "main_score_name": main,
    }
    sample = {"score": score, "sample_id": index, "generation_index": 0, "sample_metadata": {}}
    return {
        "index": index,
        "target": ["70"],
        "messages": [question, *(assistant(tokens) for _ in range(said))],
        "agent_trace": None,
        "sample_score": sample | {"group_id": index if group is None else group},
    }


def prediction(index: int, stop: str = "stop", error: str | None = None) -> dict[str, Any]:
    """A line of predictions/."""
    choice = {"message": assistant(), "stop_reason": stop, "logprobs": None}
    usage = {"input_tokens": 83, "output_tokens": 7, "total_tokens": 90, "reasoning_tokens": 0}
    output = {"id": "chatcmpl-5a", "model": "m", "choices": [choice], "usage": usage, "time": 0.5, "error": error}
    return {"index": index, "model": "m", "model_output": output, "messages": [assistant()], "metadata": {}}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def trial(task: str, reward: float | None, tokens: int | None = 20, exception: str = "") -> dict[str, Any]:
    """A trial's result.json; reward None: it was never verified."""
    why = {"exception_type": exception, "exception_message": "late", "exception_traceback": "", "occurred_at": "2026"}
    context = {"n_input_tokens": 10, "n_cache_tokens": None, "n_output_tokens": tokens, "cost_usd": None}
    return {
        "id": "6318b06b-a84f-47f0-97be-af21e95489f6",
        "task_name": task,
        "trial_name": f"{task}__abc",
        "trial_uri": "file:///trials",
        "task_id": {"path": "/tasks"},
        "source": "aider-polyglot",
        "task_checksum": "c",
        "agent_info": {"name": "aider", "version": "0.86", "model_info": None},
        "agent_result": context,
        "verifier_result": None if reward is None else {"rewards": {"reward": reward}},
        "exception_info": why if exception else None,
        "step_results": None,
    }


def codeforces(id: str = "2046/A", rating: int | None = 1200, **more: Any) -> dict[str, Any]:
    """A row of open-r1/codeforces: the sum of two integers."""
    return {
        "id": id,
        "aliases": None,
        "contest_id": id.partition("/")[0],
        "contest_name": "Codeforces Round 990 (Div. 1)",
        "contest_type": "CF",
        "contest_start": 1733207700,
        "contest_start_year": 2024,
        "index": id.partition("/")[2],
        "time_limit": 1.0,
        "memory_limit": 256.0,
        "title": "Sum",
        "description": "Add two numbers.",
        "input_format": "Two integers.",
        "output_format": "Their sum.",
        "interaction_format": None,
        "note": "Mind the sign.",
        "examples": [{"input": "1 2", "output": "3"}],
        "editorial": None,
        "rating": rating,
        "tags": ["math"],
        "testset_size": 2,
        "official_tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "-4 1\n", "output": "-3\n"}],
        "official_tests_complete": True,
        "input_mode": "stdio",
        "generated_checker": None,
        "executable": True,
        "generated_tests": 0,
    } | more
