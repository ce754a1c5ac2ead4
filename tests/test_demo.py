"""The main job from end to end, on a model that fits in a test."""

import inspect
import json
import shutil

import pytest
import torch
from rich.console import Console

import tokensieve
from tests.support import models
from tokensieve import demo
from tokensieve.config import (
    DataConfig,
    DemoConfig,
    LongSizes,
    PhaseConfig,
    ShortSizes,
    SourceConfig,
    TrainConfig,
    UserError,
    load_config,
)
from tokensieve.data import train_tokenizer
from tokensieve.data.sources import source_files
from tokensieve.evals import ARMS, parity_criteria
from tokensieve.tasks import PlainEncoder

MODULES = ("argparse", "ast", "inspect", "textwrap", "typing", "random", "shutil", "dataclasses", "enum", "pathlib")
CONTEXT, DECODE = 1000, (64, 600)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A dense checkpoint with a tokenizer, and a folder of text."""
    folder = tmp_path_factory.mktemp("demo")
    text = folder / "text"
    text.mkdir()
    for name in MODULES:
        shutil.copy(inspect.getfile(__import__(name)), text / f"{name}.py")
    model = models.ours(models.config("v3", vocab_size=1024, num_hidden_layers=2))
    model.folder = train_tokenizer((p.read_text() for p in text.iterdir()), folder / "tokenizer", 1024)
    tokensieve.save(model, folder / "base")
    return folder


def config(base, **changes):
    text = DataConfig(
        (SourceConfig(str(base / "text")), SourceConfig("retrieval")),
        tokenizer=str(base / "base"),
        cache=str(base / "cache"),
        held_out_share=0.5,
    )
    stages = {
        name: TrainConfig(name, str(base / "base"), "", (PhaseConfig(steps, CONTEXT, 1),), text, track=())
        for name, steps in (("warmup", 3), ("adapt", 2))
    }
    figures = {
        "model": str(base / "base"),
        "out": str(base / "out"),
        "context": CONTEXT,
        "top_k": 32,
        "index_heads": 4,
        "index_dim": 16,
        "needle_contexts": 1,
        "ppl_sequences": 2,
        "decode_contexts": DECODE,
        "texts": str(base / "text"),
        "heat_lengths": (960,),
        "long": LongSizes((500,), ("single",), prompts=1, texts=0),
        "short": ShortSizes(prompts=1, texts=1, tokens=100),
    }
    return DemoConfig(**(figures | stages | changes))


def test_demo_keeps_what_was_measured_when_a_long_suite_breaks_off(base, monkeypatch):
    def broken_off(arms, tokenizer, documents, sizes, on_progress, judged, on_figures):
        on_figures({"tasks": [], "sizes": {}})
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.evals, "judge_long", broken_off)
    with pytest.raises(KeyboardInterrupt):
        demo.run(config(base, out=str(base / "broken off")), Console(record=True, width=120))
    metrics = json.loads((base / "broken off" / "metrics.json").read_text())
    assert metrics["long"]["tasks"] == [] and metrics["short"]["tasks"] and metrics["compared"]["ppl"]
    assert (base / "broken off" / "report.html").is_file()


def test_demo_writes_checkpoint_metrics_and_report(base):
    console = Console(record=True, width=120)
    (base / "out").mkdir(exist_ok=True)
    (base / "out" / "mine.txt").write_text("kept")
    returned = demo.run(config(base), console)
    out = base / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))  # whose tuples are lists on disk
    rest = {
        "kl",
        "recall",
        "decode_ms",
        "chunk_ms",
        "kv_read_fraction",
        "bytes_read_fraction",
        "long",
        "short",
        "top_k",
        "context",
        "seconds",
    }
    assert set(metrics) == set(ARMS) | rest | {"compared"}
    assert all(set(metrics[arm]) == {"ppl", "needle", "needle_interval", "estimates"} for arm in ARMS)
    over_dense = metrics["compared"]["ppl"]["dense"]
    assert over_dense["value"] == pytest.approx(metrics["sparse"]["ppl"] / metrics["dense"]["ppl"], rel=1e-6)
    assert set(metrics["kl"]) == set(metrics["recall"]) == {"first", "last"}
    assert metrics["kl"]["last"] < metrics["kl"]["first"]
    for timed in ("decode_ms", "chunk_ms"):
        assert list(metrics[timed]) == ["dense", "sparse"]
        assert all(list(ms) == ["64", "600"] for ms in metrics[timed].values())
    assert metrics["kv_read_fraction"] == 32 / 1000 and metrics["top_k"] == 32 and metrics["context"] == CONTEXT
    details = json.loads((out / "details.json").read_text())
    card = (out / "sparse" / "README.md").read_text()
    assert "Training, `warmup`: 3 steps" in card and "Training, `adapt`: 2 steps" in card
    page = (out / "report.html").read_text()
    assert [row["arm"] for row in metrics["long"]["tasks"]][:2] == ["dense_adapted", "sparse k=32"]
    assert "Long contexts, by task" in page and "<td>untrained_indexer</td>" in page and "Short prompts" in page
    assert details["questions"] == 16 and details["heat"]["sparse"]["lengths"] == [960, 1000]
    stages = [(row["stage"], row["step"]) for row in details["history"]]
    assert stages == [
        ("warm-up", 0),
        ("warm-up", 1),
        ("warm-up", 2),
        ("warm-up", 3),
        ("adaptation", 1),
        ("adaptation", 2),
    ]
    assert ["recall" in row for row in details["history"]] == [True, False, False, True, False, True]
    assert "</html>" in (out / "report.html").read_text() and (out / "mine.txt").read_text() == "kept"

    sparse = tokensieve.load(out / "sparse")
    assert sparse.is_sparse and sparse.config.index_topk == 32
    dense = tokensieve.load(base / "base")
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        assert not torch.equal(sparse(tokens).logits, dense(tokens).logits)
    shown = console.export_text()
    assert "untrained_indexer" in shown and str(out / "report.html") in shown.replace("\n", "")


def test_a_demo_without_needles(base, tmp_path):
    """For a model that was never trained to read them: perplexity, recall and times, and no figure of 0%."""
    console = Console(record=True, width=120)
    few = {"needle_contexts": 0, "heat_lengths": (), "long": None, "short": None, "decode_contexts": (64,)}
    metrics = demo.run(config(base, out=str(tmp_path / "out"), **few), console)
    assert set(metrics["sparse"]) == {"ppl", "estimates"} and set(metrics["sparse"]["estimates"]) == {"ppl"}
    assert metrics["compared"]["needle"] == {}
    assert {c.name.split()[0] for c in parity_criteria(metrics)} == {"sparse", "recall"}
    page, shown = (tmp_path / "out" / "report.html").read_text(), console.export_text()
    assert "acts found" not in page and "</html>" in page and "needles -" not in shown and "questions" not in shown


def test_indexers_may_begin_from_the_attention(base):
    """Those that are trained; the control keeps random ones."""
    settings = config(base, index_init="attention")
    dense = tokensieve.load(settings.model)
    encode = PlainEncoder(tokensieve.load_tokenizer(settings.model))
    begun, control = demo._sparsified(settings, dense, encode), demo._sparsified(settings, dense)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    assert not torch.equal(begun.state_dict()[name], control.state_dict()[name])
    plain = demo._sparsified(config(base), dense, encode)
    assert torch.equal(plain.state_dict()[name], control.state_dict()[name])


def test_the_bundled_texts_suffice_for_the_bundled_demo():
    """24 texts, each a whole stretch of the demo's context, and none of them in the source that it trains on."""
    settings = load_config(DemoConfig, "demo")
    documents = demo.held_out(settings)
    encode = PlainEncoder(tokensieve.load_tokenizer(settings.model))
    assert len(documents) >= settings.ppl_sequences >= 24
    assert all(len(encode(document.text)) + len(encode.begin) >= settings.context for document in documents)
    trained = {file.name for file in source_files("python")}
    assert not any(name.split(".")[0] == "tokensieve" for name in trained)


def test_models_of_an_earlier_demo_are_removed_and_nothing_else(base, tmp_path):
    for name in ("dense", "sparse", "mine"):
        tokensieve.save(models.ours(models.config("v3", vocab_size=1024, num_hidden_layers=1)), tmp_path / name)
    (tmp_path / "sparse" / "tokenizer.json").write_text("of another model")
    with pytest.raises(UserError, match="dense is one that this demo would replace; name another folder with --out"):
        demo.run(config(base, out=str(tmp_path), model=str(tmp_path / "dense")), Console(quiet=True))
    demo._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_second_demo_takes_the_first_ones_place(base, tmp_path):
    figures = [demo.run(config(base, out=str(tmp_path / "out")), Console(quiet=True)) for _ in range(2)]
    assert figures[0]["sparse"] == figures[1]["sparse"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(figures[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_k": 1000}, "context 1000 is not longer than top_k 1000"),
        ({"needle_contexts": 0}, "heat_lengths asks for needles"),
        ({"heat_lengths": (500,)}, "16 needles do not fit in a context of 500 tokens"),
        ({"long": LongSizes((500,), ("riddles",))}, "'riddles' is unknown"),
        ({"long": LongSizes((1030,))}, "1030 tokens is past the model's 1024 positions"),
        ({"long": LongSizes((500,), top_k=(0,))}, "each k must be at least 1"),
        ({"decode_contexts": (1025,)}, "1025 tokens is past the model's 1024 positions"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_done(base, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        demo.run(config(base, out=str(tmp_path / "out"), **changes), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_the_demo_starts_from_a_dense_model(base, tmp_path):
    sparse = tokensieve.sparsify(tokensieve.load(base / "base"), 32, 4, 16)
    tokensieve.save(sparse, tmp_path / "sparse")
    with pytest.raises(UserError, match="is sparse already"):
        demo.run(config(base, model=str(tmp_path / "sparse"), out=str(tmp_path / "out")), Console(quiet=True))
