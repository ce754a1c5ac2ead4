"""lm_eval with our model in its registry: log-likelihoods are the model's own. It runs in the harness's environment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.harness_files import write_lines
from tokensieve import lm_eval

pytestmark = pytest.mark.slow

ROWS = [
    {"before": "import os\nimport", "choices": [" sys\n", " qzx\n"], "answer": 0},
    {"before": "def __init__(self", "choices": ["))))\n", ", name):\n"], "answer": 1},
]
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{before}}",
    "target_delimiter": "",
    "metadata": {"version": 1},
}
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{before}}"}
TEXTS = {
    "output_type": "generate_until",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
}
METRICS = {"choices": "acc", "rolling": "word_perplexity", "texts": "exact_match"}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder for --include_path. JSON is YAML."""
    write_lines(tmp_path / "rows.jsonl", ROWS)
    for name, more in (("choices", CHOICES), ("rolling", ROLLING), ("texts", TEXTS)):
        task = TASK | {"task": name, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}} | more
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | {"metric_list": [{"metric": METRICS[name]}]}))
    return tmp_path


def evaluated(tasks: Path, *arguments: str) -> dict[str, list[Any]]:
    """The answers to each row, by task, of `python -m tokensieve.lm_eval`."""
    command = [sys.executable, "-m", "tokensieve.lm_eval", "run", "--model", "tokensieve", *arguments]
    command += ["--include_path", str(tasks), "--output_path", str(tasks / "out"), "--log_samples"]
    ended = subprocess.run(
        [*command, "--tasks", ",".join(METRICS)], cwd=lm_eval.ROOT, capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = {}
    for name in METRICS:
        (file,) = (tasks / "out").glob(f"*/samples_{name}_*.jsonl")
        found[name] = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
    return found


def test_log_likelihoods_are_the_models_own(tasks: Path) -> None:
    """Those of the dense model too, whose texts are shorter than k and which therefore agrees."""
    found = evaluated(tasks, "--model_args", "path=sparse")
    model, tokenizer = tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")

    def ids(text: str) -> list[int]:
        return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]

    def score(before: str, text: str) -> float:
        tokens, begin = ids(before + text), len(ids(before))
        with torch.inference_mode():
            logprobs = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        return sum(logprobs[i - 1, tokens[i]].item() for i in range(begin, len(tokens)))

    for row, said in zip(ROWS, found["choices"]):
        shown = [float(one[0][0]) for one in said]
        assert shown == pytest.approx([score(row["before"], text) for text in row["choices"]], abs=1e-3)
    rolling = [float(said[0][0] if isinstance(said[0], list) else said[0]) for said in found["rolling"]]
    assert rolling == pytest.approx([score("", row["before"]) for row in ROWS], abs=1e-3)
    assert all(isinstance(said[0][0], str) and "\n" not in said[0][0] for said in found["texts"])


def test_a_model_that_is_not_there_is_one_line(tasks: Path) -> None:
    command = [sys.executable, "-m", "tokensieve.lm_eval", "run", "--model", "tokensieve", "--tasks", "choices"]
    command += ["--model_args", "path=nowhere", "--include_path", str(tasks)]
    ended = subprocess.run(command, cwd=lm_eval.ROOT, capture_output=True, text=True, timeout=1200)
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("tokensieve: error: model 'nowhere': no such folder")
