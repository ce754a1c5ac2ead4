"""The run as a whole: what is finished is kept, what cannot run is listed, and two models are compared problem by
problem."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokensieve.evals.endpoint as endpoint
from tests.support.endpoints import answering
from tokensieve.config import UserError
from tokensieve.evals.endpoint import Endpoint
from tokensieve.evals.paper import BY_KEY, compare_models, judge_paper, suite
from tokensieve.evals.paper.harnesses import Unavailable
from tokensieve.evals.paper.scores import Graded
from tokensieve.paper_config import PaperConfig

CARDS = {"data": [{"id": "m", "max_model_len": 4096}, {"id": "n"}]}


@pytest.fixture
def config(tmp_path: Path) -> PaperConfig:
    for key in ("mmlu_pro", "aime25", "hmmt25"):
        (tmp_path / "data" / key).mkdir(parents=True)
        (tmp_path / "data" / key / "test.jsonl").touch()
    return PaperConfig(("hle", "mmlu_pro", "aime25", "hmmt25"), data=str(tmp_path / "data"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(key, max_tokens, repeats) of every benchmark that was asked. AIME's harness fails."""
    rows: list[tuple[str, int, int]] = []

    def run(benchmark: Any, config: Any, asked: Any, folder: Path) -> list[Graded]:
        rows.append((benchmark.key, asked.max_tokens, asked.repeats))
        if benchmark.key == "aime25":
            raise Unavailable("RateLimitError: slower; see its log")
        return [Graded(str(i), float(i % 4 > 0), 100 + i) for i in range(40)]

    monkeypatch.setitem(suite.RUN, "evalscope", run)
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    return rows


def judge(url: str, config: PaperConfig, folder: Path, resume: bool = False, name: str = "m") -> dict[str, Any]:
    return judge_paper(Endpoint(url, retries=0), name, config, folder, resume, lambda _: None)


def test_a_run(config: PaperConfig, asked: list, tmp_path: Path) -> None:
    with answering(lambda *_: (200, CARDS)) as url:
        found = judge(url, config, tmp_path / "out")
        assert asked == [("mmlu_pro", 2048, 1), ("aime25", 2048, 16), ("hmmt25", 2048, 16)]
        assert found["mmlu_pro"]["score"]["value"] == 0.75 and found["mmlu_pro"]["tokens"]["value"] == 119.5
        assert set(found["lacking"]) == {"hle", "aime25"} and "judge" in found["lacking"]["hle"]
        assert found["lacking"]["aime25"].startswith("RateLimitError") and "aime25" not in found
        assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
        with pytest.raises(UserError, match="holds a run already.*--resume"):
            judge(url, config, tmp_path / "out")
        asked.clear()
        again = judge(url, config, tmp_path / "out", resume=True)
        assert [key for key, *_ in asked] == ["aime25"] and again["mmlu_pro"] == found["mmlu_pro"]
        asked.clear()
        judge(url, PaperConfig(**vars(config) | {"max_tokens": 64}), tmp_path / "out", resume=True)
        assert [key for key, *_ in asked] == ["mmlu_pro", "aime25", "hmmt25"]  # answers of other lengths are others


@pytest.mark.parametrize(
    ("card", "given", "tokens", "longest"),
    [
        ({"max_model_len": 131072}, 0, (65536, 16384), 114688),  # vLLM, SGLang, ours
        ({"context_length": 8192}, 0, (4096, 1024), 7168),
        ({"context_window": 131072}, 16384, (8192, 2048), 14336),  # the setting comes first
        ({}, 0, (65536, 16384), None),
    ],
)
def test_answers_leave_room_for_prompts(
    card: dict,
    given: int,
    tokens: tuple[int, int],
    longest: int | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Half of the context to a question, seven eighths to an agent, whose prompts grow."""
    seen: dict[str, tuple[int, int | None]] = {}

    def run(benchmark: Any, config: Any, asked: Any, folder: Path) -> list[Graded]:
        seen[benchmark.key] = asked.max_tokens, asked.longest_prompt
        return [Graded("1", 1.0)]

    monkeypatch.setitem(suite.RUN, "evalscope", run)
    monkeypatch.setitem(suite.RUN, "evalscope-agents", run)
    monkeypatch.setattr(suite, "lacking", lambda *_: None)
    config = PaperConfig(("aime25", "terminal_bench"), context=given)
    with answering(lambda *_: (200, {"data": [{"id": "m", **card}]})) as url:
        judge(url, config, tmp_path / "out")
    assert (seen["aime25"][0], seen["terminal_bench"][0]) == tokens and seen["terminal_bench"][1] == longest


def test_a_record_has_one_model_and_any_subset(config: PaperConfig, asked: list, tmp_path: Path) -> None:
    """Benchmarks that are asked later join those that are there, which stay; another model is refused."""
    one, other = (replace(config, benchmarks=(key,)) for key in ("mmlu_pro", "hmmt25"))
    with answering(lambda *_: (200, CARDS)) as url:
        first = judge(url, one, tmp_path / "out")
        for more in ({"name": "b"}, {"config": replace(other, model="n")}, {"name": "b", "config": one}):
            given = {"config": other, "name": "m"} | more
            with pytest.raises(UserError, match="holds a run of m m, not .*--out"):
                judge(url, folder=tmp_path / "out", resume=True, **given)
        both = judge(url, replace(other, max_tokens=64), tmp_path / "out", resume=True)
    assert both["mmlu_pro"] == first["mmlu_pro"] and both["hmmt25"]["asked"]["max_tokens"] == 64
    assert [key for key, *_ in asked] == ["mmlu_pro", "hmmt25"]


def test_what_does_not_reach_aider_does_not_ask_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Path] = []
    monkeypatch.setitem(suite.RUN, "harbor", lambda *given: runs.append(given[-1]) or [Graded("a", 1.0)])
    monkeypatch.setattr(suite, "lacking", lambda *_: None)
    config = PaperConfig(("aider_polyglot",))
    with answering(lambda *_: (200, CARDS)) as url:
        first = judge(url, config, tmp_path / "out")
        assert {"temperature", "top_p", "max_tokens"}.isdisjoint(first["aider_polyglot"]["asked"])
        judge(url, replace(config, temperature=0.5, top_p=0.5, max_tokens=9), tmp_path / "out", resume=True)
        assert len(runs) == 1
        judge(url, replace(config, repeats=2), tmp_path / "out", resume=True)
        assert len(set(runs)) == 2


def test_an_endpoint_that_goes_down_ends_the_run_and_nothing_is_lost(
    config: PaperConfig, asked: list, tmp_path: Path
) -> None:
    up = True
    with answering(lambda *_: (200, CARDS) if up else (500, {})) as url:
        original = suite.RUN["evalscope"]

        def breaks(benchmark: Any, *rest: Any) -> list[Graded]:
            nonlocal up
            up = benchmark.key != "aime25"
            return original(benchmark, *rest)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="still fails"):
            patch.setitem(suite.RUN, "evalscope", breaks)
            judge(url, config, tmp_path / "out")
        kept = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert "mmlu_pro" in kept and "hmmt25" not in kept
        up = True
        asked.clear()
        judge(url, config, tmp_path / "out", resume=True)
        assert [key for key, *_ in asked] == ["aime25", "hmmt25"]


def test_answers_of_which_none_was_graded_are_no_score(config: PaperConfig, asked: list, tmp_path: Path) -> None:
    with answering(lambda *_: (200, CARDS)) as url, pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.RUN, "evalscope", lambda *_: [Graded("a", None)])
        found = judge(url, config, tmp_path / "out")
        assert "mmlu_pro" not in found and "no answer was graded" in found["lacking"]["mmlu_pro"]


def test_refusals(config: PaperConfig, tmp_path: Path) -> None:
    with answering(lambda *_: (200, CARDS)) as url:
        with pytest.raises(UserError, match="no aime; known are mmlu_pro"):
            judge(url, PaperConfig(("aime",)), tmp_path / "out")
        with pytest.raises(UserError, match="serves no model 'other', but m, n"):
            judge(url, PaperConfig(model="other"), tmp_path / "out")
        for more in ({"max_tokens": 4096}, {"max_tokens": 100, "context": 64}, {"context": 1}):
            with pytest.raises(UserError, match="no room for prompts: lower max_tokens, or set context"):
                judge(url, replace(config, **more), tmp_path / "out")
    with answering(lambda *_: (404, {})) as url, pytest.raises(UserError, match="--set model=ID"):
        judge(url, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_data_are_alike_by_where_they_come_from(
    config: PaperConfig, asked: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies in two folders are; a benchmark without one comes from its hub, even if others have copies."""
    monkeypatch.setattr(suite, "lacking", lambda *_: None)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    config = replace(config, benchmarks=("mmlu_pro", "gpqa_diamond"))
    with answering(lambda *_: (200, CARDS)) as url:
        a = judge(url, config, tmp_path / "a")
        b = judge(url, replace(config, data=str(tmp_path / "copy")), tmp_path / "b", name="b")
        c = judge(url, replace(config, hub="huggingface"), tmp_path / "c", name="c")
    assert [row["key"] for row in compare_models(a, b)[0]] == ["mmlu_pro", "gpqa_diamond"]
    rows, left_out = compare_models(a, c)
    assert [row["key"] for row in rows] == ["mmlu_pro"]
    assert left_out == ["GPQA-Diamond (Pass@1) was not asked alike: data differ; ask one of the models again"]


def record(model: str, right: int, **asked: Any) -> dict[str, Any]:
    how = {"model": model, "max_tokens": 64} | asked
    rows = [Graded(str(i), float(i < right), 100).to_dict() for i in range(40)]
    score = {"value": right / 40, "low": None, "high": None, "n": 40}
    return {"mmlu_pro": {"score": score, "tokens": None, "graded": rows, "asked": how}, "lacking": {"hle": "no judge"}}


def test_two_models() -> None:
    (row,), left_out = compare_models(record("a", 30), record("b", 20))
    assert not left_out
    assert row["key"] == "mmlu_pro" and row["difference"]["value"] == -0.25 and row["difference"]["high"] < 0
    with pytest.raises(UserError, match="MMLU-Pro .* max_tokens differ"):
        compare_models(record("a", 30), record("b", 20, max_tokens=128))
    for given in ((record("a", 30), record("b", 20, context=4096)), (record("a", 30, context=4096), record("b", 20))):
        with pytest.raises(UserError, match="MMLU-Pro .* context differ"):
            compare_models(*given)
    with pytest.raises(UserError, match="no benchmark has a score in both"):
        compare_models(record("a", 30), {"lacking": {}})
    assert BY_KEY["mmlu_pro"].name == "MMLU-Pro (EM)"
