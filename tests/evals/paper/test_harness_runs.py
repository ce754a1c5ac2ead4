"""The harnesses themselves, in their environments: small local tasks end to end, and the commands of the others as they
read them. The first run installs them below the user's cache."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.endpoints import answering, said
from tests.support.harness_files import write_lines
from tokensieve.evals.paper import BENCHMARKS, BY_KEY, evalscope, harbor
from tokensieve.evals.paper.asking import Asked, run_harness
from tokensieve.evals.paper.harnesses import HARNESSES, Unavailable, environment, program
from tokensieve.paper_config import PaperConfig

pytestmark = pytest.mark.slow

CANARY = "BrowseComp-ZH"
SHEET = """
import base64, hashlib, pandas, sys
def hidden(text):
    key = hashlib.sha256(sys.argv[2].encode()).digest()
    return base64.b64encode(bytes(b ^ key[i % 32] for i, b in enumerate(text.encode()))).decode()
rows = [("地理", "法国的首都是哪里？", "巴黎"), ("数学", "最小的质数是几？", "2")]
rows = [{"Topic": hidden(t), "Question": hidden(q), "Answer": hidden(a), "canary": sys.argv[2]} for t, q, a in rows]
pandas.DataFrame(rows).to_excel(sys.argv[1], index=False)
"""
SEARCH = """
import sys
from mcp.server.fastmcp import FastMCP
server = FastMCP("search", port=int(sys.argv[1]))
@server.tool()
def search(query: str) -> str:
    "Search the web."
    return "Paris, 巴黎"
server.run(transport="streamable-http")
"""


@pytest.fixture(scope="module")
def home() -> Path:
    return environment(HARNESSES["evalscope"], print)


@pytest.fixture(scope="module")
def data(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two or three problems of each benchmark in the format in which it is published."""
    folder = tmp_path_factory.mktemp("data")
    math = [{"problem": f"What is {i} + 1?", "answer": str(i + 1), "problem_idx": i} for i in range(3)]
    write_lines(folder / "aime25/test.jsonl", math)
    write_lines(folder / "hmmt25/train.jsonl", math)
    row = {"options": [*"abcdefghij"], "answer": "B", "answer_index": 1, "src": "x"}
    row |= {"cot_content": "A: Let's think step by step. The answer is (B)."}
    for split, subjects in (("test", ["math", "law", "math"]), ("validation", ["math", "law"] * 5)):
        rows = [row | {"question_id": i, "question": f"Which, {i}?", "category": c} for i, c in enumerate(subjects)]
        write_lines(folder / f"mmlu_pro/{split}.jsonl", rows)
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    choices = [dict(zip(names, ("right", "wrong", "false", "bad"))) | {"Question": f"Q{i}?"} for i in range(3)]
    write_lines(folder / "gpqa_diamond/train.jsonl", choices)
    exam = {"image": "", "answer_type": "exactMatch", "author_name": "x", "rationale": "", "category": "Math"}
    exam |= {"raw_subject": "Math", "canary": "x", "image_preview": None, "rationale_image": None}
    questions = [("q0", "The capital of France?", "Paris"), ("q1", "2 + 2?", "4")]
    write_lines(folder / "hle/test.jsonl", [exam | {"id": i, "question": q, "answer": a} for i, q, a in questions])
    (folder / "browsecomp_zh").mkdir()
    sheet = folder / "browsecomp_zh/browsecomp-zh-encrypted.xlsx"
    run_harness([program(home), "-c", SHEET, str(sheet), CANARY], folder)
    return folder


@pytest.fixture(scope="module")
def search(home: Path) -> Iterator[str]:
    """An MCP server with one tool."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [program(home), "-c", SEARCH, str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + 60
        while process.poll() is None and not _listens(port):
            assert time.monotonic() < end
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.communicate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Scripted:
    """An endpoint that is both model and judge. It is right about sums below 3, choices "b" and "right", and France."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "m", "max_model_len": 4096}]}
        self.bodies.append(body)
        if body["model"] == "judge":
            return 200, said(self._verdict(body["messages"][-1]["content"]), tokens=90)
        return 200, self._answer(body)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        last = body["messages"][-1]
        if "tools" in body:  # an agent searches once, and hands in what it found
            found = last["role"] == "tool"
            name = "submit" if found else "search"
            given = {"answer": f"Exact Answer: {last['content'][-2:]}"} if found else {"query": "x"}
            call = {"id": f"c{found}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
            return said("", tokens=11, calls=[call])
        text = last["content"] if isinstance(last["content"], str) else last["content"][0]["text"]
        question = text.rpartition("Question:")[2] if "Options:" in text else text
        if (number := re.search(r"What is (\d) \+ 1", text)) is not None:
            return said(f"\\boxed{{{int(number[1]) + (int(number[1]) < 2)}}}", tokens=20)
        if (choice := re.search(r"([A-Z])\) (b|right)\n", f"{question}\n")) is not None:
            return said(f"ANSWER: {choice[1]}", tokens=4)
        return said("Explanation: it is known.\nExact Answer: Paris\nConfidence: 90%", tokens=30)

    @staticmethod
    def _verdict(text: str) -> str:
        right = re.search(r"\[correct_answer\]:? *(Paris|巴黎)", text) is not None
        return json.dumps({"reasoning": "r", "verdict": "C" if right else "I", "correct": "yes" if right else "no"})


LOCAL = ["mmlu_pro", "gpqa_diamond", "hle", "browsecomp_zh", "aime25", "hmmt25"]
SCORES = {"mmlu_pro": 1.0, "gpqa_diamond": 1.0, "hle": 0.5, "browsecomp_zh": 0.5, "aime25": 2 / 3, "hmmt25": 2 / 3}


def test_local_tasks_end_to_end(run, data: Path, search: str, tmp_path: Path) -> None:
    """Right scores and output tokens; and after a kill no answer is asked for again."""
    scripted = Scripted()
    with answering(scripted) as url:
        command = ["eval", url, "--suite", "paper", "--out", tmp_path, "--set", f"benchmarks={json.dumps(LOCAL)}"]
        command += ["--set", f"data={data}", "--set", "repeats=2", "--set", f"judge_url={url}"]
        command += ["--set", "judge_model=judge", "--set", f"search_url={search}", "--set", "max_tokens=256"]
        ended = run(*command)
        assert ended.status == 0 and "not measured" not in ended.out, ended
        found = json.loads((tmp_path / "metrics.json").read_text())
        assert {key: found[key]["score"]["value"] for key in LOCAL} == pytest.approx(SCORES)
        tokens = {key: found[key]["tokens"]["value"] for key in LOCAL}
        assert tokens == {"mmlu_pro": 4, "gpqa_diamond": 4, "hle": 30, "browsecomp_zh": 22, "aime25": 20, "hmmt25": 20}
        assert {found[key]["answers"] / found[key]["problems"] for key in LOCAL} == {2}
        asked = len(scripted.bodies)
        assert all(body["max_tokens"] == 256 for body in scripted.bodies if body["model"] == "m")
        for key in LOCAL:
            found.pop(key)  # as if it had been killed before these were written
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        again = run(*command, "--resume")
        assert again.status == 0 and len(scripted.bodies) == asked, again
        assert json.loads((tmp_path / "metrics.json").read_text())["aime25"]["score"]["value"] == pytest.approx(2 / 3)


def test_a_bundled_model_is_served_for_it(run, data: Path, tmp_path: Path) -> None:
    sizes = ("--set", "max_tokens=24", "--set", 'benchmarks=["hmmt25"]', "--set", f"data={data}", "--quick")
    ended = run("eval", "sparse", "--suite", "paper", "--out", tmp_path, *sizes)
    assert ended.status == 0 and "sparse" in ended.out, ended
    found = json.loads((tmp_path / "metrics.json").read_text())["hmmt25"]
    assert found["answers"] == 2 and found["tokens"]["value"] <= 24 and found["asked"]["model"] == "sparse sparse"


@contextmanager
def refusing() -> Iterator[str]:
    """An endpoint whose rate limit is always reached."""
    cards = {"data": [{"id": "m", "max_model_len": 4096}]}
    with answering(lambda path, _: (200, cards) if path.endswith("/models") else (429, {"error": "slower"})) as url:
        yield url


def test_a_harness_that_is_refused_is_one_line(run, data: Path, tmp_path: Path) -> None:
    with refusing() as url:
        sizes = ("--set", "retries=1", "--set", 'benchmarks=["hmmt25"]', "--set", f"data={data}", "--quick")
        ended = run("eval", url, "--suite", "paper", "--out", tmp_path, *sizes)
    assert ended.status == 2 and "nothing could be measured" in ended.err
    (line,) = [line for line in ended.out.splitlines() if "HMMT 2025 (Pass@1): not measured" in line]
    assert "429" in line and "harness.log" in line


def test_evalscope_reads_the_tasks_of_all_its_benchmarks(home: Path, tmp_path: Path) -> None:
    """Its own config takes them, and its registry has them under these names, with these options.

    All but the sandbox of those that work in containers: evalscope imports its client for that at once, which only
    their own environment has.
    """
    asked = Asked("http://10.0.0.1/v1", "m", 256, 1, print)
    config = PaperConfig(judge_url="http://j/v1", judge_model="j", search_url="http://s/mcp")
    own = [benchmark for benchmark in BENCHMARKS if benchmark.harness.startswith("evalscope")]
    other = {"dry_run": True, "sandbox": None}
    tasks = [evalscope.task(benchmark, config, asked, None, tmp_path) | other for benchmark in own]
    code = (
        "import json, sys, evalscope.benchmarks; from evalscope.run import run_task; "
        "from evalscope.api.registry import BENCHMARK_REGISTRY as known\n"
        "for task in json.load(sys.stdin):\n"
        "    run_task(task); (name,) = task['datasets']; meta = known[name]\n"
        "    options = task['dataset_args'][name]\n"
        "    assert set(options.get('extra_params', {})) <= set(meta.extra_params), options\n"
        "    assert set(options.get('subset_list', [])) <= set(meta.subset_list), options\n"
    )
    run_harness([program(home), "-c", code], tmp_path, given=json.dumps(tasks))
    assert len(tasks) == 12


def test_harbor_reads_the_command_of_its_benchmark(tmp_path: Path) -> None:
    """`--print-config` stops before anything is fetched. Harbor needs Python 3.12."""
    try:
        program_path = program(environment(HARNESSES["harbor"], print), "harbor")
    except Unavailable as error:
        assert "needs Python 3.12" in str(error)
        return
    asked = Asked("http://10.0.0.1:8000/v1", "org/m", 256, 2, print, "secret")
    command = harbor.command(program_path, BY_KEY["aider_polyglot"], PaperConfig(limit=3), asked, tmp_path)
    shown = subprocess.run([*command, "--print-config"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    job = json.loads(shown.stdout)
    agent = {"name": "aider", "model_name": "openai/org/m", "base_url": "http://10.0.0.1:8000/v1"}
    assert job["agents"][0].items() >= agent.items()
    assert job["datasets"] == [{"name": "aider-polyglot", "version": "1.0", "n_tasks": 3}]
    assert job["n_attempts"] == 2
