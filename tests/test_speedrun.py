"""The whole road from random weights on a tiny shape: what it leaves, and that stopping it anywhere changes nothing."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tokensieve
from tests.support import commands, models
from tokensieve import evals, speedrun, train
from tokensieve.config import SpeedrunConfig, TrainConfig, UserError, load_config
from tokensieve.train import loop

CONTEXT = 1500
SHAPE = models.SHAPE | {
    "vocab_size": commands.VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": commands.POSITIONS,
}
TRAINED = ("pretrain", "warmup", "adapt")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in another number of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with text and a tokenizer."""
    return commands.make_home(tmp_path_factory.mktemp("speedrun"))


def settings(home: Path) -> tuple[str, ...]:
    """The bundled config, made tiny."""
    changed = {"top_k": 24, "index_heads": 4, "index_dim": 16, "pretrain.data.tokenizer": str(home / "dense")}
    changed |= {f"pretrain.shape.{name}": value for name, value in SHAPE.items()}
    changed |= {"pretrain.shape.rope_parameters.factor": 1.0, "pretrain.compile": False, "pretrain.log_every": 1}
    for part in TRAINED:
        changed |= {f"{part}.track": [], f"{part}.workers": 0, f"{part}.data.cache": str(home / "cache")}
        changed |= {f"{part}.data.held_out_share": 0.4, f"{part}.device": "cpu"}
    given = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    for part in TRAINED:
        given += [f"{part}.phases=[{{ steps = 3, context = 96, sequences = 2 }}]"]
        given += [f'{part}.data.sources=[{{ source = "{home / "text"}" }}]']
    given += [f"evaluate.base.{key}={value}" for key, value in {"contexts": [CONTEXT], "needles": [16]}.items()]
    few = {"prompts_per_decile": 1, "long": 1000, "short": 200, "sequences": 1, "completions": 1, "answers": 1}
    given += [f"evaluate.base.{key}={value}" for key, value in (few | {"new_tokens": 8}).items()]
    given += [f"evaluate.sparse.contexts=[{CONTEXT}]", "evaluate.sparse.texts=1", "evaluate.sparse.needle_contexts=1"]
    return tuple(given)


@pytest.fixture(scope="module")
def config(home) -> SpeedrunConfig:
    return load_config(SpeedrunConfig, "speedrun", settings(home))


@pytest.fixture(scope="module")
def whole(config, home) -> Path:
    """A run that nothing disturbed."""
    torch.set_num_threads(1)
    speedrun.run(replace(config, out=str(home / "whole")), console=Console(quiet=True))
    return home / "whole"


def figures_of(out: Path) -> dict:
    """What does not depend on a clock."""
    figures = json.loads((out / "metrics.json").read_text())
    return {name: value for name, value in figures.items() if name not in ("seconds", "run")}


def weights_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.glob("*/*.safetensors")}


def test_what_it_leaves(whole: Path) -> None:
    ids = torch.arange(20, 120)[None]
    base, sparse, adapted = (tokensieve.load(whole / name) for name in ("base", "sparse", "adapted"))
    assert not base.is_sparse and sparse.is_sparse and adapted.is_sparse and sparse.top_k == adapted.top_k == 24
    stored = load_file(whole / "base" / "model.safetensors")
    kept = {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16}
    assert kept and all(name.endswith("e_score_correction_bias") for name in kept)
    assert {p.name for p in (whole / "sparse").glob("*.safetensors")} == {"indexer.safetensors"}
    with torch.no_grad(), tokensieve.selecting(sparse, "dense"):  # the trunk is the base's own
        assert torch.equal(sparse(ids).logits, base(ids).logits)
    assert not torch.equal(adapted.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert all(len(tokensieve.load_tokenizer(whole / name)) for name in speedrun.MADE.values())

    figures = json.loads((whole / "metrics.json").read_text())
    assert set(figures) == {*speedrun.PARTS, "settings", "seconds", "run"}
    assert set(figures["seconds"]) == set(speedrun.PARTS) and min(figures["seconds"].values()) > 0
    assert figures["pretrain"]["bytes"] == (whole / "base" / "model.safetensors").stat().st_size
    assert all(figures[part]["steps"] == 3 for part in TRAINED) and set(figures["adapt"]) >= {"lm", "kl"}
    judged = figures["evaluate"]
    assert judged["base"]["needles"][0]["context"] == CONTEXT and judged["base"]["criteria"]
    for name in ("sparse", "adapted"):
        assert set(judged[name]) == {str(CONTEXT)}
        assert set(judged[name][str(CONTEXT)]) >= {"dense", "sparse", "window", "oracle", "recall"}
        assert "selections" not in judged[name][str(CONTEXT)]  # for arms that were asked for
    first, second = (judged[name][str(CONTEXT)] for name in ("sparse", "adapted"))
    assert first["dense"] == second["dense"] and first["sparse"] != second["sparse"]


def test_the_indexers_learn_on_the_rounded_trunk(whole: Path) -> None:
    trained = load_file(whole / "warmup" / "step-000003" / "model.safetensors")
    for name, tensor in load_file(whole / "base" / "model.safetensors").items():
        assert torch.equal(trained[name], tensor.float()), name


def test_stopped_and_continued(home: Path, whole: Path, capsys, monkeypatch) -> None:
    """In the middle of the warm-up, between its end and its export, and in the evaluation; then to the end."""
    run, out = commands.runner(capsys), home / "stopped"
    command = ("speedrun", "--out", out, *(word for s in settings(home) for word in ("--set", s)))
    monkeypatch.setenv("COLUMNS", "300")
    row, seconds = loop.Tracker.row, [0.0]

    def spent() -> float:
        seconds.append(sum(json.loads((out / "metrics.json").read_text())["seconds"].values()))
        return seconds[-1] - seconds[-2]

    def interrupt(tracker, step, figures):
        row(tracker, step, figures)
        if tracker.run.name == "warmup":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Tracker, "row", interrupt)
        ended = run(*command)
    assert ended.status == 130 and spent() > 0, ended
    assert "saved" in ended.err.splitlines()[-1] and "warmup/step-000001 after step 1 of 3" in ended.err
    assert set(figures_of(out)) == {"pretrain", "settings"}

    commands.refusal(run)(("holds a run already (up to pretrain)", "--resume"), *command)

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(speedrun, "save_indexers", kill)
        patch.setitem(speedrun.TRAIN, "pretrain", kill)  # what is done is not done again
        with pytest.raises(Killed):
            run(*command, "--resume")
    assert not (out / "sparse").exists() and spent() > 0

    ended = run(*command, "--resume", "--until", "adapt")
    assert ended.status == 0 and "--resume does the rest" in ended.out and not (out / "evaluate").exists()
    assert spent() > 0

    judge = evals.judge_sparse

    def stop_at_the_second(model, *arguments, **more):
        if model.folder.name == "adapted":
            assert figures_of(out)["evaluate"]["sparse"]  # a kill would not lose it
            raise KeyboardInterrupt
        return judge(model, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(evals, "judge_sparse", stop_at_the_second)
        ended = run(*command, "--resume")
    assert ended.status == 130 and "continue with --resume" in ended.err.splitlines()[-1]
    assert set(figures_of(out)["evaluate"]) == {"base", "sparse", "adapted"} and spent() > 0

    def only_the_second(model, *arguments, **more):
        assert model.folder.name == "adapted"
        return judge(model, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(evals, "acceptance", kill)
        patch.setattr(evals, "judge_sparse", only_the_second)
        ended = run(*command, "--resume")
    assert ended.status == 0 and f"tokensieve eval {out}/adapted" in ended.out, ended
    assert spent() > 0 and ended.out.count("oracle") == 2  # what was measured before is shown too
    assert figures_of(out) == figures_of(whole)
    assert weights_of(out) == weights_of(whole)
    assert [r["loss"] for r in train.history(out / "warmup")] == [r["loss"] for r in train.history(whole / "warmup")]


@pytest.mark.slow
def test_other_settings_are_refused_or_measured_anew(config, whole: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = commands.listing(out)
    same, quiet = replace(config, out=str(out)), Console(quiet=True)
    other = replace(same, warmup=replace(same.warmup, optimizer=replace(same.warmup.optimizer, lr=1e-4)))
    left = "from warmup on; .* remove warmup, sparse, adapt, adapted to"
    for changed in (other, replace(same, top_k=32)):
        with pytest.raises(UserError, match=left):
            speedrun.run(changed, resume=True, console=quiet)
    with pytest.raises(UserError, match="from pretrain on"):
        speedrun.run(replace(same, pretrain=replace(same.pretrain, seed=1)), resume=True, console=quiet)
    assert commands.listing(out) == before

    sizes = replace(same.evaluate, sparse=replace(same.evaluate.sparse, texts=2))
    moved = replace(same.warmup, workers=1, save_every=7)  # what may change
    found = speedrun.run(replace(same, evaluate=sizes, warmup=moved), resume=True, console=quiet)
    then = figures_of(whole)
    assert found["evaluate"]["sparse"] != then["evaluate"]["sparse"] and found["warmup"] == then["warmup"]

    for name in ("warmup", "sparse", "adapt", "adapted"):
        shutil.rmtree(out / name)
    monkeypatch.delitem(speedrun.TRAIN, "pretrain")  # it is not done again
    found = speedrun.run(replace(other, evaluate=sizes), resume=True, until="warmup", console=quiet)
    assert found["pretrain"] == then["pretrain"] and found["warmup"]["kl"] != then["warmup"]["kl"]
    assert "adapt" not in found and "evaluate" not in found and set(found["seconds"]) == {"pretrain", "warmup"}


def test_its_pretraining_is_the_base_config() -> None:
    pretrain = load_config(SpeedrunConfig, "speedrun").pretrain
    assert replace(pretrain, out="runs/base") == load_config(TrainConfig, "base")


BAD = [
    ("top_k=0", "top_k is 0"),
    ("pretrain.stage=adapt", "config pretrain: its stage is adapt"),
    ("warmup.phases.0.micro_batch=3", "do not divide"),
    ("adapt.phases.0.context=2048", "2048 tokens is past the model's 1600 positions; .* pretrain.shape"),
    ("evaluate.sparse.contexts=[24]", "24 tokens are not longer than top_k 24"),
    ("evaluate.sparse.texts=100000", "the held-out documents hold [0-9]+ stretches of 1500 tokens, not 100000"),
    ("evaluate.sparse.textts=1", "unknown key textts"),
]


@pytest.mark.parametrize(("setting", "message"), BAD, ids=[setting for setting, _ in BAD])
def test_bad_settings_are_refused_before_anything_is_done(home: Path, tmp_path: Path, setting, message) -> None:
    with pytest.raises(UserError, match=message):
        speedrun.run(load_config(SpeedrunConfig, "speedrun", (*settings(home), f'out="{tmp_path / "o"}"', setting)))
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else_is_left_alone(config, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "models"
    shutil.copytree(home / "dense", other / "base")
    (tmp_path / "file").write_text("mine")
    before = commands.listing(tmp_path)
    for out in (other, other / "base", tmp_path / "file"):
        for resume in (False, True):
            with pytest.raises(UserError, match="no folder of a speedrun"):
                speedrun.run(replace(config, out=str(out)), resume=resume, console=Console(quiet=True))
    assert commands.listing(tmp_path) == before
