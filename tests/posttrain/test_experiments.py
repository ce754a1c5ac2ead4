"""benchmarks/posttraining.py: its commands, its tables from figures that are made up, and all of it in a small size."""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tests.support import models
from tests.support.processes import gone, until
from tokensieve.config import UserError, load_config
from tokensieve.posttrain_config import PosttrainConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ("tokens=64", "new_tokens=6", "reward.free=0.5")
BY_WEIGHT = {
    "length": {0.0: "without-length", 0.1: "seed-0-sparse", 1.6: "length-x16"},
    "language": {0.1: "seed-0-sparse", 0.4: "language-x4"},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks/posttraining.py"))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/posttraining_tables.py"))


def asked_for(work: Path, *sets: str, seeds: tuple[int, ...] = (0, 1)) -> argparse.Namespace:
    return argparse.Namespace(config="base", sets=list(sets), seeds=list(seeds), work=work, at_once=2)


def test_sequential_stages_have_the_mixed_stages_budget(
    script: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    asked = asked_for(tmp_path)
    config, notes = script["settings"](asked)
    found = script["jobs"](asked, config)
    assert len(config.domains) == 7 and notes == []
    assert [job.name for job in found[:4]] == ["seed-0-sparse", "seed-0-dense", "seed-1-sparse", "seed-1-dense"]
    chain = [job for job in found if job.name.startswith("sequential-")]
    given = [load_config(PosttrainConfig, "posttrain-base", job.sets) for job in chain]
    assert sum(each.rl.train.steps for each in given) == config.rl.train.steps
    assert [each.domains for each in given[:-1]] == [(name,) for name in config.domains[:-1]]
    assert given[-1].domains == config.domains and sum(given[-1].rl.ratios.values()) == 0
    assert given[-1].rl.ratios.keys() == {*config.domains} - {config.domains[-1]}
    assert [job.needs for job in chain[1:]] == [(job.name,) for job in chain[:-1]]
    assert given[1].rl.model == str(tmp_path / chain[0].name / "final/model") == given[1].model

    monkeypatch.setattr("tokensieve.sandbox.why_not", lambda: "no isolation here")
    asked = asked_for(tmp_path)
    config, (left_out, steps) = script["settings"](asked)
    assert not {"programming", "coding"} & {*config.domains} and config.rl.train.steps == 10 == 5 * 2
    assert "programming and coding are left out: no isolation here" in left_out and "10 steps in place of 14" in steps
    assert json.loads(next(s for s in asked.sets if "domains=" in s).partition("=")[2]) == [*config.domains]


def test_the_weight_of_one_term_is_multiplied(script: dict[str, Any], tmp_path: Path) -> None:
    asked = asked_for(tmp_path, "reward.length=0.25", "reward.language=0")
    config, _ = script["settings"](asked)
    by_name = {job.name: job for job in script["jobs"](asked, config)}
    weighed = {name: by_name[name] for name in by_name if "without" in name or "-x" in name}
    rewards = {n: load_config(PosttrainConfig, "posttrain-base", job.sets).reward for n, job in weighed.items()}
    changed = {n: {k: w for k, w in vars(r).items() if w != vars(config.reward)[k]} for n, r in rewards.items()}
    assert changed == {
        "without-length": {"length": 0}, "length-x4": {"length": 1}, "length-x16": {"length": 4},
        "without-rubric": {"rubric": 0}, "without-outcome": {"outcome": 0},
    }  # fmt: skip
    assert {job.needs for job in weighed.values()} == {("seed-0-sparse",)}
    assert script["runs_by_weight"](config, "seed-0-sparse")["length"] == {
        0: "without-length", 0.25: "seed-0-sparse", 1: "length-x4", 4: "length-x16"
    }  # fmt: skip


def test_what_is_done_with_other_settings_is_refused(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not count as done: the tables would mix figures of both."""
    monkeypatch.setattr(script["Job"], "arguments", lambda job, work: [sys.executable, "-c", "print('ran')"])
    job = script["Job"]("one", ("posttrain",), ("tokens=600",))
    for _ in range(2):
        assert script["Runs"](tmp_path, [job], 1).run(60) == []
        assert (tmp_path / "one.log").read_text() == "ran\n"
    for other in (replace(job, sets=("tokens=64",)), replace(job, command=("rl",))):
        with pytest.raises(UserError, match="one was run with other settings; give another --out"):
            script["Runs"](tmp_path, [other], 1)


def test_what_cannot_work_is_refused(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for given, says in (
        (("--seeds", "0", "0"), "name each once"),
        (("--set", "device=cpu"), "--set device: give --device"),
        (("--set", "seed=3"), "--set seed: give --seeds"),
    ):
        monkeypatch.setattr(sys, "argv", ["posttraining.py", *given])
        with pytest.raises(SystemExit, match="2"):
            script["arguments"]()
        assert says in capsys.readouterr().err
    monkeypatch.setattr("tokensieve.sandbox.why_not", lambda: "no isolation here")
    with pytest.raises(UserError, match="coding: no domain is left, since no isolation here"):
        script["settings"](asked_for(tmp_path, 'domains=["coding"]'))


SLEEPING = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
STARTED = """
import runpy, sys
script, work = sys.argv[1:]
made = runpy.run_path(script)
made["Job"].arguments = lambda job, work: [sys.executable, "-c", job.command[0]]
made["Runs"](made["Path"](work), [made["Job"](name, (%r,), ()) for name in "ab"], 2).run(600)
"""


def test_runs_end_with_the_script_even_if_it_is_killed(tmp_path: Path) -> None:
    """Else they hold the GPU and their folders' locks after an outer limit of time."""
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    command = [sys.executable, "-c", STARTED % SLEEPING, str(ROOT / "benchmarks/posttraining.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        try:
            until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
        finally:
            child.kill()
    until(lambda: all(gone(int(log.read_text())) for log in logs))


def test_what_runs_too_long_is_stopped(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script["Job"], "arguments", lambda job, work: [sys.executable, "-c", SLEEPING])
    jobs = [script["Job"](name, ("posttrain",), ()) for name in "abc"]
    assert script["Runs"](tmp_path, jobs, 2).run(0.5) == ["a", "b", "c"]
    assert all(gone(int((tmp_path / f"{name}.log").read_text() or 0)) for name in "ab")


def test_a_page_that_is_not_made_is_no_run_that_is_not_done(tmp_path: Path, script: dict[str, Any]) -> None:
    page = script["Job"]("a", ("posttrain",), ("beside=b",), ("a", "b"))
    assert script["Runs"](tmp_path, [page], 1).run(0.5) == ["the page of a and its twin"]


def run_of(tables: dict[str, Any], scores: dict[str, dict[str, list[float]]], steps: list[tuple[float, float]]) -> Any:
    evaluation = {
        model: {group: {"scores": values, "tokens": 10.0} for group, values in groups.items()}
        for model, groups in scores.items()
    }
    rows = [
        {"outcome/a-think": outcome, "completions/mean_length": tokens, "rollout/logp_difference": 1e-6 * (1 + place),
         "rollout/queries_past_k": 0.7}
        for place, (tokens, outcome) in enumerate(steps)
    ]  # fmt: skip
    metrics = {"evaluation": evaluation, "judge": "scripted", "seconds": {"final": 60.0}}
    return tables["Run"](metrics, {tables["MIXED"]: rows})


def test_tables(tables: dict[str, Any]) -> None:
    none, half, all_right = [0.0] * 8, [1.0, 0.0] * 4, [1.0] * 8
    sparse = {
        "base": {"a-think": none, "b-think": none}, "specialist-a": {"a-think": all_right},
        "specialist-b": {"b-think": none}, "distilled": {"a-think": none, "b-think": none},
        "final": {"a-think": half, "b-think": none},
    }  # fmt: skip
    dense = sparse | {"final": {"a-think": all_right, "b-think": none}}
    after, worse = {"final": {"a-think": all_right, "b-think": none}}, {"final": {"a-think": none, "b-think": none}}
    runs = {f"seed-{seed}-sparse": run_of(tables, sparse, [(10.0, 0.2), (20.0, 0.4)]) for seed in (0, 1)}
    runs |= {f"seed-{seed}-dense": run_of(tables, dense, [(15.0, 0.5), (30.0, 0.9)]) for seed in (0, 1)}
    runs |= {"sequential-1-a": run_of(tables, after, []), "sequential-2-b": run_of(tables, worse, [])}
    runs |= {"without-length": run_of(tables, worse, [])}
    text, figures = tables["tables"](runs, "seed-0-sparse", BY_WEIGHT, ["a note"])

    first, beyond = figures["Specialists, the distilled model, and the mixed stage"]
    assert first["specialist - base"]["value"] == 100 and first["specialist"]["n"] == 16
    assert first["final - distilled"]["value"] == 50 and first["final - distilled"]["clusters"] == 2
    assert first["of the gap closed"] == 0.5
    assert beyond["base"] == "beyond this model: 0 of 64 answers" and beyond["final"] == ""
    final = [row for row in figures["Sparse beside dense"] if row["group"] == "a-think" and row["model"] == "final"]
    assert final[0]["sparse - dense"]["value"] == -50 and final[0]["dense, tokens"] == 10
    (equal,) = figures["Sparse beside dense at equal output tokens"]
    assert equal["output tokens"] == "15 to 20" and equal["bins"] == 0  # one step of each, at its two ends
    assert figures["output tokens and outcome of every step"]["seed-0-sparse"][tables["MIXED"]][0] == (10.0, 0.2)
    (a,) = figures["One mixed stage beside one domain after the other"]
    assert a["end - own stage"]["value"] == -100 and a["mixed - end"]["value"] == 50 and a["place"] == 1
    without, given, _ = figures["The weights of the reward"]
    assert (without["term"], without["weight"], given["weight"]) == ("length", 0, 0.1)
    assert without["less the config's"]["value"] == -25 and without["less the config's"]["n"] == 16
    assert given["less the config's"] == "" and given["language share"] == ""  # figures of an earlier version
    mine = {row["run"]: row for row in figures["The runs"]}["seed-0-sparse"]
    assert mine["difference, mean"] == "1.50e-06" and mine["largest step"] == "2.00e-06" and mine["seconds"] == 60
    assert mine["agreement"] == "" and text.startswith("- a note\n- Every judge of these runs is the scripted one")
    assert "| a-think | 0.00 (0.00 to " in text and "n = 16 in 2 | 100.0 (" in text and "| b-think |" in text

    agreement = {"value": 0.5, "low": 0.1, "high": 0.8, "n": 21, "clusters": 8}
    other = {"judge": "m", "judge_agreement": {"all": {"agreement": agreement}}}
    judged = tables["Run"](runs["seed-0-sparse"].metrics | other, {})
    text, _ = tables["tables"](runs | {"seed-0-sparse": judged}, "seed-0-sparse", BY_WEIGHT, ["a note"])
    assert "| m | 0.50 (0.10 to 0.80), n = 21 in 8 |" in text and "Every judge" not in text

    short = {name: run for name, run in runs.items() if name != "sequential-2-b"}
    short["sequential-1-a"] = run_of(tables, {"final": {"a-think": all_right}}, [])
    _, figures = tables["tables"](short, "seed-0-sparse", BY_WEIGHT)
    (a,) = figures["One mixed stage beside one domain after the other"]
    assert a["behind its own stage"]["value"] == 100
    assert [a[column] for column in ("at the end", "end - own stage", "mixed - end")] == ["", "", ""]

    text, figures = tables["tables"]({}, "seed-0-sparse", BY_WEIGHT)
    assert text.count("Nothing yet.") == 6 and figures["The runs"] == []


def test_trade_offs(script: dict[str, Any], tables: dict[str, Any], tmp_path: Path) -> None:
    """A row for each weight, over answers and not over groups, and a point of the plot where a row says."""

    def measured(right: int, tokens: float, shares: tuple[float | None, float | None]) -> Any:
        found = {}
        for group, problems, share in zip(("a-think", "b-direct"), (30, 10), shares, strict=True):
            language = None if share is None else {"value": share, "n": problems}
            scores = [1.0] * right + [0.0] * (problems - right)
            found[group] = {"scores": scores, "tokens": tokens * problems / 10, "language": language}
        return tables["Run"]({"evaluation": {"final": found}}, {})

    runs = {
        "without-length": measured(10, 40.0, (0.9, None)), "seed-0-sparse": measured(8, 20.0, (0.8, 0.4)),
        "length-x16": measured(2, 4.0, (None, None)), "language-x4": measured(6, 20.0, (1.0, 0.8)),
    }  # fmt: skip
    text, figures = tables["tables"](runs, "seed-0-sparse", BY_WEIGHT)
    rows = figures["The weights of the reward"]
    columns = ("term", "weight", "output tokens", "language share")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("length", 0.0, 100.0, pytest.approx(90)), ("length", 0.1, 50.0, pytest.approx(70)), ("length", 1.6, 10.0, ""),
        ("language", 0.1, 50.0, pytest.approx(70)), ("language", 0.4, 50.0, pytest.approx(95)),
    ]  # fmt: skip
    assert [row["accuracy"]["value"] for row in rows] == [50, 40, 10, 40, 30]
    assert [row["less the config's"] and row["less the config's"]["value"] for row in rows] == [10, "", -30, "", -10]
    assert "| language | 0.40 | 30.0 (" in text and " | 50.0 | 95.0 |\n" in text

    plot = script["posttraining_plot"]
    assert plot.write_trade_offs(tmp_path, rows[:1]) is None and not [*tmp_path.iterdir()]
    plot.write_trade_offs(tmp_path, rows)
    drawn = (tmp_path / "trade-offs.svg").read_text()
    for words in (">weight of length<", ">weight of language<", ">accuracy, %<", ">output tokens, mean<"):
        assert words in drawn
    labels = re.findall(r'middle; fill: var\(--ink\)" x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+)<', drawn)
    assert [weight for *_, weight in labels] == ["0", "0.1", "1.6", "0.1", "0.4"]
    across, down = ([float(label[axis]) for label in labels] for axis in (0, 1))
    highs = [row["accuracy"]["high"] for row in rows]
    assert (across[0] - across[2]) / (across[1] - across[2]) == pytest.approx((100 - 10) / (50 - 10), rel=1e-3)
    assert (down[0] - down[2]) / (down[4] - down[2]) == pytest.approx(
        (highs[0] - highs[2]) / (highs[4] - highs[2]), rel=1e-3
    )
    plot.write_trade_offs(tmp_path, [row | {"weight": weight} for row in rows[:1] for weight in (0, 0.4)])
    assert ">0, 0.4<" in (tmp_path / "trade-offs.svg").read_text()
    assert max(across[:3]) < min(across[3:]) and down[1] == down[3]  # panels beside each other, with one vertical axis


def test_others_are_compared_with_the_run_that_they_began_from(
    script: dict[str, Any], tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--seeds 2 10` that is seed 2, though "seed-10" comes first by name. Seeds not asked for are left out."""
    for name, score in (
        ("seed-2-sparse", 1.0),
        ("seed-10-sparse", 0.0),
        ("seed-0-sparse", 0.0),
        ("without-length", 0.0),
    ):
        folder = tmp_path / "out/runs" / name
        folder.mkdir(parents=True)
        final = {"a-think": {"scores": [score] * 8, "tokens": 10.0}}
        (folder / "metrics.json").write_text(json.dumps({"evaluation": {"final": final}}))
    monkeypatch.setattr(script["Runs"], "run", lambda runs, seconds: [])
    monkeypatch.setattr(sys, "argv", ["posttraining.py", "--seeds", "2", "10", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        script["main"]()
    figures = json.loads((tmp_path / "out/figures.json").read_text())
    length = figures["The weights of the reward"][0]
    assert length["weight"] == 0 and length["less the config's"]["value"] == -100
    assert {row["run"] for row in figures["The runs"]} == {"seed-2-sparse", "seed-10-sparse", "without-length"}


@pytest.mark.slow
def test_all_of_it(tmp_path: Path) -> None:
    """On a random model. What was stopped goes on, and what is done is not done again."""
    yarn = {"rope_parameters": models.YARN, "max_position_embeddings": 1024}
    made = models.ours(models.config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=2, **yarn))
    tokensieve.save(made, tmp_path / "model")
    tokensieve.load_tokenizer("base").save_pretrained(tmp_path / "model")
    sets = [word for value in (f"model={tmp_path / 'model'}", *TINY) for word in ("--set", value)]
    command = [sys.executable, str(ROOT / "benchmarks/posttraining.py"), "--quick", "--device", "cpu", *sets]
    command += ["--at-once", "1", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def ran(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)

    stopped = ran("--minutes", "0.05")
    assert stopped.returncode == 1 and "not done: seed-0-sparse, seed-0-dense" in stopped.stdout, stopped.stderr
    child = ran()
    logs = "\n".join(path.read_text()[-2000:] for path in (tmp_path / "work").glob("*.log"))
    assert child.returncode == 0 and "not done" not in child.stdout, (child.stdout, child.stderr, logs)
    figures = json.loads((tmp_path / "out/figures.json").read_text())
    assert {row["run"] for row in figures["The runs"]} == {
        "seed-0-sparse", "seed-0-dense", "sequential-1-logic", "sequential-2-writing", "without-length", "length-x4",
        "length-x16", "without-language", "language-x4", "language-x16", "without-rubric", "without-outcome",
    }  # fmt: skip
    weighed = figures["The weights of the reward"]
    assert [row["weight"] for row in weighed] == [0, 0.1, 0.4, 1.6, 0, 0.1, 0.4, 1.6, 0, 1, 0, 1]
    assert all(0 <= row["language share"] <= 100 for row in weighed) and (tmp_path / "out/trade-offs.svg").is_file()
    assert all(row["steps"] for row in figures["The runs"])
    for name in ("sparse", "dense"):
        kept = tmp_path / "out/runs" / f"seed-0-{name}"
        assert (kept / "specialists/logic/rl/history.json").is_file() and (kept / "reward.svg").is_file()
    assert ">dense<" in (tmp_path / "out/runs/seed-0-sparse/posttrain.html").read_text()
    assert not [*(tmp_path / "out").rglob("*.safetensors")] and [*(tmp_path / "work").rglob("*.safetensors")]
    steps = json.loads((tmp_path / "out/runs/seed-0-sparse/final/history.json").read_text())
    assert {"outcome/logic-direct", "outcome/writing-direct"} <= {name for step in steps for name in step}
    again = ran()
    assert again.returncode == 0 and "begun" not in again.stdout and "## The runs" in again.stdout
