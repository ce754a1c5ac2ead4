"""What a stage under TRL learns from, and what is left in memory behind it."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import pytest

import tokensieve
from tests.support import grouped
from tests.support.models import config, ours
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import Rollouts, parts, stages
from tokensieve.posttrain.outcomes import demonstrations_of, prompts_of
from tokensieve.posttrain.parts import Parts, Watch, release_memory
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.report import write_curves
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import DOMAINS, Problems


@pytest.mark.parametrize("selection", ["indexer", "dense"])
@pytest.mark.parametrize("name", ["logic", "search"])
def test_only_the_models_own_tokens_are_learnt(
    name: str, selection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither prompts nor the results of tools: the labels that the trainer sees are those of `completion_mask`."""
    tokenizer = tokensieve.load_tokenizer("base")
    encode = encoder(tokenizer)
    rows = demonstrations_of(Problems(DOMAINS[name], encode, tokens=100).examples("train", 2), encode)
    seen: dict[tuple[int, ...], list[int]] = {}

    def look(trainer: stages.SFTTrainer, *others: object) -> stages.History:
        for inputs in trainer.get_train_dataloader():
            for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
                seen[tuple(ids)] = labels
        return []

    monkeypatch.setattr(stages, "_run", look)
    wanted = (f"out={tmp_path}", f"selection={selection}", "cold.micro_batch=1", "cold.rows=2", "device=cpu")
    settings = load_config(PosttrainConfig, "posttrain-tiny", wanted)
    model = ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1, max_position_embeddings=8192))
    stages.fine_tune(model, tokenizer, rows, settings.cold, settings, tmp_path)
    assert len(seen) == 2
    for row in rows:
        learnt = [t if own else -100 for t, own in zip(row["input_ids"], row["completion_mask"], strict=True)]
        assert seen[tuple(row["input_ids"])] == learnt
        assert 0 < sum(row["completion_mask"]) < len(learnt) / 4


def test_experts_learn_without_a_balance_loss(tmp_path: Path) -> None:
    """Of a dense model, whose config names a coefficient that TRL reads: the step's loss is the language loss."""
    tokenizer = tokensieve.load_tokenizer("base")
    encode = encoder(tokenizer)
    rows = demonstrations_of(Problems(DOMAINS["logic"], encode, tokens=100).examples("train", 2), encode)
    wanted = (f"out={tmp_path}", "selection=dense", "cold.micro_batch=1", "cold.rows=2", "cold.steps=1", "device=cpu")
    settings = load_config(PosttrainConfig, "posttrain-tiny", wanted)
    shape = {"vocab_size": 4096, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    model = ours(grouped.config("qwen3_moe", router_aux_loss_coef=0.5, **shape))
    (row,) = stages.fine_tune(model, tokenizer, rows, settings.cold, settings, tmp_path)
    assert row["loss"] > 0 and "aux_loss" not in row
    assert stages._grpo_arguments(settings.rl.train, settings, tmp_path).router_aux_loss_coef == 0


def test_a_step_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Neither a checkpoint nor a model of such weights, which a dense model runs without a word."""
    tokenizer = tokensieve.load_tokenizer("base")
    encode = encoder(tokenizer)
    rows = demonstrations_of(Problems(DOMAINS["logic"], encode, tokens=100).examples("train", 3), encode)
    wanted = (f"out={tmp_path}", "selection=dense", "cold.steps=3", "cold.lr=1e30", "save_every=1", "device=cpu")
    settings = load_config(PosttrainConfig, "posttrain-tiny", wanted)
    model = ours(grouped.config("qwen3", vocab_size=4096, num_hidden_layers=1, max_position_embeddings=8192))
    with pytest.raises(UserError, match=r"of step 2 is nan, and the step is not saved; begin again in another folder"):
        stages.fine_tune(model, tokenizer, rows, settings.cold, settings, tmp_path)
    assert stages.history(tmp_path) is None and [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_step_without_any_reward_is_a_row_without_one(tmp_path: Path) -> None:
    """Such as one whose answers the judge could not score: it is said, and drawn, as a step that has no figure."""
    tokenizer = tokensieve.load_tokenizer("base")
    encode = encoder(tokenizer)
    prompts = prompts_of(Problems(DOMAINS["logic"], encode, tokens=100).examples("train", 2), encode)
    wanted = (f"out={tmp_path}", "device=cpu", "new_tokens=4", "specialist.steps=2", "specialist.prompts=1")
    settings = load_config(PosttrainConfig, "posttrain-tiny", wanted)
    model = ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1, max_position_embeddings=8192))
    asked: list[bool] = []

    def later(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        asked.append(True)
        return [float(len(asked) > 1) or None for _ in completion_ids]

    told: list[dict[str, float]] = []
    rows = stages.reinforce(
        model, tokenizer, prompts, [later], settings.specialist, settings, tmp_path, lambda *step: told.append(step[2])
    )
    assert ["reward" in row for row in told] == ["reward" in row for row in rows] == [False, True]
    assert stages.history(tmp_path) == rows and not any(value is None for row in rows for value in row.values())
    write_curves(tmp_path, {"logic": rows, "without": rows[:1]})
    assert "<svg" in (tmp_path / "reward.svg").read_text()


def test_no_engine_is_left_when_the_next_model_is_loaded() -> None:
    """On a GPU its recorded steps refer to it. `Parts.load` frees it before anything else."""
    model = ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1))
    runner = Rollouts(model, tokensieve.load_tokenizer("base"), 64, at_once=1).engine.runner
    runner._graphs = runner._run_step  # as `Graphs` holds it
    left = weakref.ref(runner)
    gc.disable()  # it would come at any time
    try:
        del runner
        assert left() is not None
        release_memory()
        assert left() is None
    finally:
        gc.enable()


def test_no_engine_is_left_behind_sampled_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measured difficulty has an engine for each probe, and GRPO goes on with the same model."""

    class Runner:
        def __init__(self) -> None:
            self.graphs = self.__init__  # as `Graphs` holds it

    left: list[weakref.ref[Runner]] = []

    def sampled(*_: Any, **__: Any) -> list[Any]:
        left.append(weakref.ref(Runner()))
        assert left[-1]() is not None
        return []

    class Quiet(Watch):
        pass

    monkeypatch.setattr(parts, "sample", sampled)
    settings = load_config(PosttrainConfig, "posttrain-tiny", ("model=base", f"out={tmp_path}", "device=cpu"))
    model = ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1))
    gc.disable()  # it would come at any time
    try:
        Parts(settings, {}, {}, Quiet())._sample(model, "a probe", [], 1)
        assert left[0]() is None
    finally:
        gc.enable()


def test_trl_does_not_print_the_answers_without_a_reward(caplog: pytest.LogCaptureFixture) -> None:
    """The judge has said in a line how many there are, and why. Outside of a stage TRL says what it likes."""
    told = logging.getLogger("trl.trainer.grpo_trainer")
    with stages._quiet():
        told.warning("[RANK 0] All reward functions returned None for the following kwargs:\n%s", "[True, True]")
        told.warning("something else")
    told.warning("All reward functions returned None again")
    assert [record.getMessage().split("\n")[0] for record in caplog.records] == [
        "something else",
        "All reward functions returned None again",
    ]
