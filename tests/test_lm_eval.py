"""lm_eval with our model in its registry: log-likelihoods are the model's own. It runs in the harness's environment."""

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.harness_files import write_lines
from tokensieve import lm_eval
from tokensieve.evals.paper import harnesses

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_that_is_not_there_is_one_line(tasks: Path) -> None:
    command = [sys.executable, "-m", "tokensieve.lm_eval", "run", "--model", "tokensieve", "--tasks", "choices"]
    command += ["--model_args", "path=nowhere", "--include_path", str(tasks)]
    ended = subprocess.run(command, cwd=lm_eval.ROOT, capture_output=True, text=True, timeout=1200)
    assert ended.returncode != 0 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("tokensieve: error: model 'nowhere': no such folder")


def test_the_harness_keeps_its_versions_of_what_lies_beside_an_installed_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds tokensieve there, and its own `pinned` first, whatever PYTHONPATH says."""
    ours, home = tmp_path / "site-packages", tmp_path / "harness"
    (ours / "tokensieve").mkdir(parents=True)
    (ours / "tokensieve" / "__init__.py").touch()
    evaluate = "def evaluate(python):\n    import sys, pinned\n    print(pinned.WHOSE, python, *sys.argv[1:])\n"
    (ours / "tokensieve" / "lm_eval.py").write_text(evaluate)
    (ours / "pinned.py").write_text("WHOSE = 'ours'\n")
    venv.create(home / "venv", symlinks=True, with_pip=False)
    (theirs,) = (home / "venv").glob("lib/python*/site-packages")
    (theirs / "pinned.py").write_text("WHOSE = 'theirs'\n")
    commands: list[list[str]] = []
    monkeypatch.setattr(harnesses, "environment", lambda *_: home)
    monkeypatch.setattr(lm_eval.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(lm_eval.os, "execv", lambda _, command: commands.append(command))
    monkeypatch.setattr(lm_eval, "ROOT", ours)
    monkeypatch.setattr(sys, "argv", ["lm_eval", "ls", "tasks"])
    monkeypatch.setenv("PYTHONPATH", str(ours))
    lm_eval.main()
    ended = subprocess.run(commands[0], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout.split() == ["theirs", sys.executable, "ls", "tasks"], ended
