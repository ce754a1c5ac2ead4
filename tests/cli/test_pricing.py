"""`tokensieve cost`: its files, its tables, and one line for bad input."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.commands import Run, refusal, runner
from tokensieve.cost import paper


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    monkeypatch.chdir(tmp_path)
    return runner(capsys)


def traffic(folder: Path) -> Path:
    path = folder / "usage.jsonl"
    path.write_text('{"prompt_tokens": 90000, "completion_tokens": 500}\n')
    return path


def test_paper_writes_the_figure(run: Run) -> None:
    ended = run("cost", "--paper", "--out", "out")
    assert ended.status == 0, ended
    found = json.loads(Path("out/cost.json").read_text())
    for name, curve in paper.FIGURE_3.items():
        assert list(found[name]) == [str(p) for p in paper.POSITIONS]
        for position, usd in zip(paper.POSITIONS, curve, strict=True):
            assert found[name][str(position)] == pytest.approx(usd, rel=0.15)
    assert found["parameters"] == {name: p.value for name, p in paper.PARAMETERS.items()}
    assert {*found["why"]} == {*found["parameters"]}
    rows = list(csv.DictReader(Path("out/cost.csv").read_text().splitlines()))
    assert {(r["phase"], r["attention"]) for r in rows} == {tuple(name.split("_")) for name in paper.FIGURE_3}
    assert sum(r["paper_usd_per_million"] != "" for r in rows) == 16 and all(r["label"] for r in rows)
    assert ElementTree.parse("out/cost.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "selected_decode" in ended.out and "measured shares" in ended.out


def test_a_model_of_your_own(run: Run) -> None:
    for model in ("sparse", "base"):
        ended = run("cost", model, "--gpu", "h100", "--positions", "8192,1024", "--out", "out", "--top-k", "512")
        assert ended.status == 0, ended
        found = json.loads(Path("out/cost.json").read_text())
        assert found["serving"]["gpu"]["name"] == "H100" and found["serving"]["gpus"] == 1
        assert [row["position"] for row in found["rows"]] == [1024, 8192] * 4
        for row in found["rows"]:
            assert row["label"] and row["bound"] in {"compute", "memory", "interconnect"}
            assert row["gpu_seconds"] == pytest.approx(sum(p["seconds"] for p in row["parts"]))
    raw = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    raw |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    raw |= {"max_position_embeddings": 131072}
    Path("config.json").write_text(json.dumps(raw))
    ended = run("cost", "config.json", "--gpu", "H200", "--weights", "bf16", "--positions", "65536", "--tensor", 2)
    assert ended.status == 0 and "measured" in ended.out and "attention over 2" in ended.out
    assert json.loads(Path("runs/cost/cost.json").read_text())["serving"]["cache"] == "bf16"


@pytest.mark.parametrize("model", ["moonlight-16b-a3b", "deepseek-v2-lite", "qwen3-8b"])
def test_published_shapes_by_name(run: Run, model: str) -> None:
    ended = run("cost", model, "--gpu", "H200", "--positions", "4096", "--weights", "bf16", "--out", "out")
    assert ended.status == 0 and ended.out.startswith(f"{model} on H200"), ended
    assert len(json.loads(Path("out/cost.json").read_text())["rows"]) == 4


def test_prices_on_traffic(run: Run, tmp_path: Path) -> None:
    ended = run("cost", "--paper", "--prices", "prices", "--traffic", traffic(tmp_path), "--out", "out")
    assert ended.status == 0, ended
    found = json.loads(Path("out/prices.json").read_text())
    assert [entry["name"] for entry in found["lists"]] == ["V3.1-Terminus", "V3.2-Exp"]
    assert (
        found["cut"]["output"]["cost"] < found["cut"]["output"]["price"]
    )  # so long a context costs less than a quarter
    assert "V3.2-Exp" in ended.out and "the price falls to 0.25" in ended.out


def test_bad_input(run: Run, tmp_path: Path) -> None:
    refused = refusal(run)
    requests = traffic(tmp_path)
    Path("unknown.toml").write_text('[[lists]]\nname = "a"\nattention = "dense"\ninput = 1.0\ncheap = 2.0\n')
    refused(("unknown.toml", "unknown key cheap"), "cost", "--prices", "unknown.toml", "--traffic", requests)
    refused(("--prices", "--traffic"), "cost", "--prices", "prices")
    refused(("nowhere", "cannot be read"), "cost", "--prices", "prices", "--traffic", "nowhere")
    refused(("A100", "H800"), "cost", "--gpu", "A100")
    refused(("--price is infinite",), "cost", "sparse", "--price", "inf")
    refused(("no such folder",), "cost", "nothing-here")
    refused(("nothing is fetched",), "cost", "owner/name")
    refused(("leave out MODEL, --gpu",), "cost", "sparse", "--paper", "--gpu", "H100")
    refused(("do not fit", "--gpus"), "cost", "--gpus", 8)
    refused(("longer than the model's",), "cost", "sparse", "--prices", "prices", "--traffic", requests)
    refused(("32769",), "cost", "sparse", "--positions", "32769")
    refused(("--positions: x is no whole number",), "cost", "--positions", "x")
    refused(("--positions -5: positions count from 0",), "cost", "sparse", "--positions=-5")
    refused(("--two-level 64",), "cost", "--two-level", "64")
    refused(("the chosen blocks hold 1 keys", "k is"), "cost", "--two-level", "1x1")
    refused(("--acceptance is that of drafted tokens",), "cost", "--acceptance", "0.9")
    Path("config.json").write_text("[]")
    refused(("config.json", "not an object"), "cost", "config.json")
