"""The model card: what it states, what it takes over from the card before, and what it leaves alone."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import tokensieve
from tests.support import commands, training
from tests.support.models import config, ours
from tokensieve import train
from tokensieve.checkpoint.card import BASE_CARD, CARD, write_card
from tokensieve.config import LoraConfig
from tokensieve.model.loading import save_indexers

BASE = """---
license: other
license_name: llama3.1
license_link: https://example.com/licence
language: en
---
# The base
"""


def front(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / CARD).data.to_dict()


def text(folder: Path) -> str:
    return (folder / CARD).read_text()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """As the hub's cache holds it."""
    folder = tmp_path / "models--owner--the-base" / "snapshots" / "0a1b"
    tokensieve.save(ours(config("v3")), folder)
    (folder / CARD).write_text(BASE)
    return folder


def test_a_sparse_model_states_its_base(base: Path, tmp_path: Path) -> None:
    tokensieve.save(tokensieve.sparsify(tokensieve.load(base), 24, 4, 16), tmp_path / "sparse")
    found = front(tmp_path / "sparse")
    assert found["base_model"] == "owner/the-base" and found["library_name"] == "transformers"
    assert (found["license"], found["license_name"]) == ("other", "llama3.1")
    assert found["license_link"] == "https://example.com/licence"
    assert found["pipeline_tag"] == "text-generation" and "sparse-attention" in found["tags"]
    shown = text(tmp_path / "sparse")
    for words in (
        "# sparse\n",
        "| keys per query (k) | 24 |",
        "| index heads | 4 of width 16 |",
        "If they are new, they choose at random",
        f"Base: owner/the-base, whose card is [{BASE_CARD}]({BASE_CARD})",
        "Licence: other llama3.1 https://example.com/licence",
        "tokensieve generate sparse",
        "Nothing is recorded here.",
        "Not measured:",
        "- Cannot open it: SGLang: the top-k kernel needs index_topk 2048 (here 24)",
    ):
        assert words in shown, words
    assert (tmp_path / "sparse" / BASE_CARD).read_text() == BASE


def test_what_only_the_source_knows_is_handed_on(base: Path, tmp_path: Path) -> None:
    tokensieve.save(tokensieve.sparsify(tokensieve.load(base), 24, 4, 16), tmp_path / "a")
    tokensieve.save(tokensieve.load(tmp_path / "a"), tmp_path / "b")
    assert front(tmp_path / "b") == front(tmp_path / "a")
    assert (tmp_path / "b" / BASE_CARD).read_text() == BASE
    tokensieve.load(tmp_path / "a").save_pretrained(tmp_path / "c")
    assert front(tmp_path / "c") == front(tmp_path / "a")


def test_a_card_that_is_there_stays(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tokensieve")
    model = tokensieve.load(base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / CARD).write_text("mine")
    tokensieve.save(model, tmp_path / "mine")
    tokensieve.save(model, base)
    assert text(tmp_path / "mine") == "mine" and text(base) == BASE
    assert caplog.text.count("README.md stays as it is; remove it to get a new card") == 2


def test_another_models_card_and_tokenizer_are_replaced(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("its own")
    model, out = tokensieve.load(base), tmp_path / "out"
    tokensieve.save(ours(config("v3", vocab_size=90)), out)
    for name in ("tokenizer.json", "notes.txt", CARD, BASE_CARD):
        (out / name).write_text("of the other")
    tokensieve.save(model, out)
    assert (out / "tokenizer.json").read_text() == "its own" and "of the other" not in text(out)
    assert (out / BASE_CARD).read_text() == BASE
    assert (out / "notes.txt").read_text() == "of the other"
    (out / "tokenizer.json").write_text("edited")
    tokensieve.save(tokensieve.sparsify(model, 24, 4, 16), out)  # the same model: what is there stays
    assert (out / "tokenizer.json").read_text() == "edited"


@pytest.mark.parametrize(
    ("files", "stated"),
    [
        ({"LICENSE": "x"}, "other see-license-file LICENSE"),
        ({}, "not stated: see the base"),
        ({CARD: "---\nlicense: mit\n---\n"}, "mit"),
        ({CARD: "no front matter"}, "not stated: see the base"),
        ({CARD: "---\nlicense: [\n---\n"}, "not stated: see the base"),
    ],
)
def test_the_licence(files: dict[str, str], stated: str, tmp_path: Path) -> None:
    tokensieve.save(ours(config("v3")), tmp_path / "local")
    (tmp_path / "local" / CARD).unlink()
    for name, content in files.items():
        (tmp_path / "local" / name).write_text(content)
    tokensieve.save(tokensieve.load(tmp_path / "local"), tmp_path / "out")
    assert f"- Licence: {stated}\n" in text(tmp_path / "out")
    assert "- Base: local" in text(tmp_path / "out") and "base_model" not in front(tmp_path / "out")
    assert str(tmp_path) not in text(tmp_path / "out")  # no paths of this machine


def test_a_model_without_a_source(tmp_path: Path) -> None:
    tokensieve.save(ours(config("v32", q_lora_rank=None)), tmp_path / "m")
    assert "- Base: not recorded" in text(tmp_path / "m") and "- Licence: not stated\n" in text(tmp_path / "m")
    assert front(tmp_path / "m")["library_name"] == "tokensieve" and "- Cannot open it: " in text(tmp_path / "m")


def test_training_is_recorded_with_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    home, run = commands.make_home(tmp_path), commands.runner(capsys)
    for stage, start in (("warmup", home / "sparse"), ("adapt", home / "warm" / "step-000003")):
        out = home / {"warmup": "warm"}.get(stage, stage)
        assert run(*commands.tiny(home, stage, out, "--model", start)).status == 0
    last = home / "adapt" / "step-000003"
    known = front(last)["tokensieve"]
    assert known["base"] == "dense"
    entry = {"steps": 3, "tokens": 3 * 2 * 64, "data": ["text"]}
    assert known["training"] == [{"stage": "warmup", **entry}, {"stage": "adapt", **entry}]
    shown = text(last)
    assert "- Training, `adapt`: 3 steps, 384 tokens of `text`" in shown and "choose at random" not in shown
    figures = json.loads((home / "adapt" / "metrics.json").read_text())
    assert f"| kl.last | {figures['kl']['last']:.4g} |" in shown and "| stage | adapt |" in shown
    assert front(home / "adapt" / "step-000002")["tokensieve"]["training"][-1]["steps"] == 2
    tokensieve.save(tokensieve.load(last), tmp_path / "released")
    assert front(tmp_path / "released") == front(last) and "| stage | adapt |" in text(tmp_path / "released")
    more = run(*commands.tiny(home, "adapt", home / "adapt", "--model", home / "warm" / "step-000003", "--resume"))
    assert more.status == 0 and front(last)["tokensieve"]["training"] == known["training"]


@pytest.mark.parametrize(
    "setting", [None, LoraConfig(rank=4), LoraConfig(rank=4, merge=False)], ids=["whole", "lora", "not merged"]
)
def test_a_model_trained_in_python_states_its_training(setting: LoraConfig | None, tmp_path: Path) -> None:
    """Saved from memory after both stages, as from the folder of the command."""
    here = training.workplace(tmp_path)
    model = tokensieve.load(here.root / "sparse")
    for stage, lora in (("warmup", None), ("adapt", setting)):
        train.run(here.run(stage, stage, lora=lora), model, progress=False, rehearse=False)
    tokensieve.save(model, tmp_path / "released")
    entry = {"steps": 4, "tokens": 4 * 4 * 48, "data": ["text"]}
    trained = {"base": "sparse", "training": [{"stage": "warmup", **entry}, {"stage": "adapt", **entry}]}
    assert front(tmp_path / "released")["tokensieve"] == trained
    if setting is not None:
        last = here.root / "runs" / "adapt" / ("merged" if setting.merge else "step-000004")
        assert front(last)["tokensieve"] == trained and ("This folder holds an adapter" in text(last)) != setting.merge


def test_pretraining_that_goes_on_has_a_base(tmp_path: Path) -> None:
    here = training.workplace(tmp_path)
    settings = here.run("pretrain", "more", model=str(here.root / "dense"), shape={"max_position_embeddings": 512})
    tokensieve.save(train.run(settings, progress=False, rehearse=False), tmp_path / "released")
    known = front(tmp_path / "released")["tokensieve"]
    assert known["base"] == "dense" and [entry["stage"] for entry in known["training"]] == ["pretrain"]


def test_a_model_pretrained_in_python_has_no_base(tmp_path: Path) -> None:
    """Nor has its sparse model, whose indexers alone are saved: the run's checkpoint is none."""
    here = training.workplace(tmp_path)
    dense = train.run(here.run("pretrain", "new"), progress=False, rehearse=False)
    tokensieve.save(dense, tmp_path / "base")
    sparse = tokensieve.sparsify(dense, 16, 4, 16)
    train.run(here.run("warmup", "warm"), sparse, progress=False, rehearse=False)
    save_indexers(sparse, tmp_path / "indexers", "../base")
    for name, stages in (("base", ["pretrain"]), ("indexers", ["pretrain", "warmup"])):
        known = front(tmp_path / name)["tokensieve"]
        assert known["base"] is None and [entry["stage"] for entry in known["training"]] == stages
        assert "- Base: none: trained from nothing\n" in text(tmp_path / name)


def test_a_pretrained_model_has_no_base(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    home = commands.make_home(tmp_path)
    assert commands.runner(capsys)(*commands.tiny(home, "pretrain", home / "new")).status == 0
    assert "- Base: none: trained from nothing\n" in text(home / "new" / "step-000003")
    assert not (home / "new" / "step-000003" / BASE_CARD).exists()


def test_replacing_is_asked_for(base: Path) -> None:
    write_card(base, None, replace=True)
    assert "not recorded" in text(base)
