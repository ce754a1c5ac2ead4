"""`tokensieve eval --suite paper`: the table in the paper's layout, two models side by side, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.endpoints import answering, said
from tests.support.harness_files import codeforces, write_lines
from tokensieve.cli.paper import run_name

CARDS = {"data": [{"id": "m", "max_model_len": 4096}]}
IGNORED = [  # with --compare
    ("--set", "limit=1"),
    ("--out", "zz"),
    ("--resume",),
    ("--quick",),
    ("--config", "paper-quick"),
    ("--device", "cpu"),
]
SUM = "```python\nprint(sum(map(int, input().split())))\n```"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [codeforces(f"{i}/A", 1000 + 400 * i, description=f"Number {i}.") for i in range(6)]
    write_lines(tmp_path / "data/codeforces/test.jsonl", rows)
    return tmp_path / "data"


def able(most: int) -> Any:
    """An endpoint of a model that solves the problems up to one of them."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, CARDS
        solves = any(f"Number {i}." in body["messages"][0]["content"] for i in range(most))
        return 200, said(SUM if solves else "I do not know.", tokens=30 if solves else 9)

    return answer


def test_the_table_and_two_models(run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, most in (("a", 4), ("b", 1)):
        with answering(able(most)) as url:
            ended = run("eval", url, "--suite", "paper", "--set", f"data={data}", "--out", name)
        assert ended.status == 0, ended
        for words in ("V3.1-Terminus", "V3.2-Exp", "Codeforces-Div1 (Rating)", "2046", "2121", "Search Agent"):
            assert words in ended.out
        assert "MMLU-Pro (EM): not measured: no data" in ended.out and "0.0 " not in ended.out
        assert len([line for line in ended.out.splitlines() if ": not measured: " in line]) == 13
    found = json.loads(Path("a/metrics.json").read_text())
    assert 1800 < found["codeforces"]["score"]["value"] < 2800 and found["codeforces"]["answers"] == 6
    table = Path("a/table.md").read_text()
    assert "| Code | LiveCodeBench (Pass@1) | - |" in table and f"{found['codeforces']['score']['value']:.0f}" in table
    both = run("eval", "--suite", "paper", "--compare", "a", "b")
    assert both.status == 0 and "-50.0" in both.out and "23 / 12" in both.out, both
    again = run("eval", "http://127.0.0.1:9/v1", "--suite", "paper", "--out", "a", "--set", "retries=0", "--resume")
    assert again.status == 2 and "cannot be reached" in again.err and again.err.count("\n") == 1


def test_models_have_folders_of_their_own() -> None:
    names = [run_name(model) for model in ("runs/adapt/step-000200", "runs/other/step-000200/", "runs/adapt", "base")]
    assert names == ["adapt-step-000200", "other-step-000200", "adapt", "base"]
    assert run_name("http://127.0.0.1:8000/v1") == "127.0.0.1-8000-v1"


def test_nothing_could_be_measured(run, tmp_path: Path) -> None:
    with answering(able(0)) as url:
        ended = run("eval", url, "--suite", "paper", "--set", 'benchmarks=["hle"]', "--out", tmp_path / "out")
    assert ended.status == 2 and "nothing could be measured" in ended.err and "not measured: no data" in ended.out


def test_refusals(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paper = ("eval", "base", "--suite", "paper")
    serving, compare = ("eval", "--suite", "serving", "--url", "http://127.0.0.1:9/v1"), ("--compare", "a", "b")
    for words, *arguments in (
        ("--suite paper takes no", *paper, "--arm", "a=window"),
        ("takes no --data or --held-out-share", *paper, "--data", "mine"),
        ("takes no --data or --held-out-share", *paper, "--held-out-share", "0.5"),
        ("and http://x/v1 is an endpoint", "eval", "http://x/v1", *paper[2:], "--device", "cuda"),
        ("--suite serving takes no --data", *serving, "--data", "mine"),
        ("--suite serving takes no --data", *serving, "--held-out-share", "0.5"),
        ("--suite serving takes no --data", *serving, "--device", "cpu"),
        ("it takes no MODEL", "eval", "nonsense", *paper[2:], *compare),
        *(("it takes no MODEL", *paper, *compare, *more) for more in IGNORED),
        ("--compare is for --suite paper", "eval", "base", "--compare", "a", "b"),
        ("first: tokensieve eval nowhere --suite paper", *paper, "--compare", "nowhere", "b"),
        ("no such folder", "eval", "nowhere", "--suite", "paper"),
        ("unknown key", *paper, "--set", "sparse.texts=1"),
        ("no such file", *paper, "--config", "nothing"),
    ):
        ended = run(*arguments)
        assert ended.status == 2 and words in ended.err, (words, ended)
    Path("metrics.json").write_text("{}")
    ended = run(*paper, "--compare", ".", ".")
    assert ended.status == 2 and "not that of a run of --suite paper" in ended.err
