"""The examples: each runs, its cases can be answered, and what it concludes follows from its figures."""

import argparse
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import servers
from tokensieve.engine import EngineConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "arms")
PARTS = {
    "agent": ["an agent with a tool and a scratchpad"],
    "documents": ["comparing contracts", "comparing papers"],
    "manual": ["question answering over a manual", "summarising a manual"],
    "records": ["joining the records of a case"],
    "repository": ["code completion in a repository", "noticing a wrong name"],
    "retrieval": ["answers from retrieved functions", "the right answer's likelihood"],
}


@pytest.fixture(autouse=True)
def examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def run(name: str, *arguments: object) -> int:
    before = sys.argv
    sys.argv = [f"{name}.py", *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


class Words:
    """A model whose tokens are words, for cases without a model."""

    def size(self, text: str) -> int:
        return len(text.split(" "))

    def fit(self, text: str, tokens: int, end: bool = False) -> str:
        words = text.split(" ")
        return " ".join(words[-tokens:] if end else words[:tokens])


class Finder:
    """Finds "the N of K is V" in what it is shown; a blind one is shown nothing."""

    def __init__(self, blind: bool = False):
        self.blind = blind

    def ask(self, text: str, question: str, tokens: int = 24) -> str:
        asked = re.fullmatch(r"What is the (.*)\?", question)
        assert asked
        found = re.search(rf"[Tt]he {re.escape(asked[1])} is (\d+)\.", "" if self.blind else text)
        return f"It is {found[1]}" if found else "I do not know"


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs(name: str, capsys: pytest.CaptureFixture) -> None:
    assert run(name, "--tokens", 128, "--cases", 1, "--top-k", 64) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^(\S.*): 1 case, prompts of up to [\d,]+ tokens, k = 64$", shown, re.MULTILINE) == PARTS[name]
    for arm in ("dense", "sparse", "control"):
        assert len(re.findall(rf"^  {arm} ", shown, re.MULTILINE)) == len(PARTS[name])
    assert shown.count("not measurable with one case") == len(PARTS[name])


@pytest.mark.parametrize(
    ("name", "cases", "attempt"),
    [
        ("manual", "questions", "answered"),
        ("documents", "contracts", "answered"),
        ("agent", "tasks", "done"),
        ("records", "files", "joined"),
    ],
)
def test_who_finds_what_is_written_is_right_and_the_control_is_not(name: str, cases: str, attempt: str) -> None:
    arms, module = example("arms"), example(name)
    drawn = getattr(module, cases)(Words(), 800, 5, arms.random.Random(1))
    assert len(drawn) == 5
    assert [getattr(module, attempt)(Finder(), case) for case in drawn] == [1.0] * 5
    assert [getattr(module, attempt)(Finder(blind=True), case) for case in drawn] == [0.0] * 5


def test_endings_are_in_their_sources_and_not_in_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    arms, draw = example("arms"), {"model": Words(), "tokens": 1000, "count": 4}
    for case in example("repository").completions(**draw, rng=arms.random.Random(2)):
        assert any(
            case.question + case.answer in path.read_text() for path in example("repository").PACKAGE.rglob("*.py")
        )
    monkeypatch.setattr(example("repository"), "AROUND", 40)
    for case in example("repository").completions(**draw, rng=arms.random.Random(2)):
        assert Words().size(case.question) <= 20  # what a function begins with has its share of what is around a text
    for case in example("repository").bugs(**draw, rng=arms.random.Random(2)):
        right, wrong = (re.findall(r"\w+", text) for text in (case.answer, case.wrong))
        changed = {(a, b) for a, b in zip(right, wrong, strict=True) if a != b}
        assert len(changed) == 1 and all(name in case.text for pair in changed for name in pair)
    for case in example("retrieval").questions(**draw, rng=arms.random.Random(2)):
        assert case.answer in case.text  # the function itself is among those that are retrieved
    for case in example("manual").summaries(**draw, rng=arms.random.Random(2)):
        assert case.answer.strip() not in case.text
    for case in example("documents").papers(**draw, rng=arms.random.Random(2)):
        assert case.question.strip() in case.text


def judged(scores: dict[str, list[float]], seconds: tuple[float, float], **options: Any) -> Any:
    arms = example("arms")
    part = arms.Part("a part", lambda *_: [], lambda *_: 0.0, options.get("unit", "right"))
    times = {"dense": [seconds[0]] * 2, "sparse": [seconds[1]] * 2}
    return arms.judge(part, scores, times, options.get("short", False))


@pytest.mark.parametrize(
    ("dense", "sparse", "control", "seconds", "options", "take", "reason"),
    [
        ([0] * 10, [1] * 10, [0] * 10, (2, 1), {}, None, "with this model"),
        ([0, 1] * 5, [0, 1] * 5, [0, 1] * 5, (2, 1), {}, None, "with this model"),
        ([-1.0, -2.0], [-1.0, -2.0], [-1.1, -1.9], (2, 1), {"unit": "nats"}, None, "with this model"),
        ([1] * 10, [1] * 10, [0] * 10, (2, 1), {"short": True}, "dense", "not longer than k"),
        ([1] * 10, [0] * 10, [0] * 10, (2, 1), {}, "dense", "sparse attention loses here"),
        ([1] * 10, [1] * 10, [0] * 10, (1, 2), {}, "dense", "sparse attention saves no time"),
        ([1] * 40, [1] * 40, [0] * 40, (2, 1), {}, "sparse", "if a loss of"),
        ([-1.0, -1.1, -1.2], [-1.01, -1.1, -1.2], [-3.0, -3.1, -3.2], (2, 1), {"unit": "nats"}, "sparse", "if a loss"),
    ],
)
def test_the_verdict(
    dense: list,
    sparse: list,
    control: list,
    seconds: tuple[float, float],
    options: dict[str, Any],
    take: str,
    reason: str,
) -> None:
    verdict = judged({"dense": dense, "sparse": sparse, "control": control}, seconds, **options)
    assert verdict.take == take and reason in verdict.reason
    assert (verdict.difference is None) == (take is None)


@pytest.mark.parametrize("arm", ["dense", "sparse"])
def test_log_probabilities_are_those_of_a_plain_pass(arm: str) -> None:
    """Within 1e-3 nats: the engine's order of sums is another one than that of a pass without pages."""
    model = example("arms").Local("sparse", 64)
    text, ending = example("arms").pages()[0].text[:1500], " and the rest of it."
    end = model.encode(ending)
    ids = torch.tensor([[*model.encode.prompt(text), *end]])
    plain = tokensieve.load("sparse")
    with torch.no_grad(), tokensieve.selecting(plain, "dense" if arm == "dense" else "indexer", 64):
        scores = plain(ids).logits[0].log_softmax(-1)
    expected = scores[:-1].gather(1, ids[0, 1:, None])[-len(end) :].mean()
    assert model.nats(arm, text, ending) == pytest.approx(float(expected), abs=1e-3)
    blind = example("arms").Reader(model, arm, blind=True)
    assert blind.nats(text, "So", ending) == model.nats(arm, "So", ending)


def test_the_control_is_not_shown_the_text() -> None:
    shown = []

    class Model:
        def answer(self, arm: str, message: str, tokens: int) -> str:
            shown.append((arm, message))
            return ""

    for blind in (False, True):
        example("arms").Reader(Model(), "dense", blind).ask("The text.", "A question?")
    assert shown == [("dense", "The text.\n\nA question?"), ("dense", "A question?")]


def test_an_endpoint_gives_what_the_model_gives(capsys: pytest.CaptureFixture) -> None:
    arms = example("arms")
    local = arms.Local("sparse", 0)
    model, tokenizer = tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")
    text = arms.pages()[0].text[:2000]
    with servers.running((model, tokenizer), EngineConfig(running=2), max_prompt_tokens=4000) as (url, _):
        url += "/v1"
        remote = arms.Remote(url, "", "", 0)
        assert remote.top_k == local.top_k and remote.memory("dense") is None
        assert remote.answer("dense", "Who are you?", 24) == local.answer("dense", "Who are you?", 24)
        ending = " and so on."
        for arm in ("dense", "sparse"):
            assert remote.nats(arm, text, ending) == pytest.approx(local.nats(arm, text, ending), abs=1e-3)
        assert run("records", "--url", url, "--tokens", 64, "--cases", 1) == 0
        assert "joining the records of a case: 1 case" in capsys.readouterr().out
        assert run("records", "--url", url, "--dense", "nowhere") == 2
    assert "does not serve 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--model", "nowhere/at-all"), "nowhere/at-all"),
        (("--cases", 0), "--cases is 0; it must be at least 1"),
        (("--tokens", -5), "--tokens is -5; it must be at least 64"),
        (("--top-k", -3), "--top-k is -3; it must be at least 0"),
        (("--tokens", 32000), "--tokens 32000: this model has room for 31744; ask for as many or fewer"),
        (("--url", "http://127.0.0.1:9/v1", "--model", "sparse"), "give one of the two"),
        (("--dense", "x"), "give its --url"),
        (("--url", "http://127.0.0.1:9/v1", "--device", "cpu"), "give one of the two"),
        (("--device", "gpu"), "device gpu: use auto, cpu or cuda"),
    ],
)
def test_what_cannot_work_is_one_line(given: tuple, says: str, capsys: pytest.CaptureFixture) -> None:
    assert run("manual", *given) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("manual.py: error: ") and says in shown[0]


def test_cases_about_one_file_are_one_cluster() -> None:
    arms = example("arms")
    part = arms.Part("a part", lambda *_: [], lambda *_: 0.0, "nats", arms.source)
    scores = {"dense": [-1.0, -1.1] * 4, "sparse": [-1.0, -1.1] * 4, "control": [-2.0, -2.2] * 4}
    seconds = {"dense": [2.0] * 8, "sparse": [1.0] * 8}
    assert arms.judge(part, scores, seconds, False, "aabbccdd").take == "sparse"
    assert "about one page or file" in arms.judge(part, scores, seconds, False, "aaaaaaaa").reason


def test_texts_are_as_long_as_asked() -> None:
    """In tokens of the model: prompts of repository and retrieval were up to twice as long."""
    local, arms = example("arms").Local("sparse", 64), example("arms")
    made = (("repository", "completions"), ("retrieval", "questions"), ("documents", "papers"), ("manual", "summaries"))
    for tokens in (600, 6000):
        for module, cases in made:
            for case in getattr(example(module), cases)(local, tokens, 3, arms.random.Random(3)):
                assert 0.8 * tokens < local.size(case.text) <= tokens + 20, module


def test_figures_are_written(tmp_path: Path) -> None:
    out = tmp_path / "records.json"
    assert run("records", "--tokens", 64, "--cases", 2, "--top-k", 64, "--device", "cpu", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["asked"]["tokens"] == 64 and found["environment"]["versions"]
    (part,) = found["parts"]
    assert part["part"] == PARTS["records"][0] and part["top_k"] == 64 and part["prompt_tokens"] > 64
    for arm in part["arms"].values():
        assert 0 <= arm["quality"]["low"] <= arm["quality"]["value"] <= arm["quality"]["high"] <= 1
        assert arm["quality"]["n"] == 2 and arm["seconds"] > 0 and arm["peak_bytes"] is None
    assert part["arms"]["sparse"]["held_bytes"] > part["arms"]["dense"]["held_bytes"] > 0


def test_on_a_gpu_the_first_attempt_is_not_timed_and_the_peak_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    arms, gpu, peaks, attempts = example("arms"), torch.device("cuda:1"), [0], []

    class Model(Words):
        gpu, seen, top_k = torch.device("cuda:1"), 0, 0

        def memory(self, arm: str) -> tuple[int, int]:
            return 1, 2

    def attempt(reader: Any, case: int) -> float:
        attempts.append((reader.arm, reader.blind, reader.before == "", case))
        reader.model.seen = max(reader.model.seen, 208 + len(reader.before))
        peaks.append({"dense": 100, "sparse": 50}[reader.arm] + case)
        return float(not reader.blind)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.clear() if device == gpu else None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: max(peaks) if device == gpu else 0)
    found = arms.compare(arms.Part("a part", lambda *_: range(20), attempt), Model(), 64, 20, 0)
    first = [(arm, blind, False, 0) for arm, blind in (("dense", False), ("sparse", False), ("dense", True))]
    assert attempts[:3] == first and len(attempts) == 63 and all(plain for *_, plain, _ in attempts[3:])
    assert [found["arms"][arm]["peak_bytes"] for arm in ("dense", "sparse")] == [119, 69]
    assert found["prompt_tokens"] == 208  # without what the first attempts put before their prompts
    assert found["take"] and found["difference"]["n"] == 20


def test_all_applications_as_one_table(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    """Goes on after what is finished, and refuses figures of other options."""
    command = [
        sys.executable,
        str(EXAMPLES.parent / "benchmarks" / "applications.py"),
        "--quick",
        "--only",
        "documents",
    ]
    for _ in range(2):
        subprocess.run([*command, "--out", str(tmp_path)], check=True)
        shown = capfd.readouterr()
        assert [line.split(" | ")[0][2:] for line in shown.out.splitlines()[4:]] == PARTS["documents"]
        assert all(line.count("|") == 10 and "not measurable" in line for line in shown.out.splitlines()[4:])
    assert shown.err == ""  # no application ran again
    other = subprocess.run([*command, "--out", str(tmp_path), "--device", "cpu"])
    assert other.returncode == 1 and "give another --out" in capfd.readouterr().err


def test_figures_of_another_machine_are_refused(tmp_path: Path) -> None:
    """`--device auto` is the same word on a CPU and on a GPU: one table would have rows of both."""
    module = runpy.run_path(str(EXAMPLES.parent / "benchmarks" / "applications.py"))
    options = {"model": "sparse", "tokens": 128, "cases": 2, "top_k": 64, "device": "auto"}
    made = {"asked": options, "environment": {"machine": "another"}, "parts": []}
    (tmp_path / "manual-128.json").write_text(json.dumps(made))
    asked = argparse.Namespace(model="sparse", cases=2, top_k=64, device="auto", out=tmp_path)
    with pytest.raises(ValueError, match="made on another machine .* give another --out"):
        module["figures"]("manual", 128, asked)
    made["environment"] = example("arms").environment()
    (tmp_path / "manual-128.json").write_text(json.dumps(made))
    assert module["figures"]("manual", 128, asked) == made


@pytest.mark.slow
def test_at_least_three_are_measurable(capsys: pytest.CaptureFixture) -> None:
    """With the bundled model: the promise of docs/examples.md."""
    for name in ("manual", "documents"):
        assert run(name, "--tokens", 1000, "--cases", 12) == 0
    verdicts = [line for line in capsys.readouterr().out.splitlines() if "measurable" in line or "Take" in line]
    assert sum("Take" in line for line in verdicts) >= 3, verdicts
