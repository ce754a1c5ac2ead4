"""The page of many runs: every quality with its interval, charts beside it as SVG and CSV, and refusals."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ET
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tokensieve.config import UserError
from tokensieve.evals.paired import ratio_of, share_of
from tokensieve.evals.paper import BENCHMARKS
from tokensieve.report import read_run, sections, write_runs
from tokensieve.report.charts import Chart
from tokensieve.report.side_by_side import side_by_side


def estimate(value: float, half: float | None = 0.1, n: int = 8) -> dict[str, Any]:
    bounds = {"low": None, "high": None} if half is None else {"low": value - half, "high": value + half}
    return {"value": value, **bounds, "n": n}


def task_rows() -> list[dict[str, Any]]:
    common = {"task": "single", "context": 2048, "contexts": 8}
    return [
        common | {"arm": "dense", "score": estimate(0.9), "difference": None},
        common | {"arm": "sparse k=128", "score": estimate(0.8), "difference": estimate(-0.1)},
    ]


def parity() -> dict[str, Any]:
    criterion = {"name": "perplexity", **estimate(1.0, 0.001), "relation": "<=", "bound": 1.01, "verdict": "holds"}
    verdict = {"k": 128, "verdict": "parity", "reason": "<all> hold", "criteria": [criterion], "left_out": ["b: why"]}
    texts = [
        {"arm": arm, "k": k, "ppl": estimate(4.0), "ratio": ratio, "same": estimate(0.9), "first": estimate(20.0, 5.0)}
        for arm, k, ratio in (
            ("dense", None, None),
            ("sparse k=128", 128, estimate(1.01, 0.002)),
            ("window k=128", 128, estimate(40.0, 9.0)),
        )
    ]
    ratios = {"sparse k=128": [estimate(1.0), estimate(1.1)], "window k=128": [estimate(1.2), estimate(9.0)]}
    recall = [{"arm": "sparse k=128", "k": 128, "overall": estimate(0.9), "by_layer": [estimate(0.9), estimate(0.8)]}]
    return {
        "context": 2048,
        "top_k": [128],
        "texts": texts,
        "positions": {"edges": [0, 1024, 2047], "ratio": ratios},
        "recall": recall,
        "tasks": task_rows(),
        "verdicts": [verdict],
    }


LONG = {
    "tasks": [row | {"context": context} for context in (1024, 2048) for row in task_rows()],
    "positions": {"edges": [0, 1024, 2047], "ppl": {"dense": [estimate(4.0)] * 2}, "ratio": {}},
}
SHORT = {
    "tasks": [{"task": "sums", "arm": "dense", "score": estimate(0.5), "difference": None}],
    "texts": [{"arm": "dense", "ppl": estimate(5.0), "ratio": None}],
    "sizes": {"tokens": 512},
}
ARMS = {
    **{arm: {"ppl": 4.0, "needle": 0.9, "needle_interval": [0.8, 1.0]} for arm in ("dense", "sparse", "window")},
    "compared": {
        "ppl": {"dense": estimate(1.0), "window": estimate(1.2)},
        "needle": {"dense": estimate(0.0), "window": estimate(0.6)},
    },
    "recall": {"last": 0.97},
    "top_k": 128,
    "context": 2048,
    "short": SHORT,
}
ACCEPTANCE = {
    "needles": [{"context": 2048, "needles": 1, "by_depth": [0.5, None, *[1.0] * 8], "counts": [2, 0, *[3] * 8]}],
    "context_gain": {"short": 512, "long": 2048, "gain": 0.1},
}
SERVING = {
    "asked": {"model": "m", "k": 128},
    "probes": [{"name": "answers-512", "tokens": 512, "found": True, "line": "0 of 12"}],
    "diagnosis": {"cause": "the cache"},
}
POSTTRAINED = {
    "evaluation": {"final": {"logic": {"accuracy": estimate(0.5), "tokens": 12.0, "past_k": None}}},
    "run": {"command": "tokensieve posttrain", "date": "2026-11-29"},
}
PROFILE = {
    "advice": {"verdict": "sparse", "reasons": {"verdict": "it is cheaper"}},
    "attention": {"mass": {"64": estimate(0.9), "128": {"value": 1.0, "low": None, "high": None, "n": 0}}},
}
COSTS = {
    "model": "m",
    "usd_per_gpu_hour": 2.0,
    "rows": [
        {"phase": "decode", "attention": "dense", "position": p, "usd_per_million": p / 1e4} for p in (1024, 4096)
    ],
}
PAPER = {"prefill_dense": {"32768": 0.5}, "paper": {"prefill_dense": {"32768": 0.51}}, "usd_per_gpu_hour": 2.0}
FIRST, SECOND = BENCHMARKS[:2]
BENCHMARKED = {
    FIRST.key: {"score": estimate(0.5), "problems": 40, "tokens": estimate(900.0, 50.0), "ungraded": 0},
    "lacking": {SECOND.key: "no network"},
}
RUNS = {
    "benchmarked": ("metrics.json", BENCHMARKED),
    "parity": ("metrics.json", {"parity": parity()}),
    "long": ("metrics.json", {"long": LONG}),
    "short": ("metrics.json", {"short": SHORT}),
    "arms": ("metrics.json", ARMS),
    "acceptance": ("metrics.json", ACCEPTANCE),
    "serving": ("serving.json", SERVING),
    "posttrained": ("metrics.json", POSTTRAINED),
    "profile": ("metrics.json", PROFILE),
    "cost": ("cost.json", COSTS),
    "paper": ("cost.json", PAPER),
}


def folder_of(tmp_path: Path, name: str) -> Path:
    file, figures = RUNS[name]
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / file).write_text(json.dumps(figures))
    if name == "posttrained":
        (tmp_path / name / "specialists/logic/rl").mkdir(parents=True, exist_ok=True)
        rows = [{"step": step, "reward": 0.1 * step, "completions/mean_length": 9.0} for step in (1, 2)]
        (tmp_path / name / "specialists/logic/rl/history.json").write_text(json.dumps(rows))
        (tmp_path / name / "history.json").write_text(json.dumps([{"step": 1, "loss": 2.0}]))  # not of rewards
    return tmp_path / name


def test_one_page_of_all_kinds_of_runs(tmp_path):
    runs = [read_run(folder_of(tmp_path, name)) for name in RUNS]
    page = write_runs(tmp_path / "out", runs).read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "&lt;all&gt; hold" in page and "Not judged: b: why." in page
    assert "Far above and not drawn: window at 128 (40.00)." in page
    together = side_by_side({run.name: run.sections for run in runs})  # two have short questions, two have costs
    assert [section.kind for section in together] == ["short"]
    sections = [section for run in runs for section in run.sections] + together
    charts = [chart for section in sections for chart in section.charts]
    files = re.findall(r'href="(plots/[^"]+)"', page)
    assert len(files) == 2 * len(charts) == 2 * page.count("<svg ") and len(set(files)) == len(files)
    for file in files:
        path = tmp_path / "out" / file
        if path.suffix == ".svg":
            ET.fromstring(path.read_text(encoding="utf-8"))
            continue
        header, *rows = csv.reader(path.read_text(encoding="utf-8").splitlines())
        assert header[0] == "series" and header[-4:] == ["low", "high", "n", "clusters"] and rows
        if file.endswith(("-cost.csv", "-reward.csv", "-output-tokens.csv")):  # computed, or of changing problems
            assert all(row[3:] == ["", "", "", ""] for row in rows), file
        else:
            rows = [row for row in rows if not row[0].startswith("V3")]  # the paper's, which gives no intervals
            assert all(float(row[3]) <= float(row[2]) <= float(row[4]) and int(row[5]) for row in rows), file


@pytest.mark.parametrize("name", RUNS)
def test_every_figure_is_on_the_page_of_its_run(tmp_path, name):
    (first, *_) = read_run(folder_of(tmp_path, name)).sections
    page = write_runs(tmp_path / "out", [read_run(tmp_path / name)]).read_text(encoding="utf-8")
    assert first.title in page.replace("&#39;", "'")


def test_intervals_that_would_flatten_the_rest_are_cut_and_kept_in_the_csv():
    wide = Chart("a", "A", "", {"sparse": [(1, estimate(1.0)), (2, estimate(1.1, 500.0))]}, "x", "y")
    low, high = wide._limits()
    assert -1 < low < 0.9 and 1.1 < high < 2
    assert "-498.9,501.1" in wide.csv()
    lone = Chart("a", "A", "", {"sparse": [(1, estimate(1.0, None))]}, "x", "y")
    assert lone.csv().splitlines()[1] == "sparse,1,1.0,,,8," and "<svg" in lone.svg()
    assert "without a bar" in lone.left_out and not wide.left_out


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds none of metrics.json, serving.json, cost.json; name the folder"):
        read_run(tmp_path)
    file = tmp_path / "metrics.json"
    for text, reason in (
        ("{", "cannot be read .*repeat the run"),
        ("[]", "holds no figures that report knows"),
        ('{"seconds": {}}', "holds no figures that report knows"),
        ('{"long": {}}', "lacks what a finished run has .*'tasks'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=reason):
            read_run(tmp_path)
    run = read_run(folder_of(tmp_path, "short"))
    with pytest.raises(UserError, match="two runs are called .*short; name each once"):
        write_runs(tmp_path / "out", [run, run])


def test_arms_of_one_series_read_the_same_texts():
    """Controls read fewer texts and contexts. The table's perplexity is that of the texts that all arms read."""
    nats = {"dense": [1.0, 2.0, 3.0], "sparse": [1.1, 2.1, 3.4], "window": [1.5]}
    found = {"dense": [[1, 1], [1, 0]], "sparse": [[1, 1], [0, 0]], "window": [[1, 0]]}
    arms = {
        arm: {
            "ppl": math.exp(nats[arm][0]),
            "needle": fmean(chain(*found[arm])),
            "needle_interval": [0.0, 1.0],
            "estimates": {
                "ppl": ratio_of(nats[arm], f"{len(nats[arm])}"),
                "needle": share_of(found[arm], f"{len(found[arm])}"),
            },
        }
        for arm in nats
    }
    (section, *_) = sections.arms(ARMS | arms)
    charts = {chart.name: chart for chart in section.charts}
    ppl = charts["ppl-by-arm"].series
    assert [*ppl] == ["1 text", "3 texts"]
    rows = {row[0]: row for row in section.tables[0].rows}
    assert {arm: f"{e['value']:.3f}" for arm, e in ppl["1 text"]} == {arm: rows[arm][1] for arm in nats}
    assert [arm for arm, _ in ppl["3 texts"]] == ["dense", "sparse"]
    assert dict(ppl["3 texts"])["dense"] == ratio_of(nats["dense"], "3")
    assert dict(ppl["1 text"])["dense"] == ratio_of(nats["dense"][:1], "1")
    needles = charts["needle-by-arm"].series
    assert {name: [arm for arm, _ in points] for name, points in needles.items()} == {
        "1 context": ["dense", "sparse", "window"],
        "2 contexts": ["dense", "sparse"],
    }
    whole = dict(needles["2 contexts"])["dense"]
    assert rows["dense"][3] == f"75.0% ({100 * whole['low']:.0f} to {100 * whole['high']:.0f})"
    assert rows["window"][3] == "50.0%"  # one context bounds nothing


def test_captions_say_what_intervals_are_over() -> None:
    """Runs before 2026-11-30 had them over texts."""
    for documents, over in ((None, "texts"), ([0, 0, 1], "documents")):
        ppl = ratio_of([1.0, 2.0, 3.0], "3", documents)
        arms = {arm: {"ppl": 2.0, "estimates": {"ppl": ppl}} for arm in ("dense", "sparse")}
        charts = {chart.name: chart for chart in sections.arms(ARMS | arms)[0].charts}
        assert charts["ppl-by-arm"].caption.endswith(f"Intervals over {over}.")
        row = {"arm": "dense", "ppl": ppl, "ratio": None}
        (section,) = sections.short({"tasks": [], "texts": [row], "sizes": {"tokens": 8}})
        assert section.charts[-1].caption == f"Intervals over {over}."
