"""The whole of post-training on a tiny model: what it leaves, and that stopping it anywhere changes nothing."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tokensieve
from tests.support import commands, models
from tokensieve import pipeline
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import distillation, stages
from tokensieve.posttrain.parts import BASE, DISTILLED, FINAL, ON_POLICY, Parts
from tokensieve.posttrain.rollouts import Rollouts
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.run_record import RunRecord
from tokensieve.sandbox import program

K = 16
QUIET = Console(quiet=True)
SMALL = {
    "tokens": 64, "new_tokens": 6, "modes": ["direct"], "domains": ["logic", "writing"], "save_every": 1,
    "evaluation": 2, "difficulty.samples": 2, "difficulty.tries": 1, "cold.steps": 2, "cold.rows": 2, "cold.lr": 1e-3,
    "specialist.steps": 2, "specialist.prompts": 1, "specialist.lr": 1e-3, "distill.prompts": 2, "distill.samples": 2,
    "distill.train.steps": 1, "distill.train.rows": 2, "distill.on_policy.steps": 2, "distill.on_policy.prompts": 2,
    "distill.on_policy.lr": 1e-3, "cold_steps": {}, "evaluations": {}, "evaluations.writing": 3,
    "rl.train.prompts": 1, "rl.train.lr": 1e-3, "reward.language": 0, "difficulty.fixed": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in another number of threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random sparse model with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    yarn = {"rope_parameters": models.YARN, "max_position_embeddings": 1024}  # as the bundled model has it
    made = models.ours(models.config("v32", index_topk=K, vocab_size=4096, num_hidden_layers=2, **yarn))
    tokensieve.save(made, folder)
    tokensieve.load_tokenizer("base").save_pretrained(folder)
    return folder


def settings(start: Path, out: Path, **changes: Any) -> PosttrainConfig:
    given = SMALL | {"model": str(start), "out": str(out)} | changes
    return load_config(PosttrainConfig, "posttrain-tiny", tuple(f"{k}={json.dumps(v)}" for k, v in given.items()))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "whole"
    pipeline.run(settings(model, out), console=QUIET)
    return out


def figures_of(out: Path) -> dict[str, Any]:
    """What does not depend on a clock."""
    figures = json.loads((out / "metrics.json").read_text())
    return {name: value for name, value in figures.items() if name not in ("seconds", "run")}


def weights_of(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}


def test_what_it_leaves(whole: Path, model: Path) -> None:
    made = {"specialists/logic/rl", "specialists/writing/rl", "distilled/train", "on-policy", "final"}
    assert set(weights_of(whole)) == {f"{folder}/model/model.safetensors" for folder in made}  # and no checkpoints
    base = load_file(model / "model.safetensors")
    for folder in made:
        trained = tokensieve.load(whole / folder / "model")
        assert trained.is_sparse and trained.top_k == K and len(tokensieve.load_tokenizer(whole / folder / "model"))
        after = load_file(whole / folder / "model" / "model.safetensors")
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, base[name])}
        assert any(".indexer." in name for name in moved) and any("o_proj" in name for name in moved), folder
    taught = stages.history(whole / "on-policy")
    for folder, steps in (
        ("specialists/logic/cold", 2), ("specialists/logic/rl", 2), ("on-policy", 2), ("final", 2)
    ):  # fmt: skip
        rows = stages.history(whole / folder)
        assert rows is not None and len(rows) == steps and all("kl" in row for row in rows)
    assert taught is not None and max(row["rollout/logp_difference"] for row in taught) < 1e-6
    assert max(row["rollout/logp_difference"] for row in rows) < 1e-6 and rows[0]["rollout/queries_past_k"] > 0.5
    assert all(0 <= row["outcome/logic-direct"] <= 1 for row in stages.history(whole / "specialists/logic/rl") or [{}])
    answers = distillation.read_lines(whole / "distilled/samples/logic.jsonl")
    assert len(answers) == 4 and {line["specialist"] for line in answers} == {"specialist-logic"}
    page = (whole / "posttrain.html").read_text()
    assert page.count("<svg") == 6 and ">final<" in page and ">dense<" not in page and "</html>" in page
    for name in ("reward", "output-tokens"):
        assert "<svg" in (whole / f"{name}.svg").read_text()

    figures = json.loads((whole / "metrics.json").read_text())
    parts = ["specialist-logic", "specialist-writing", DISTILLED, ON_POLICY, FINAL]
    assert set(figures["seconds"]) == set(figures["settings"]) == {*parts, "evaluation"}
    assert figures["selection"] == "indexer" and figures["judge"] == "scripted" and figures["run"]["machine"]
    assert figures["specialist-logic"]["difficulty"]["logic-direct"]["rates"].keys() == {"4"}
    assert figures[DISTILLED]["data"]["logic-direct"]["sampled"] == 4
    assert sum(figures[FINAL]["prompts"].values()) == 2
    assert figures[ON_POLICY]["prompts"] == {"logic-direct": 2, "writing-direct": 2}
    assert set(figures["evaluation"]) == {BASE, *parts}
    assert set(figures["evaluation"][FINAL]) == {"logic-direct", "writing-direct"}
    assert set(figures["evaluation"]["specialist-logic"]) == {"logic-direct"}
    found = figures["evaluation"][BASE]["logic-direct"]
    assert figures["evaluation"][ON_POLICY]["writing-direct"]["gain"]["n"] == 3 and "gain" not in found
    assert found["accuracy"]["n"] == 2 and found["accuracy"]["high"] > 0 and 0 < found["tokens"] <= 6
    assert 0.5 < found["past_k"] < 1


def test_stopped_and_continued(whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every kind of part, between two checkpoints and before the first; then to the end."""

    class Killed(BaseException):
        pass

    wait = [("logic, cold start", 1), ("logic, cold start", 2), ("logic-direct, pass rate at difficulty 4", 1)]
    wait += [("logic, GRPO", 2), ("before", "rl"), ("answers of specialist-writing", 2)]
    wait += [("on-policy distillation", 1), ("all domains, GRPO", 2)]
    wait += [("final on held-out problems", 1)]
    note, write = pipeline._Watched.on_progress, stages.write_json

    def kill(watch: Any, what: str, done: int, total: int) -> None:
        note(watch, what, done, total)
        if wait and (what, done) == wait[0]:
            del wait[0]
            raise Killed

    def kill_at_the_end(path: Path, rows: Any) -> None:
        """Behind the last checkpoint and the model, before anything says that the stage is done."""
        if wait and wait[0] == ("before", path.parent.name):
            del wait[0]
            raise Killed
        write(path, rows)

    monkeypatch.setattr(pipeline._Watched, "on_progress", kill)
    monkeypatch.setattr(stages, "write_json", kill_at_the_end)
    out, config = tmp_path / "run", settings(model, tmp_path / "run")
    for left in range(len(wait), 0, -1):
        with pytest.raises(Killed):
            pipeline.run(config, resume=left < 9, console=QUIET)
        assert len(wait) == left - 1
        if left == 7:  # a checkpoint that a kill cut off
            (out / "specialists/logic/rl/checkpoint-9").mkdir(parents=True)
    pipeline.run(config, resume=True, console=QUIET)
    assert weights_of(out) == weights_of(whole) and figures_of(out) == figures_of(whole)


def test_a_measured_difficulty_outlives_a_kill_without_a_cold_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"Name stone {n}.", "rubric": ["The answer has at most 3 words."]} for n in range(12)]
    (tmp_path / "stones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(model, tmp_path / "run", tokens=17, domains=[str(tmp_path / "stones.jsonl")])
    reinforce, measured = Parts._reinforce, []
    monkeypatch.setattr(Parts, "_reinforce", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        pipeline.run(config, only=f"specialist-{config.domains[0]}", console=QUIET)
    before = json.loads((tmp_path / "run/metrics.json").read_text())
    monkeypatch.setattr(Parts, "_reinforce", reinforce)
    monkeypatch.setattr(Parts, "_difficulty", lambda *_: measured.append(_))
    after = pipeline.run(config, resume=True, only=f"specialist-{config.domains[0]}", console=QUIET)
    assert measured == [] and before["specialist-stones"].items() <= after["specialist-stones"].items()
    assert after["seconds"]["specialist-stones"] > before["seconds"]["specialist-stones"] > 0


def test_no_more_answers_are_sampled_together_than_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In GRPO too, whose steps have more: the engine's pages follow from it."""
    seen, make = set(), Rollouts.__init__

    def watched(self: Rollouts, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        seen.add((self.engine.config.running, kwargs["keep_selection"]))

    monkeypatch.setattr(Rollouts, "__init__", watched)
    more = {"specialist.samples": 4, "distill.on_policy.steps": 1, "distill.on_policy.prompts": 4}
    config = settings(model, tmp_path / "run", domains=["logic"], at_once=3, **more)
    pipeline.run(config, only="specialist-logic", console=QUIET)
    assert seen == {(3, False), (3, True)}
    seen.clear()
    pipeline.run(config, only=DISTILLED, console=QUIET)
    assert seen == {(3, False), (3, True)}, "the second is on-policy distillation's"
    seen.clear()
    config = settings(model, tmp_path / "other", domains=["logic"], at_once=32, **more)
    pipeline.run(config, only="specialist-logic", console=QUIET)
    assert (4, True) in seen, "a step's answers, where it has fewer"


def test_a_part_that_is_added_leaves_the_others_figures(model: Path, tmp_path: Path) -> None:
    config = settings(model, tmp_path / "run")
    alone = replace(config, distill=replace(config.distill, on_policy=None))
    without, added = (pipeline._settings(c, pipeline._plan(c, ("logic",), {"logic": None})) for c in (alone, config))
    assert {name for name in added if added[name] != without.get(name)} == {ON_POLICY}


def test_a_group_has_one_difficulty_in_the_table(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is measured before the specialist is there, whose difficulty is then another one."""
    config = settings(model, tmp_path / "run", domains=["logic"], **{"rl.model": str(model), "rl.train.steps": 1})
    before = pipeline.run(config, only=FINAL, console=QUIET)["evaluation"]
    monkeypatch.setattr(Parts, "_difficulty", lambda *_: {"difficulty": 3, "rates": {}, "within": True})
    pipeline.run(config, only="specialist-logic", console=QUIET)
    after = pipeline.run(config, resume=True, only=FINAL, console=QUIET)["evaluation"]
    levels = [{found["logic-direct"]["difficulty"] for found in figures.values()} for figures in (before, after)]
    assert levels == [{4}, {3}] and after.keys() == {BASE, "specialist-logic", FINAL}


def test_what_a_kill_left_of_a_done_part_is_removed(whole: Path, model: Path) -> None:
    weights = weights_of(whole)
    leaves = [
        "specialists/logic/cold/model",
        "specialists/logic/cold/checkpoint-2",
        "specialists/writing/rl/checkpoint-2",
    ]
    for folder in (*leaves, "distilled/train/checkpoint-1", "on-policy/checkpoint-1", "final/checkpoint-2"):
        (whole / folder).mkdir()
    pipeline.run(settings(model, whole), resume=True, console=QUIET)
    assert not [*whole.rglob("checkpoint-*"), *whole.rglob("cold/model")]
    assert weights_of(whole) == weights


def test_a_model_that_is_gone_leaves_no_figures_to_its_successor(tmp_path: Path) -> None:
    leaves = {"specialist-logic": ("specialists/logic",), "evaluation": ()}
    record = RunRecord.of(tmp_path / "run", leaves, False, "run")
    record.figures |= {"settings": dict.fromkeys(leaves, "x"), "specialist-logic": {"steps": 2}}
    record.figures["evaluation"] = {"specialist-logic": {"logic-direct": {}}, BASE: {"logic-direct": {}}}
    record.match(dict.fromkeys(leaves, "x"))
    assert "specialist-logic" not in record.figures and record.figures["evaluation"].keys() == {BASE}


def test_a_judge_may_move_and_be_asked_more_and_not_be_another(model: Path, tmp_path: Path) -> None:
    def decisive(**judge: Any) -> Any:
        changes = {f"judge.{name}": value for name, value in judge.items()}
        return pipeline._specialist(settings(model, tmp_path, **changes), "writing", "writing").trains_on

    assert decisive(url="http://a/v1", model="m") == decisive(url="http://b/v1", model="m", budget=9, timeout=1.0)
    assert decisive(url="http://a/v1", model="m") != decisive(url="http://a/v1", model="n") != decisive()
    assert decisive() == decisive(budget=9)


def test_single_commands_share_a_folder(whole: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    """`specialist` adds to what is there; `distill` and `rl` say what they lack, and a done part asks for --resume."""
    run, refused = commands.runner(capsys), commands.refusal(commands.runner(capsys))
    given = {**SMALL, "domains": ["logic"], "evaluation": 1}
    sets = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    common = ("--model", model, "--out", tmp_path / "run", *sets)
    first = "run first: tokensieve specialist --domain logic --out "
    same = "with the same --config, --model and --set"
    refused(("no specialist-logic model yet", first, f"{same}, or leave logic out of domains"), "distill", *common)
    assert not (tmp_path / "run").exists()
    ended = run("specialist", "--domain", "logic", *common)
    assert ended.status == 0 and "specialist-logic: about" in ended.out and "GiB" in ended.out, ended
    assert f"tokensieve distill --out {tmp_path / 'run'} {same}" in " ".join(ended.out.split())
    assert "logic, GRPO: step 2 of 2: loss" in ended.err
    assert weights_of(tmp_path / "run") == {
        name: raw for name, raw in weights_of(whole).items() if name.startswith("specialists/logic")
    }
    assert set(figures_of(tmp_path / "run")["evaluation"]) == {BASE, "specialist-logic"}
    refused(("holds specialist-logic already; add --resume",), "specialist", "--domain", "logic", *common)
    refused(("no distilled model yet", "run first: tokensieve distill"), "rl", *common)
    refused(("holds a run already", "--resume"), "posttrain", *common)
    changed = (*common, "--set", "cold.lr=1e-4", "--resume")
    refused(("config differs", "from specialist-logic on", "remove specialists/logic"), "posttrain", *changed)


def test_adapters_are_saved_and_merged(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every stage, also a stopped one: the rest of the trunk stays, and base and adapter make the model."""
    ranks = {f"{stage}.lora.rank": 2 for stage in ("cold", "specialist", "distill.train", "distill.on_policy")}
    targets = {key.replace("rank", "targets"): ["o_proj"] for key in ranks}
    given = {**ranks, **targets, "rl.train.lora.rank": 2, "domains": ["logic"], "evaluation": 1}
    pipeline.run(settings(model, tmp_path / "run", **given), console=QUIET)
    base, folders = load_file(model / "model.safetensors"), ["specialists/logic/rl", "distilled/train", "on-policy"]
    for folder in folders:
        after = load_file(tmp_path / "run" / folder / "model/model.safetensors")
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, base[name])}
        assert any(".indexer." in name for name in moved), folder
        assert {n for n in moved if ".indexer." not in n} == {n for n in base if ".o_proj." in n}, folder
        settings_of = json.loads((tmp_path / "run" / folder / "adapter/adapter_config.json").read_text())
        assert settings_of["r"] == 2 and settings_of["base_model_name_or_path"]
    start = tokensieve.load(model)
    tensors = load_file(tmp_path / "run/distilled/train/adapter/adapter_model.safetensors")
    a, b = (next(x for n, x in tensors.items() if "layers.0" in n and f"lora_{part}" in n) for part in "AB")
    merged = tokensieve.load(tmp_path / "run/distilled/train/model").model.layers[0].self_attn.o_proj.weight
    assert torch.allclose(merged, start.model.layers[0].self_attn.o_proj.weight + 2 * b @ a, atol=1e-6)

    class Killed(BaseException):
        pass

    note, waiting = pipeline._Watched.on_progress, ["logic, cold start", "logic, GRPO"]

    def kill(watch: Any, what: str, done: int, total: int) -> None:
        note(watch, what, done, total)
        if waiting and (what, done) == (waiting[0], 2):
            del waiting[0]
            raise Killed

    monkeypatch.setattr(pipeline._Watched, "on_progress", kill)
    again = settings(model, tmp_path / "again", **given)
    for resume in (False, True):
        with pytest.raises(Killed):
            pipeline.run(again, resume, only="specialist-logic", console=QUIET)
    pipeline.run(again, True, only="specialist-logic", console=QUIET)
    made, whole_run = weights_of(tmp_path / "again"), weights_of(tmp_path / "run")
    assert made and all(whole_run[name] == raw for name, raw in made.items())


def test_the_dense_twin(whole: Path, model: Path, tmp_path: Path) -> None:
    """The same pipeline without selection: no indexer learns, and the report shows it beside the sparse run."""
    more = {"selection": "dense", "difficulty.fixed.logic-direct": 3, "domains": ["logic"], "beside": str(whole)}
    figures = pipeline.run(settings(model, tmp_path / "dense", **more), only="specialist-logic", console=QUIET)
    assert figures["selection"] == "dense"
    assert figures["specialist-logic"]["difficulty"]["logic-direct"] == {"difficulty": 3, "rates": {}, "within": None}
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "dense/specialists/logic/rl/model/model.safetensors")
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and not any(".indexer." in name for name in moved)
    page = (tmp_path / "dense/posttrain.html").read_text()
    assert "dense beside sparse attention" in page and page.count("<svg") == 4 and ">specialist-writing<" in page
    assert "kl" not in (stages.history(tmp_path / "dense/specialists/logic/cold") or [])[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ["logics"]}, "domain logics: there is no such domain or file; name one of mathematics, logic"),
        ({"evaluations.alchemy": 1}, "evaluations.alchemy is none of the domains logic, writing"),
        ({"rl.ratios.alchemy": 1.0}, "rl.ratios.alchemy is none of the domains logic, writing"),
        ({"difficulty.fixed.logicc-direct": 3}, "fixed.logicc-direct is no DOMAIN-MODE of the domains logic, writing"),
        ({"tokens": K}, r"tokens is 16, and .* selects 16 keys: nothing would be selected"),
        ({"model": "base", "tokens": 600}, "base is dense and has no indexers; sparsify it first, or add --dense"),
        ({"beside": "nowhere"}, "beside: nowhere is no folder of a post-training run that is done"),
        ({"languages": ["fr"]}, "logic has problems in en, zh, none of them in languages"),
        ({"cold.options.leraning_rate": 1}, "options of SFTConfig: .*leraning_rate"),
        ({"distill.on_policy.options.temperature": 0.5}, "rollouts of the engine train at 1 alone"),
        ({"specialist.options.temperature": 0.5}, "rollouts of the engine train at 1 alone"),
        ({"rl.train.lora.rank": 2, "rl.train.lora.dropout": 0.1}, "lora_dropout is 0.1, and rollouts drop nothing"),
        ({"distill.on_policy.lora.rank": 2, "distill.on_policy.lora.dropout": 0.1}, "lora_dropout is 0.1"),
        ({"rl.train.lora.rank": 2, "rl.train.lora.targets": ["nope"]}, "nope"),
        ({"distill.on_policy.model": "nowhere/at-all/x"}, "nowhere/at-all/x"),
    ],
)
def test_refused_while_it_runs(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.run(settings(model, tmp_path / "run", **changes), only="specialist-logic", console=QUIET)


def test_what_is_missing_is_said_before_anything_is_trained(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only a later part needs."""

    def train(*_: Any) -> None:
        pytest.fail("a part has begun")

    def no_isolation() -> str:
        raise UserError("no isolation here")

    monkeypatch.setattr(Parts, "specialist", train)
    monkeypatch.setattr(pipeline, "Pace", train)

    def refused(message: str, **changes: Any) -> None:
        given = {"domains": ["logic", "writing"]} | {name.replace("__", "."): value for name, value in changes.items()}
        with pytest.raises(UserError, match=message):
            pipeline.run(settings(model, tmp_path / "run", **given), resume=True, console=QUIET)

    refused("writing has problems in en, none of them in languages", languages=["zh"])
    refused(r"tokens and new_tokens, 1000006 together, are past the model's 1024 positions", tokens=10**6)
    refused("options of SFTConfig: .*leraning_rate", distill__train__options__leraning_rate=1)
    refused("options of GRPOConfig: .*leraning_rate", rl__train__options__leraning_rate=1)
    refused("rollouts of the engine train at 1 alone", rl__train__options__temperature=0.5)
    refused("logic has difficulties from 2 to 10, not 1", **{"difficulty.fixed.logic-direct": 1})
    refused("no reply from judge m at http://127.0.0.1:9/v1", judge__url="http://127.0.0.1:9/v1", judge__model="m")
    monkeypatch.setattr(program, "isolation", no_isolation)
    refused("no isolation here", domains=["logic", "programming"])
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    refused("language consistency needs py3langid", reward__language=0.1)


@pytest.mark.parametrize("known", ["answer", "rubric"])
def test_a_file_is_a_domain_and_needs_no_answers(model: Path, tmp_path: Path, known: str) -> None:
    given = {"answer": "blue", "rubric": ["The answer has at most 3 words."]}[known]
    rows = [{"prompt": f"What is the colour of stone {number}?", known: given} for number in range(12)]
    (tmp_path / "my stones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"specialist.steps": 1, "tokens": 64 if known == "answer" else 17}
    config = settings(model, tmp_path / "run", **more)
    console = Console(record=True, width=1000, file=io.StringIO())
    figures = pipeline.run(config, only=f"specialist-{tmp_path / 'my stones.jsonl'}", console=console)
    assert "--model and --set, and my-stones among its domains" in console.export_text()
    assert set(figures["evaluation"]) == {BASE, "specialist-my-stones"}
    assert figures["specialist-my-stones"]["demonstrations"] == (4 if known == "answer" else 0)
    assert (tmp_path / "run/specialists/my-stones/rl/model/config.json").is_file()
    assert (tmp_path / "run/specialists/my-stones/cold/history.json").is_file() == (known == "answer")


def test_other_rows_of_the_same_name_are_other_data(model: Path, tmp_path: Path) -> None:
    """A file that is edited behind a part, and two of one name. Fields that nobody reads change nothing."""
    files = [tmp_path / folder / "my.jsonl" for folder in ("a", "b")]
    for file, answer in zip(files, ("blue", "red"), strict=True):
        file.parent.mkdir()
        rows = [{"prompt": f"The colour of stone {number}?", "answer": answer} for number in range(12)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(model, tmp_path / "run", domains=[str(files[0])], tokens=64)
    plans = [pipeline._plan(config, ("my",), pipeline._domains([str(file)])[1])[0] for file in files]
    assert plans[0].trains_on != plans[1].trains_on
    with pytest.raises(UserError, match="specialist-.*b/my.jsonl: another domain of this name is among domains"):
        pipeline.run(config, only=f"specialist-{files[1]}", console=QUIET)
    record = RunRecord.of(tmp_path / "run", {"specialist-my": ("specialists/my",)}, False, "run")
    record.figures["settings"] = pipeline._settings(config, plans[:1] * 3)
    record.write()
    (tmp_path / "run/specialists/my").mkdir(parents=True)
    text = files[0].read_text()
    files[0].write_text(text.replace("blue", "green"))
    with pytest.raises(UserError, match="config differs .* from specialist-my on"):
        pipeline.run(config, resume=True, console=QUIET)
    files[0].write_text(text.replace("}", ', "id": 7}'))
    assert pipeline._domains([str(files[0])])[1] == {"my": plans[0].trains_on[0]}
