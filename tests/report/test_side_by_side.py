"""Runs of one kind on one page: figures beside each other, differences of the same prompts, curves in one plot."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokensieve.evals import intervals
from tokensieve.evals.paired import ratio_of, share_of
from tokensieve.report import read_run, write_runs
from tokensieve.report.charts import Chart
from tokensieve.report.sections import Section, Table, text_of
from tokensieve.report.side_by_side import side_by_side

RIGHT = [[1, 1], [0, 1], [1, 0], [1, 1]]
LESS = [[1, 0], [0, 1], [0, 0], [1, 1]]


def long_run(by_context: list[list[int]], nats: list[float], prompts: str, arm: str = "sparse k=128") -> dict[str, Any]:
    score = share_of(by_context, prompts)
    row = {"task": "single", "context": 2048, "arm": arm, "contexts": 4, "score": score, "difference": None}
    stretches = [ratio_of(nats, prompts), ratio_of([x - 0.1 for x in nats], prompts)]
    return {"long": {"tasks": [row], "positions": {"edges": [0, 1024, 2047], "ppl": {arm: stretches}, "ratio": {}}}}


def folder_of(tmp_path: Path, name: str, figures: dict[str, Any]) -> Path:
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.json").write_text(json.dumps(figures))
    return tmp_path / name


def rows_of(runs: list[Any]) -> dict[str, tuple[str, ...]]:
    (section,) = side_by_side({run.name: run.sections for run in runs})
    (table,) = section.tables
    assert table.head[1:3] == tuple(run.name for run in runs[:2])
    return {name: tuple(cells) for name, *cells in table.rows}


def test_two_runs_of_the_same_prompts_are_paired(tmp_path):
    nats = [1.0, 1.5, 2.0, 2.5]
    runs = [
        read_run(folder_of(tmp_path, "one", long_run(RIGHT, nats, "p"))),
        read_run(folder_of(tmp_path, "two", long_run(LESS, [x + 0.05 for x in nats], "p"))),
    ]
    rows = rows_of(runs)
    contexts = [0, 0, 1, 1, 2, 2, 3, 3]
    expected = intervals.clustered_difference([1, 0, 0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1], contexts)
    one, two, difference = rows["Scores by task, sparse k=128, single"]
    assert one.startswith("0.750 (") and two.startswith("0.500 (")
    assert difference == f"difference {text_of(vars(expected))}, n = 8" and expected.value == -0.25
    assert rows["Perplexity against position, sparse k=128, 512"][2] == "ratio 1.051 (1.051 to 1.051), n = 4"

    page = write_runs(tmp_path / "out", runs).read_text(encoding="utf-8")
    assert (
        page.index("<h2>Side by side</h2>") < page.index(f"<h2>{runs[0].name}</h2>")
        and '<p class="lead">2 runs.' in page
    )
    assert difference in page
    curves = (tmp_path / "out/plots/side-by-side/long-by-position.csv").read_text().splitlines()[1:]
    assert [line.partition(",")[0] for line in curves] == [f"sparse k=128 ({run.name})" for run in runs for _ in "ab"]


def test_other_prompts_stand_side_by_side_without_a_difference(tmp_path):
    figures = {name: long_run(RIGHT, [1.0, 1.5, 2.0, 2.5], name) for name in ("one", "two")}
    rows = rows_of([read_run(folder_of(tmp_path, name, of)) for name, of in figures.items()])
    assert rows and all(one == two and difference == "" for one, two, difference in rows.values())


def test_only_what_runs_share_is_set_side_by_side(tmp_path):
    """Of three runs the third has another arm, so nothing is beside its figures; runs of other kinds stay alone."""
    arms = {"one": "sparse k=128", "two": "sparse k=128", "three": "sparse k=256"}
    runs = [read_run(folder_of(tmp_path, name, long_run(RIGHT, [1.0, 2.0], "p", arm))) for name, arm in arms.items()]
    rows = rows_of(runs)
    assert len(rows) == 3 and all(cells[2] == "" and cells[4] == "" for cells in rows.values())
    assert not side_by_side({run.name: run.sections for run in runs[1:]})  # no figure in common
    other = Section(
        "short", "Short prompts", charts=[Chart("a", "A", "", {"": [("x", share_of(RIGHT, "p"))]}, "x", "y")]
    )
    assert not side_by_side({"one": runs[0].sections, "other": [other]})
    assert "Side by side" not in write_runs(tmp_path / "out", runs[:1]).read_text(encoding="utf-8")


def test_checks_of_serving_stand_probe_beside_probe():
    head = ("probe", "tokens", "state", "what was seen")
    runs = {
        name: [
            Section(
                "serving", f"Serving of {name}", tables=[Table(head, [("a", "8", state, ""), ("b", "8", "ok", "")])]
            )
        ]
        for name, state in (("one", "ok"), ("two", "wrong"))
    }
    (section,) = side_by_side(runs)
    assert section.title == "Serving of one | Serving of two" and section.tables[0].head[0] == "run"
    assert [row[:4] for row in section.tables[0].rows] == [
        ("one", "a", "8", "ok"),
        ("two", "a", "8", "wrong"),
        ("one", "b", "8", "ok"),
        ("two", "b", "8", "ok"),
    ]


def test_a_run_without_charts_is_not_left_out():
    """Of the runs of a kind one has charts, or two have: the tables of all stand beside each other."""
    chart = Chart("mass", "Mass", "", {"": [(64, share_of(RIGHT, "p"))]}, "k", "mass")
    drawn, bare = (
        Section("profile", "Profile", tables=[Table(("answer", "reason"), [("verdict", word)])], charts=charts)
        for word, charts in (("sparse", [chart]), ("dense", []))
    )
    (section,) = side_by_side({"one": [drawn], "two": [bare]})
    assert [table.rows for table in section.tables] == [[("one", "verdict", "sparse"), ("two", "verdict", "dense")]]
    assert not section.charts
    (section,) = side_by_side({"one": [drawn], "two": [bare], "three": [drawn]})
    figures, answers = section.tables
    assert figures.head[1:3] == ("one", "three") and len(figures.rows) == 1 and len(section.charts) == 1
    assert {row[0] for row in answers.rows} == {"one", "two", "three"}


def test_a_run_may_have_any_name(tmp_path):
    names = ("Side by side", "side-by-side", "two")
    runs = [read_run(folder_of(tmp_path, name, long_run(RIGHT, [1.0, 2.0], "p"))) for name in names]
    write_runs(tmp_path / "out", [replace(run, name=name) for run, name in zip(runs, names, strict=True)])
    files = {str(file.relative_to(tmp_path / "out/plots")) for file in (tmp_path / "out/plots").rglob("*-position.csv")}
    assert files == {
        "Side-by-side-by-position.csv",
        "side-by-side-by-position.csv",
        "two-by-position.csv",
        "side-by-side/long-by-position.csv",
    }
