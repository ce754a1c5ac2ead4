"""Bad input and broken runs: one line that names the thing and the remedy, status 2, and nothing that existed is
damaged.
"""

import errno
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tokensieve
from tests.support import commands
from tests.support.commands import VOCABULARY, listing, tiny
from tokensieve import checkpoint, cli
from tokensieve.checkpoint import writing
from tokensieve.data import train_tokenizer
from tokensieve.train import loop


@pytest.fixture
def refused(run):
    return commands.refusal(run)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("cli"))


# bad input


def _edit(name: str, change):
    def damage(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(raw)))

    return damage


def _bytes(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def _without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _other_tokenizer(folder: Path) -> None:
    train_tokenizer([Path(cli.training.__file__).read_text() * 8], folder, VOCABULARY + 64)


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


DAMAGES = {
    "truncated": (_bytes(lambda b: b[:-100]), ("model.safetensors", "truncated", "again")),
    "empty file": (_bytes(lambda b: b""), ("model.safetensors", "truncated")),
    "corrupt header": (_bytes(lambda b: b[:8] + b"\xff" * 40 + b[48:]), ("model.safetensors", "corrupt")),
    "another architecture": (_edit("config.json", lambda c: c | {"model_type": "gpt2"}), ("'gpt2'", "not supported")),
    "no positive k": (_edit("config.json", lambda c: c | {"index_topk": 0}), ("index_topk is 0", "at least 1")),
    "another shape": (_edit("config.json", lambda c: c | {"hidden_size": 64}), ("config.json",)),
    "one layer too few": (_edit("config.json", lambda c: c | {"num_hidden_layers": 1}), ("unknown", "layer")),
    "a missing tensor": (_without_a_tensor, ("model.norm.weight",)),
    "a pickle": (_without_weights, ("pickle", "never loaded")),
    "a tokenizer of another vocabulary": (_other_tokenizer, (f"vocabulary is {VOCABULARY}", "own tokenizer")),
    "no tokenizer": (_no_tokenizer, ("tokenizer.json", "copy")),
    "a corrupt tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ("tokenizer", "copy it again")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoints(refused, home: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(home / "sparse", folder)
    hurt, words = DAMAGES[damage]
    hurt(folder)
    before = listing(folder)
    refused(words, "generate", folder, "--prompt", "x")
    assert listing(folder) == before


def test_bad_arguments(refused, home: Path, tmp_path: Path) -> None:
    refused(("'nowhere'", "no such folder", "base"), "generate", "nowhere", "--prompt", "x")
    refused(("--prompt", "--chat"), "generate", home / "dense")
    refused(("--selection window", "dense"), "generate", home / "dense", "--prompt", "x", "--selection", "window")
    refused(("1600 positions", "shorten"), "generate", home / "dense", "--prompt", "x " * 2000)
    refused(("no file",), "generate", home / "dense", "--input-file", home / "nothing.txt")
    (home / "latin.txt").write_bytes("Größe".encode("latin-1"))
    refused(("latin.txt", "not UTF-8"), "generate", home / "dense", "--input-file", home / "latin.txt")
    refused(("device tpu",), "generate", home / "dense", "--prompt", "x", "--device", "tpu")
    refused(("1600 positions", "--context"), "eval", home / "dense", "--data", home / "text")
    refused(("--arm", "dense"), "eval", home / "dense", "--arm", "a=window")
    for arm, word in (("a", "NAME=SELECTION"), ("=window", "NAME=SELECTION"), ("dense=window", "called dense")):
        refused((word,), "eval", home / "sparse", "--data", home / "text" / "*.py", "--context", "500", "--arm", arm)
    refused(("already",), "eval", home / "sparse", "--arm", "a=window", "--arm", "a=oracle")
    refused(("--quick",), "eval", home / "dense", "--quick", "--config", "evaluate-quick")
    several = ("--set", "sparse.contexts=[64, 96]", "--set", "sparse.times_k=0")
    refused(("one context",), "eval", home / "sparse", "--data", home / "text" / "*.py", *several)
    refused(("not longer than k",), "eval", home / "sparse", "--data", home / "text" / "*.py", "--context", "20")
    for bad in (("--top-k", "0"), ("--index-heads", "0"), ("--index-dim", "4")):
        refused((), "sparsify", home / "dense", tmp_path / "new", *bad)
        assert not (tmp_path / "new").exists()
    (short := tmp_path / "short.txt").write_text("one line of text\n")
    for words, *bad in (
        (("--init-data", "--init attention"), "--init-data", "python"),
        (("'nowhere'", "does not exist"), "--init", "attention", "--init-data", "nowhere"),
        (("at least 512",), "--init", "attention", "--init-data", short),
    ):
        refused(words, "sparsify", home / "dense", tmp_path / "new", *commands.SMALL, *bad)
        assert not (tmp_path / "new").exists()
    refused(("already has indexers",), "sparsify", home / "sparse", tmp_path / "new")
    before = listing(home / "dense")
    refused(("exists already",), "sparsify", home / "dense", home / "dense", *commands.SMALL)
    assert listing(home / "dense") == before


SETTINGS = [
    (("unknown key", "stepps"), "stepps=3"),
    (("unknown key", "nope"), "optimizer.nope=3"),
    (("key=value",), "seed"),
    (("seed",), "seed=high"),
    (("past the model's 1600 positions",), "phases.0.context=2048"),
    (("steps is 0",), "phases.0.steps=0"),
    (("do not divide",), "phases.0.micro_batch=3"),
    (("'no-such-folder'", "does not exist"), "data.sources.0.source=no-such-folder"),
    (("no readable text",), "data.held_out_share=1.0"),
    (("unknown", "tensorboard"), "track=['x']"),
]


@pytest.mark.parametrize(("words", "setting"), SETTINGS, ids=[s for _, s in SETTINGS])
def test_bad_settings(refused, home: Path, tmp_path: Path, words: tuple[str, ...], setting: str) -> None:
    refused(words, *tiny(home, "warmup", tmp_path / "w", "--set", setting))
    assert not list(tmp_path.glob("w/step-*"))


def test_bad_configs(refused, home: Path, tmp_path: Path) -> None:
    refused(("'nowhere'", "warmup"), "warmup", "--config", "nowhere")
    (tmp_path / "bad.toml").write_text("stage = ")
    refused(("bad.toml", "TOML"), "warmup", "--config", tmp_path / "bad.toml")
    refused(("stage adapt", "tokensieve adapt"), "warmup", "--config", home / "adapt.toml")
    refused(("--model",), "warmup", "--out", tmp_path / "w")
    refused(("sparsify",), *tiny(home, "warmup", tmp_path / "w", "--model", home / "dense"))


def test_bad_data(refused, home: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    binary = tmp_path / "binary"
    binary.mkdir()
    (binary / "x.dat").write_bytes(b"\0\1" * 500)
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "good"}\n{"text": \n')
    for source, words in ((empty, ("no files",)), (binary, ("no readable text",)), (lines, ("line 2", "not JSON"))):
        refused(words, *tiny(home, "warmup", tmp_path / "w", "--set", f'data.sources.0.source="{source}"'))
    locked = tmp_path / "w2"
    locked.write_text("a file where the run folder should be")
    refused(("w2",), *tiny(home, "warmup", locked))
    assert locked.read_text().startswith("a file")


# runs that stop


def test_a_run_is_not_overwritten_but_resumed(run, refused, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "w"
    assert run(*tiny(home, "warmup", out)).status == 0
    before = listing(out)
    refused(("holds a run already", "--resume"), *tiny(home, "warmup", out))
    refused(("seed is 1", "there 0", "resume"), *tiny(home, "warmup", out, "--resume", "--set", "seed=1"))
    assert listing(out) == before


def test_interrupted_then_resumed(run, home: Path, tmp_path: Path, monkeypatch) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*tiny(home, "adapt", whole)).status == 0
    row = loop.Tracker.row

    def interrupted(tracker, step, figures):
        row(tracker, step, figures)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Tracker, "row", interrupted)
        ended = run(*tiny(home, "adapt", cut))
    assert ended.status == 130
    assert ended.err.splitlines()[-1].startswith("tokensieve: interrupted: saved") and "--resume" in ended.err
    assert run(*tiny(home, "adapt", cut, "--resume")).status == 0
    losses = [
        [r["loss"] for r in map(json.loads, (f / "metrics.jsonl").read_text().splitlines())] for f in (whole, cut)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    weights = [(f / "step-000003" / "model.safetensors").read_bytes() for f in (whole, cut)]
    assert weights[0] == weights[1]


def test_ctrl_c_outside_training(run, home: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokensieve.engine.tensor_parallel.load_rank", interrupted)
    ended = run("generate", home / "dense", "--prompt", "x")
    assert ended.status == 130 and "Traceback" not in ended.err


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_a_loss_that_is_not_finite(refused, home: Path, tmp_path: Path, monkeypatch, stage: str) -> None:
    own = loop.STAGES[stage]

    def losses(*arguments):
        found = own.losses(*arguments)
        return found._replace(total=found.total * (torch.nan if (tmp_path / "t" / "step-000001").exists() else 1.0))

    monkeypatch.setitem(loop.STAGES, stage, replace(own, losses=losses))
    refused(("step 2", "not finite", "learning rate"), *tiny(home, stage, tmp_path / "t"))
    assert checkpoint.read_config(tmp_path / "t" / "step-000001")  # the last good one stays


@pytest.mark.parametrize("stage", ["warmup", "adapt"])
def test_weights_that_are_not_numbers(refused, home: Path, tmp_path: Path, stage: str) -> None:
    model = tokensieve.load(home / "sparse")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    tokensieve.save(model, tmp_path / "nan")
    refused((), *tiny(home, stage, tmp_path / "t", "--model", tmp_path / "nan"))


def test_logits_that_are_not_numbers(refused, home: Path, tmp_path: Path) -> None:
    model = tokensieve.load(home / "sparse")
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.folder = home / "sparse"
    tokensieve.save(model, tmp_path / "broken")
    (tmp_path / "prompts.txt").write_text("Who are you?")
    for how in (("--prompt", "x"), ("--chat", "x", "--temperature", "1"), ("--input-file", tmp_path / "prompts.txt")):
        refused(("logits are not finite",), "generate", tmp_path / "broken", *how)


def test_a_full_disk(refused, home: Path, tmp_path: Path, monkeypatch) -> None:
    usage = writing.shutil.disk_usage

    def full_after_the_first(path):
        return type("Usage", (), {"free": 1000}) if (tmp_path / "t" / "step-000001").exists() else usage(path)

    monkeypatch.setattr(writing.shutil, "disk_usage", full_after_the_first)
    refused(("step-000002", "disk is full", "free space"), *tiny(home, "warmup", tmp_path / "t"))
    assert [p.name for p in sorted((tmp_path / "t").glob("*step*"))] == ["step-000001"]
    assert tokensieve.load(tmp_path / "t" / "step-000001").is_sparse


def test_a_disk_that_fills_while_figures_are_written(refused, home: Path, tmp_path: Path, monkeypatch) -> None:
    def full(self, step, figures):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    monkeypatch.setattr(loop.Tracker, "row", full)
    refused(("metrics.jsonl", "No space left", "free"), *tiny(home, "warmup", tmp_path / "t"))


def test_a_defect_is_not_hidden(home: Path, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("tokensieve.engine.tensor_parallel.load_rank", broken)
    with pytest.raises(OSError):
        cli.main(["generate", str(home / "dense"), "--prompt", "x"])
