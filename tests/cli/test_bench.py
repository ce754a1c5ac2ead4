"""The benchmarks run and write what docs/results.md reads: on the CPU beside transformers, and training in sizes that
are none.
"""

import argparse
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokensieve.config import UserError
from tokensieve.evals import intervals

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_quick_benchmark_writes_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cpu.json"
    child = benchmark("cpu", "--quick", "--threads", "1", "--out", str(out))
    assert child.returncode == 0, child.stderr
    figures = json.loads(out.read_text())
    assert figures["logits_difference"] < 1e-4
    for name in ("prefill_seconds", "decode_ms", "memory_bytes"):
        assert set(figures[name]) == {"tokensieve", "transformers"}
    assert min(figures["decode_ms"].values()) > 0 and set(figures["own_decode_ms"]) == {"256", "512", "1024"}
    assert set(figures["request_ms"]) == {"kept", "new"} and min(figures["request_ms"].values()) > 0


def questions(out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/questions", "--quick", "--out", str(out), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(out.read_text())


def test_what_layers_select_and_whether_they_find_what_a_retriever_finds(tmp_path: Path) -> None:
    found = questions(tmp_path / "new" / "questions.json", "--only", "layers,retriever")
    for text in found["layers"]["texts"]:
        kinds = ("word or name", "keyword", "number", "punctuation", "line end", "space")
        assert sum(text["available"][kind] for kind in kinds) == pytest.approx(1)
        mean = [sum(text["available"][kind] * text["lift"][kind][layer] for kind in kinds) for layer in range(8)]
        assert mean == pytest.approx([1] * 8)  # every selected token is of one of these kinds
        assert [row[layer] for layer, row in enumerate(text["common"])] == pytest.approx([1] * 8)
        assert all(text["chance"] < share <= 1.001 for row in text["common"] for share in row)
    rows = found["retriever"]["rows"]
    assert [row["context"] for row in rows] == [0, 0, 1, 1]
    assert all(row["bm25"] == row["layers"][-1] == 0 and row["selected"][-1] for row in rows)  # its last layer finds it
    assert all(row["answered"]["indexer"] and row["answered"]["BM25"] for row in rows)


def test_rows_of_the_engine_are_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.json"
    child = benchmark("engine_rows", "--quick", "--lengths", "256", "--out", str(out))
    assert child.returncode == 0 and child.stdout.count("dense/sparse indexer") == 4, child.stderr
    figures = json.loads(out.read_text())
    cells = {(cell["shape"], cell["work"]): cell for cell in figures["cells"]}
    assert len(cells) == 4 and all(cell["tokens"] == 256 for cell in cells.values())
    for (_, work), cell in cells.items():
        assert list(cell["ratio"]) == (["indexer"] if work == "decode" else ["indexer", "near"])
        for name, ratio in cell["ratio"].items():
            assert ratio == pytest.approx(cell["model"]["dense"] / cell["model"][name])
    assert any("dense_attention" in line for line in figures["backends"])


@pytest.mark.slow
def test_all_questions_are_answered(tmp_path: Path) -> None:
    found = questions(tmp_path / "questions.json")
    below, *_, beyond = found["short"]["stretches"]
    assert below["largest"]["512"] < 1e-3 < beyond["largest"]["512"]  # up to k only rounding differs
    assert len(found["dense"]["inputs"]) == 12 and all(0 < of["mass"] < 1 for of in found["dense"]["inputs"])
    appended = [of for name, of in found["stream"].items() if name != "engine"]
    assert len(appended) == 8 and all(of["largest"] < 1e-3 and of["same"]["value"] == 1 for of in appended)
    assert [of["cached"] for of in found["stream"]["engine"].values()] == [512, 512, 0]


@pytest.mark.slow
def test_quick_training_is_measured_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "new" / "training.json"
    child = benchmark("gpu_training", "--quick", "--out", str(out))
    assert child.returncode == 0, child.stderr
    figures = json.loads(out.read_text())
    curves = {(row["stage"], row["loss"]): row for row in figures["losses"]}
    assert set(curves) == {("pretrain", "lm"), ("warmup", "kl"), ("adapt", "lm"), ("adapt", "kl")}
    for row in curves.values():
        assert 0 <= row["mean"] <= row["largest"] <= figures["allowed"]["largest"]
        assert set(row["floor"]) == {"reference", "kernels"}
    if not torch.cuda.is_available():  # what `auto` took is not what it is compared with
        assert "dense_attention on cpu: fused backend" in figures["backends"]
    assert [row["stage"] for row in figures["speed"]] == 2 * ["dense", "warmup", "adapt"]
    assert all(row["seconds"] > 0 and row["tflop"] > 0 and not row["missing"] for row in figures["speed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_training_is_not_measured_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_training.py", "--out", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_training.py"), run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "gpu_training: torch sees no CUDA device here\n"
    assert not list(tmp_path.iterdir())


def two_levels(options: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["gpu_two_level.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_two_level.py"), run_name="__main__")
    return int(ended.value.code or 0)


def test_quick_selection_in_two_levels_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "two.json"
    assert two_levels(["--quick", "--out", str(out)], monkeypatch) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["keys"], row["precision"]) for row in rows} == {
        (kind, precision) for kind in ("random", "drifting") for precision in ("fp8", "bf16")
    }
    for row in rows:
        assert row["same_with_all_blocks"] and row["one_level"] > 0 < row["two_levels"]
        assert row["iou"] < 0.3 if row["keys"] == "random" else 0.7 < row["iou"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_selection_in_two_levels_is_not_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert two_levels([], monkeypatch) == 2
    assert capsys.readouterr().err == "gpu_two_level: torch sees no CUDA device here; --quick runs without one\n"


def test_drifting_keys_are_the_process_that_they_are_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    drifting = runpy.run_path(str(ROOT / "benchmarks" / "gpu_two_level.py"))["drifting"]
    noise, r = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), math.exp(-1 / 64)
    expected = [noise[0]]
    for e in noise[1:]:
        expected.append(r * expected[-1] + (1 - r * r) ** 0.5 * e)
    assert torch.allclose(drifting(noise, 64), torch.stack(expected))


@pytest.mark.slow
def test_gpu_benchmark_without_a_gpu() -> None:
    """Nor Triton, which machines without a GPU may lack: a package that cannot be imported stands in its place."""
    run = (
        "import runpy, sys; sys.modules['triton'] = None; sys.path.insert(0, 'benchmarks'); "
        "runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, ""), child.stderr
    assert child.stderr.splitlines() == ["bench-gpu: torch sees no CUDA device here"]


@pytest.mark.slow
def test_selections_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "new" / "selections.json"
    sizes = ("--context", "700", "--texts", "2", "--needles", "0", "--fit", "1", "--device", "cpu", "--out", str(out))
    child = benchmark("selections", *sizes)
    assert child.returncode == 0, child.stderr
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["sparse"]["keys"] == 512 and rows["dense"]["keys"] > 512 and rows["window"]["keys"] == 512
    assert rows["k by query"]["keys"] == pytest.approx(512, rel=0.1) and rows["window"]["scores"] == 0
    assert all(f"| {name} |" in child.stdout for name in rows)


def test_selections_are_compared_over_documents_and_contexts() -> None:
    """A difference that one context makes alone is no better known than one context is."""
    line = runpy.run_path(str(ROOT / "benchmarks" / "selections.py"))["line"]
    clusters = {"documents": [0, 0, 1, 1, 2, 2], "contexts": [i // 16 for i in range(64)], "keys": 9.0, "scores": 1.0}
    base = clusters | {"arm": "sparse", "losses": [1.0] * 6, "answers": [1.0] * 64}
    row = clusters | {"arm": "window", "losses": [1.1, 1.1, 1.2, 1.2, 1.3, 1.3], "answers": [0.0] * 16 + [1.0] * 48}
    assert line(base, base) == "| sparse | 1 | 100.0% | 9 | 1.00 |"
    of_texts = intervals.ratio([a - b for a, b in zip(row["losses"], base["losses"], strict=True)])
    shown = re.fullmatch(
        r"\| window \| 1.2214 \((.*) to (.*)\) \| 75.0% \(-25.0: (.*) to (.*)\) \| .*", line(row, base)
    )
    assert shown and float(shown[2]) - float(shown[1]) > 1.3 * (of_texts.high - of_texts.low)
    assert float(shown[4]) > 0  # one of four contexts
    alone = line(row | {"documents": [0] * 6, "contexts": [0] * 64}, base)
    assert alone == "| window | 1.2214 | 75.0% (-25.0) | 9 | 1.00 |"


@pytest.mark.slow
def test_rollouts_are_timed_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rollouts.json"
    child = benchmark("rollouts", "--quick", "--device", "cpu", "--out", str(out))
    assert child.returncode == 0, child.stderr
    figures = json.loads(out.read_text())["figures"]
    assert figures["replayed"]["mean"] < 1e-6 and figures["not replayed"]["tokens"] == 32
    assert min(figures[name]["tokens_per_second"] for name in ("engine", "generate")) > 0


@pytest.mark.slow
def test_long_contexts_are_measured_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "new" / "long.json"
    child = benchmark("long_context", "--quick", "--device", "cpu", "--out", str(out))
    assert child.returncode == 0, child.stderr
    figures = json.loads(out.read_text())
    found = figures["quality"]["768"]
    assert 0.5 < found["recall"] <= 1 and (found["texts"], found["questions"]) == (2, 32)
    for estimate in (found["compared"]["ppl"]["dense"], found["compared"]["needle"]["dense"]):
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert f"| 768 | {found['dense']['ppl']:.3f} |" in child.stdout and "| 1,024 |  |" in child.stdout
    assert set(figures["speed"]) == {"dense 768", "sparse 768", "dense 1024", "sparse 1024"}
    for timed in figures["speed"].values():
        assert min(timed["prefill_seconds"], *timed["token_ms"].values()) > 0 and set(timed["token_ms"]) == {"1", "2"}

    resumed = runpy.run_path(str(ROOT / "benchmarks" / "long_context.py"))["resumed"]
    asked = argparse.Namespace(out=out, **figures["asked"])
    assert resumed(asked) == figures
    asked.texts = "3"
    with pytest.raises(UserError, match="holds figures of other settings"):
        resumed(asked)


def selections(options: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["selections.py", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "selections.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "mine"], "selections: --arm mine: write it as NAME=SELECTOR"),
        (["--arm", "sparse=window"], "selections: --arm sparse=window: there is an arm sparse already"),
        (["--arm", "a=window", "--also", "a=folder"], "selections: --also a=folder: there is an arm a already"),
        (["--arm", "a=nowhere:f", "--plain"], "selections: selection nowhere:f: there is no module nowhere"),
        (
            ["--against", "other", "--plain"],
            "--against other: there is no such arm; there are dense, sparse",
        ),
        (["--model", "nowhere"], "selections: model 'nowhere': no such folder"),
        (["--top-k", "few"], "few is no whole number"),
        (["--top-k", "0"], "give at least 1 key"),
    ],
)
def test_selections_that_cannot_be_compared(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("tokensieve.evals.text_sequences", lambda *_: [])
    monkeypatch.setattr("tokensieve.data.read_documents", lambda *_: [])
    assert selections(options, monkeypatch) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_index_scores_of_an_own_arm_are_not_made_up() -> None:
    line = runpy.run_path(str(ROOT / "benchmarks" / "selections.py"))["line"]
    base = {"arm": "sparse", "losses": [1.0, 2.0], "documents": [0, 1], "answers": [], "keys": 32.0, "scores": 1.0}
    assert line(base, base) == "| sparse | 1 |  | 32 | 1.00 |"
    assert line(base | {"arm": "mine", "scores": None}, base).endswith("|  | 32 |  |")
