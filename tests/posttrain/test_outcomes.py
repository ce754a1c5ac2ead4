"""From problems to TRL and back: prompts, demonstrations, and the reward of sampled answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, SFTConfig, SFTTrainer

import tokensieve
from tests.support.models import config, ours
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig, Sampling
from tokensieve.posttrain import Judge, JudgeSettings, LanguageShare, Rollouts, Weights, scripted_judge
from tokensieve.posttrain.grpo import SparseGRPOTrainer
from tokensieve.posttrain.outcomes import answer_to, demonstrations_of, prompts_of, respond_of, reward_of, turns_of
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import DOMAINS, MODES, Call, Problems

K = 16


@pytest.fixture(scope="module")
def encode():
    return encoder(tokensieve.load_tokenizer("base"))


@pytest.mark.parametrize("mode", MODES)
def test_a_demonstration_earns_the_reward(mode: str, encode) -> None:
    """What training shows is what the reward is for: the ids behind the prompt's are an answer of value 1."""
    task = Problems(DOMAINS["logic"], encode, mode, "zh", tokens=200)
    examples = task.examples("train", 3)
    prompts, shown = prompts_of(examples, encode), demonstrations_of(examples, encode)
    answers = [row["input_ids"][len(p) :] for row, p in zip(shown, prompts["prompt"], strict=True)]
    for example, row, p in zip(examples, shown, prompts["prompt"], strict=True):
        assert row["input_ids"][: len(p)] == p
        learnt = [tuple(turn) for turn in turns_of(row["input_ids"], [bool(m) for m in row["completion_mask"]])]
        texts = [message["content"] for message in example.prompt[1::2]] + [example.demonstration]
        assert len(texts) > 1 and [answer_to(encode, example, turn).text for turn in learnt] == texts
        assert all(turn[-1] == encode.eos for turn in learnt)  # each ends, as the last one
    plain = Weights(language=0, length=0)
    given = reward_of(task, examples, encode, plain)
    assert given(completion_ids=answers, number=[0, 1, 2], prompts=[], trainer_state=None) == [1.0, 1.0, 1.0]
    assert given(completion_ids=answers[::-1], number=[0, 1, 2])[1] == 1.0
    assert given(completion_ids=[answers[0][:-1], []], number=[0, 1]) == [0.0, 0.0]  # without an end
    markers = encode.markers
    assert (markers["</think>"] in answers[0]) == (mode == "think")
    assert prompts["prompt"][0][-1] == markers["<think>" if mode == "think" else "</think>"]


def test_terms_are_weighed(encode) -> None:
    task = Problems(DOMAINS["mathematics"], encode, "direct", "en")
    examples = task.examples("train", 1)
    answer = [*encode(examples[0].demonstration), encode.eos]
    foreign = [*encode(f"答案是这个数字，大家都知道。{examples[0].demonstration}"), encode.eos]
    weights = Weights(language=0.5, length=0.25)
    given = reward_of(task, examples, encode, weights, LanguageShare(), free_tokens=0, limit_tokens=2 * len(answer))
    assert given(completion_ids=[answer], number=[0]) == [pytest.approx(1 + 0.5 - 0.125)]
    assert given(completion_ids=[foreign], number=[0]) == [pytest.approx(1 - 0.25)]


@pytest.mark.parametrize("name", ["writing", "answering"])
def test_a_judge_scores_what_has_a_rubric(name: str, encode) -> None:
    """By the scripted judge, which says what the rules say; an answer that it could not score has no reward."""
    task = Problems(DOMAINS[name], encode, "direct")
    examples = task.examples("train", 2)
    shown = [[*encode(example.demonstration), encode.eos] for example in examples]
    bad = [*encode("?"), encode.eos]
    weights = Weights(outcome=1, rubric=0.5, language=0, length=0)
    with scripted_judge() as url, Judge(JudgeSettings(url, "scripted")) as judge:
        given = reward_of(task, examples, encode, weights, judge=judge)
        assert given(completion_ids=[*shown, bad], number=[0, 1, 0]) == [1.5, 1.5, 0.0]
    with scripted_judge() as url, Judge(JudgeSettings(url, "scripted", budget=1, at_once=1)) as judge:
        given = reward_of(task, examples, encode, weights, judge=judge)
        assert given(completion_ids=shown, number=[0, 1]) == [1.5, None]
    logic = Problems(DOMAINS["logic"], encode, "direct")
    examples = logic.examples("train", 1)
    with scripted_judge() as url, Judge(JudgeSettings(url, "scripted")) as judge:
        given = reward_of(logic, examples, encode, weights, judge=judge)
        assert given(completion_ids=[[*encode(examples[0].demonstration), encode.eos]], number=[0]) == [1.0]
        assert judge.asked == 0


@pytest.mark.parametrize("name", ["search", "coding"])
@pytest.mark.parametrize("mode", MODES)
def test_an_agents_demonstration_is_an_episode_whose_turns_alone_are_learnt(name: str, mode: str, encode) -> None:
    """What is shown is what a rollout of the same turns would be: the tools answer the same ids, and it earns 1."""
    task = Problems(DOMAINS[name], encode, mode, "en", tokens=300)
    examples = task.examples("train", 2)
    respond, given = respond_of([(task, examples)], encode), reward_of(task, examples, encode, Weights(length=0))
    prompts = prompts_of(examples, encode)["prompt"]
    for number, (row, prompt) in enumerate(zip(demonstrations_of(examples, encode), prompts, strict=True)):
        ids, mask = row["input_ids"][len(prompt) :], [bool(m) for m in row["completion_mask"][len(prompt) :]]
        assert row["input_ids"][: len(prompt)] == prompt
        earlier = turns_of(prompt, [bool(m) for m in row["completion_mask"][: len(prompt)]])
        texts = [message["content"] for message in examples[number].prompt[1::2]]  # results of tools are the user's
        assert texts and [answer_to(encode, examples[number], turn).text for turn in earlier] == texts
        turns, rollout = [tuple(turn) for turn in turns_of(ids, mask)], []
        assert len(turns) == len(examples[number].steps) + 1 >= 3
        for place, turn in enumerate(turns):
            rollout += [*turn, *(respond(tuple(prompt), turns[: place + 1]) or [])]
        assert rollout == ids
        assert given(completion_ids=[ids], number=[number], written=[mask]) == [1.0]
        assert answer_to(encode, examples[number], ids, mask) == examples[number].shown
        # The same ids are worth nothing if the model wrote the results of its tools itself.
        assert given(completion_ids=[ids], number=[number], written=[[True] * len(ids)]) == [0.0]
    with pytest.raises(UserError, match=f"answers of {name}-{mode} come without the masks"):
        given(completion_ids=[ids], number=[0])
    with pytest.raises(UserError, match="is none of the problems whose tools are known"):
        respond((1, 2, 3), turns)
    other = replace(examples[0], item=examples[1].item)
    with pytest.raises(UserError, match=f"two problems of {name}-{mode} have the same prompt"):
        respond_of([(task, [examples[0], other])], encode)


@pytest.mark.parametrize(("name", "mode"), [("search", "think"), ("coding", "direct")])
def test_a_model_that_writes_the_demonstration_has_its_episode(name: str, mode: str, encode, monkeypatch) -> None:
    """The whole road but for the draws: calls in the tokens of a rollout, results of real tools, and the reward."""
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    task = Problems(DOMAINS[name], encode, mode)
    examples = task.examples("train", 2)
    shown, prompts = demonstrations_of(examples, encode), prompts_of(examples, encode)["prompt"]
    tokens = max(map(len, shown["input_ids"]))
    small = EngineConfig(pages=64, running=8, chunk=64)
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), tokens + 1, config=small, keep_selection=False)
    scripts = {tuple(prompt): ids for prompt, ids in zip(prompts, shown["input_ids"], strict=True)}

    def write(_: Any, rows: Any) -> list[int]:
        found = [(row, ids) for row in rows for p, ids in scripts.items() if tuple(row.seen[: len(p)]) == p]
        return [ids[len(row.seen)] for row, ids in found]

    monkeypatch.setattr(rollouts.engine, "_choose", write)
    respond, sampling = respond_of([(task, examples)], encode), Sampling(max_tokens=tokens)
    for number, (row, (rollout,)) in enumerate(
        zip(shown, rollouts.sample(prompts, 1, sampling, respond=respond), strict=True)
    ):
        start = len(rollout.prompt)
        assert [*rollout.prompt, *rollout.answer] == row["input_ids"] and rollout.ended
        assert [*rollout.mask] == [bool(m) for m in row["completion_mask"][start:]] and not all(rollout.mask)
        given = reward_of(task, examples, encode, Weights(length=0))
        assert given(completion_ids=[rollout.answer], number=[number], written=[rollout.mask]) == [1.0]


def test_the_penalty_and_the_language_are_of_what_the_model_wrote(encode) -> None:
    """Results are free, and calls are in no language; thoughts of every turn count."""
    task = Problems(DOMAINS["search"], encode, "think", "zh", tokens=100)
    (example,) = task.examples("train", 1)
    (row,) = demonstrations_of([example], encode)
    start = len(prompts_of([example], encode)["prompt"][0])
    ids, mask = row["input_ids"][start:], [bool(m) for m in row["completion_mask"][start:]]
    assert sum(mask) < len(mask)
    weights = Weights(length=1, language=1)
    limits = {"free_tokens": 0, "limit_tokens": 2 * sum(mask)}
    given = reward_of(task, [example], encode, weights, LanguageShare(), **limits)
    assert given(completion_ids=[ids], number=[0], written=[mask]) == [pytest.approx(1 + 1 - 0.5)]


def test_a_step_of_grpo_with_tools(encode, tmp_path: Path) -> None:
    """TRL trains on the tokens that the model wrote, with the results of real tools between them."""
    model, tokenizer = ours(config("v32", index_topk=K, vocab_size=4096)), tokensieve.load_tokenizer("base")
    model.generation_config.eos_token_id = [*range(0, 4096, 4)]
    task = Problems(DOMAINS["search"], encode, "direct", tokens=100)
    examples = task.examples("train", 2)
    seen: list[Any] = []

    def reward(completion_ids: Any, written: Any, **more: Any) -> list[float | None]:
        seen.extend(zip(completion_ids, written, strict=True))
        return [float(sum(mask) % 3) for mask in written]

    def respond(prompt: Any, turns: Any) -> list[int] | None:  # random weights call no tool by themselves
        assert respond_of([(task, examples)], encode)(prompt, turns) is None
        called = [*turns[:-1], encode(str(Call("search", {"query": "Bar"})))]
        return respond_of([(task, examples)], encode)(prompt, called) if len(turns) < 3 else None

    args = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=40, beta=0.0,
        max_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=False, logging_steps=1,
    )  # fmt: skip
    small = EngineConfig(pages=128, running=8, chunk=64)
    learner = SparseGRPOTrainer(
        model, tokenizer, [reward], args, prompts_of(examples, encode), tokens=1200, config=small, respond=respond
    )
    losses = []
    compute = learner._compute_loss
    learner._compute_loss = lambda model, inputs: losses.append(inputs) or compute(model, inputs)
    learner.train()
    (row,) = (row for row in learner.state.log_history if "reward" in row)
    assert row["rollout/logp_difference"] < 1e-6 and len(seen) == 4
    assert all(0 < sum(mask) <= 40 for _, mask in seen) and any(sum(mask) < len(mask) for _, mask in seen)
    rollouts = {r.answer: r for r in learner.latest["train"]}
    assert {tuple(ids): tuple(mask) for ids, mask in seen} == {answer: r.mask for answer, r in rollouts.items()}
    (inputs,) = losses
    for ids, real, own in zip(inputs["completion_ids"], inputs["completion_mask"], inputs["tool_mask"], strict=True):
        answer = tuple(ids[real.bool()].tolist())
        assert tuple(own[real.bool()].bool().tolist()) == rollouts[answer].mask
    assert row["completions/max_length"] == max(sum(mask) for _, mask in seen)


def test_a_step_of_cold_start_and_one_of_grpo(encode, tmp_path: Path) -> None:
    """The road of a specialist: TRL's SFTTrainer on demonstrations, then GRPO on the reward, on a sparse model."""
    model, tokenizer = ours(config("v32", index_topk=K, vocab_size=4096)), tokensieve.load_tokenizer("base")
    task = Problems(DOMAINS["logic"], encode, "think", "en", tokens=100)
    examples = task.examples("train", 8)
    common = {
        "max_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "logging_steps": 1,
    }
    cold = SFTConfig(output_dir=str(tmp_path / "sft"), per_device_train_batch_size=2, max_length=512, **common)
    with tokensieve.training(model, "adapt") as callback:
        trainer = SFTTrainer(
            model, args=cold, train_dataset=demonstrations_of(examples, encode), processing_class=tokenizer,
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    args = GRPOConfig(
        output_dir=str(tmp_path / "rl"), per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
        beta=0.0, **common,
    )  # fmt: skip
    data = prompts_of(examples, encode)
    assert isinstance(data, Dataset)
    small = EngineConfig(pages=64, running=8, chunk=64)
    learner = SparseGRPOTrainer(
        model, tokenizer, [reward_of(task, examples, encode)], args, data, tokens=512, config=small
    )
    learner.train()
    (row,) = (row for row in learner.state.log_history if "reward" in row)
    assert "rewards/logic-think/mean" in row and row["rollout/logp_difference"] < 1e-6
    assert row["rollout/queries_past_k"] > 0.8
