"""`tokensieve profile` as a user types it, on a tiny model and a few files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tests.report.test_report import Nesting
from tests.support import commands, models
from tokensieve.report import plots

FEW = ("--minutes", "1", "--set", "top_k=[16,64,2048]", "--set", "texts=3", "--set", "queries=8")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("profile"))


def test_sparse_is_recommended(run: Any, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run(
        "profile",
        home / "text",
        "--model",
        home / "dense",
        *FEW,
        "--context",
        "600",
        "--set",
        "mass=0.35",
        "--out",
        out,
    )
    assert ended.status == 0, ended
    for words in (
        "11 documents", "all of the source", "Attention in 3 texts, of at most 600 tokens: 24 queries in each layer",
        "no text is longer", "Use sparse attention: ", "k = 64: the best 64 keys hold", "Stay dense below ",
        "Every layer needs its own indexer: every layer loses", "warm-up", "adaptation", "timed on this machine",
    ):  # fmt: skip
        assert words in ended.out, (words, ended.out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["advice"]["top_k"] == 64 and metrics["advice"]["verdict"] == "sparse"
    assert metrics["attention"]["mass"]["2048"] == {"value": 1.0, "low": None, "high": None, "n": 0, "clusters": None}
    assert [stage["stage"] for stage in metrics["training"]] == ["warmup", "adapt"]
    assert 0 < metrics["spent"]["prompt_flops"] < 1 and metrics["seconds"] > 0 and metrics["run"]["command"]

    page = (out / "profile.html").read_text()
    found = Nesting(page)
    assert found.seen.isdisjoint({"script", "link", "iframe", "img", "object"}) and page.count("<svg") == 4
    assert not set(re.findall(r"#0[0-9]0[0-9]0[0-9]", page)) & set(plots.VARIABLES)
    assert metrics["advice"]["reasons"]["groups"] in page and "k = 64" in page
    drawing = (out / "mass.svg").read_text()
    assert drawing.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in drawing and "--blue: #" in drawing


def test_short_data_stay_dense(run: Any, home: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"row {i} says nothing"}) + "\n" for i in range(9))
    )
    source = f"{tmp_path / 'rows.jsonl'}#body"
    ended = run("profile", source, "--model", home / "sparse", "--out", tmp_path / "out")
    assert ended.status == 0 and "Stay with dense attention: no text has more than 128 tokens" in ended.out
    assert "training" not in ended.out and not (tmp_path / "out" / "mass.svg").exists()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["training"] is None and metrics["attention"]["texts"] == 0
    assert "stay dense" in (tmp_path / "out" / "profile.html").read_text()


def test_a_sparse_model_keeps_its_indexer(run: Any, home: Path, tmp_path: Path) -> None:
    text = ("profile", home / "text", "--model", home / "sparse", *FEW)
    ended = run(*text, "--set", "mass=0.05", "--context", "300", "--peak-flops", "1e12", "--out", tmp_path)
    assert ended.status == 0 and "of at most 300 tokens" in ended.out and "40% of the peak given" in ended.out, ended
    assert json.loads((tmp_path / "metrics.json").read_text())["indexer"] == {"heads": 4, "dim": 16}
    commands.refusal(run)(("for dense models",), *text, "--set", "index_heads=2")


def test_bad_input(run: Any, home: Path, tmp_path: Path) -> None:
    refused = commands.refusal(run)
    model = ("--model", home / "dense")
    refused(("nowhere.txt", "does not exist"), "profile", "nowhere.txt", *model)
    refused(("retrieval", "text of others"), "profile", "retrieval", *model)
    (tmp_path / "empty.txt").write_text("\n")
    refused(("empty.txt", "no readable text"), "profile", tmp_path / "empty.txt", *model)
    (tmp_path / "short.txt").write_text("a")
    refused(("short.txt", "shorter than 2 tokens"), "profile", tmp_path / "short.txt", *model)
    refused(("5000 tokens", "1600 positions", "--context"), "profile", home / "text", *model, "--context", "5000")
    refused(("--context 100", "k = 128"), "profile", home / "text", *model, "--context", "100")
    short = "top_k=[1600, 3200]"
    refused(("1600 positions", "k = 1600", "top_k=[400]"), "profile", home / "text", *model, "--set", short)
    bare = tokensieve.load(home / "dense")
    kinds = {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
    sharing = models.ours(models.config("glm", vocab_size=bare.config.vocab_size, **kinds))
    sharing.folder = bare.folder
    tokensieve.save(sharing, tmp_path / "sharing")
    refused(("share indexers already",), "profile", home / "text", "--model", tmp_path / "sharing")
    bare.folder = None
    tokensieve.save(bare, tmp_path / "bare")
    refused(("no tokenizer.json",), "profile", home / "text", "--model", tmp_path / "bare")
