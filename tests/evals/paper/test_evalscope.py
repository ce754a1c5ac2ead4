"""evalscope's task for each benchmark, and the answers in its files: none is counted that was not given or graded."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.harness_files import prediction, review, write_lines
from tokensieve.evals.paper import BENCHMARKS, BY_KEY, evalscope
from tokensieve.evals.paper.asking import Asked
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.paper_config import PaperConfig

ASKED = Asked("http://10.0.0.1:8000/v1", "org/m", 4096, 3, print, "secret", "grader")
CONFIG = PaperConfig(
    judge_url="http://10.0.0.2/v1", judge_model="j", search_url="http://10.0.0.3/mcp", limit=5, temperature=0.5
)
OWN = [benchmark for benchmark in BENCHMARKS if benchmark.harness.startswith("evalscope")]


@pytest.mark.parametrize("benchmark", OWN, ids=lambda benchmark: benchmark.key)
def test_a_task_has_what_its_benchmark_needs_and_nothing_else(benchmark, tmp_path: Path) -> None:
    task = evalscope.task(benchmark, CONFIG, ASKED, None, tmp_path)
    assert task["datasets"] == [benchmark.task] and task["repeats"] == 3 and task["limit"] == 5
    assert task["generation_config"] | {"temperature": 0.5, "max_tokens": 4096} == task["generation_config"]
    assert ("agent_config" in task) == ("search" in benchmark.needs)
    assert ("sandbox" in task) == ("containers" in benchmark.needs)
    judges = task["judge"].get("models", [])
    assert [judge["api_key"] for judge in judges] == (["grader"] if "judge" in benchmark.needs else [])
    assert task["dataset_args"][benchmark.task] == benchmark.options and task["use_cache"] is None
    assert json.loads(json.dumps(task)) == task


def test_a_task_goes_on_where_one_was_stopped_and_reads_local_data(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    task = evalscope.task(BY_KEY["live_code_bench"], CONFIG, ASKED, Path("/data"), tmp_path)
    assert task["use_cache"] == str(tmp_path)
    options = task["dataset_args"]["live_code_bench"]
    assert options["local_path"] == "/data" and options["subset_list"] == ["release_v6"]


FAKE = {
    "run.py": "import json\nfrom evalscope.benchmarks.terminal_bench import utils\n"
    "def run_task(task): print(json.dumps([task, utils.HarborLLM().get_model_context_limit()]))\n",
    "benchmarks/terminal_bench/utils.py": "class HarborLLM:\n    def get_model_context_limit(self): return 4096\n",
}


@pytest.mark.parametrize(("key", "seen"), [("terminal_bench", 120000), ("swe_verified", 4096)])
def test_terminal_bench_is_told_the_models_context(key: str, seen: int, tmp_path: Path, monkeypatch) -> None:
    """evalscope takes max_tokens for it. An agent of ours would sum up its history after 4096 tokens of 124096."""
    for name, text in FAKE.items():
        file = tmp_path / "evalscope" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    asked = replace(ASKED, longest_prompt=120000)
    monkeypatch.setattr(Asked, "environment", lambda *_: tmp_path)
    monkeypatch.setattr(Asked, "program", lambda *_: sys.executable)
    with pytest.raises(Unavailable, match="left no answers"):
        evalscope.run(BY_KEY[key], replace(CONFIG, data=""), asked, tmp_path)
    task, context = json.loads((tmp_path / "harness.log").read_text())
    assert context == seen and task["generation_config"]["max_tokens"] == 4096
    file.write_text("class HarborLLM: pass\n")
    if key == "terminal_bench":  # a version that has no such method
        with pytest.raises(Unavailable, match="get_model_context_limit"):
            evalscope.run(BY_KEY[key], CONFIG, asked, tmp_path)


def test_answers_in_reviews(tmp_path: Path) -> None:
    """Subsets, repeats, an agent's many messages, scores under the name that the row or the table has."""
    law = [review(0, {"accuracy": 1.0}, group=0, main="accuracy"), review(1, {"accuracy": 0.0}, group=0)]
    write_lines(tmp_path / "reviews/model/mmlu_pro_law.jsonl", law)
    write_lines(tmp_path / "reviews/model/mmlu_pro_math.jsonl", [review(0, {"accuracy": 1.0}, said=3, tokens=5)])
    write_lines(tmp_path / "reviews/model/mmlu_redux_math.jsonl", [review(0, {"accuracy": 0.0})])
    found = evalscope.answers(BY_KEY["mmlu_pro"], tmp_path)
    assert [(a.problem, a.score, a.tokens) for a in found] == [
        ("mmlu_pro_law/0", 1.0, 7),
        ("mmlu_pro_law/0", 0.0, 7),
        ("mmlu_pro_math/0", 1.0, 15),
    ]


def test_what_was_not_answered_or_not_graded_is_no_zero(tmp_path: Path) -> None:
    rows = [
        review(0, {"acc": 0.0}, status="parse_error"),
        review(1, {"acc": 0.0}),  # the endpoint's error message, graded
        review(2, {"acc": 0.0}),
        review(3, {"acc": 1.0}, status="fallback"),
        review(4, {"acc": 0.0}, tokens=None),
    ]
    write_lines(tmp_path / "reviews/model/hle_Math.jsonl", rows)
    predicted = [prediction(0), prediction(1, "model_length"), prediction(2, error="boom"), prediction(3)]
    write_lines(tmp_path / "predictions/model/hle_Math.jsonl", predicted)
    found = evalscope.answers(BY_KEY["hle"], tmp_path)
    assert [a.score for a in found] == [None, None, None, 1.0, 0.0]
    assert [a.tokens for a in found] == [7, 7, 7, 7, None]


def test_a_line_that_a_kill_cut_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "reviews/model/aime25_default.jsonl"
    with pytest.raises(Unavailable, match="left no answers"):
        evalscope.answers(BY_KEY["aime25"], tmp_path)
    write_lines(file, [review(0, {"acc": 1.0})])
    file.write_text(file.read_text() + '{"index": 1, "sample')
    assert len(evalscope.answers(BY_KEY["aime25"], tmp_path)) == 1
    write_lines(file, [review(0, {"other": 1.0})])
    with pytest.raises(Unavailable, match="answer 0 of aime25_default cannot be read: KeyError"):
        evalscope.answers(BY_KEY["aime25"], tmp_path)
