"""From problems to TRL and back: prompts, demonstrations, and the reward of sampled answers."""

from pathlib import Path

import pytest
from datasets import Dataset
from trl import GRPOConfig, SFTConfig, SFTTrainer

import tokensieve
from tests.support.models import config, ours
from tokensieve.engine import EngineConfig
from tokensieve.posttrain import Judge, JudgeSettings, LanguageShare, Weights, scripted_judge
from tokensieve.posttrain.grpo import SparseGRPOTrainer
from tokensieve.posttrain.outcomes import demonstrations_of, prompts_of, reward_of
from tokensieve.tasks import encoder
from tokensieve.tasks.problems import DOMAINS, MODES, Problems

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
    for row, p in zip(shown, prompts["prompt"], strict=True):
        assert row["input_ids"][: len(p)] == p and sum(row["completion_mask"]) == len(row["input_ids"]) - len(p)
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


def test_a_judge_scores_what_has_a_rubric(encode) -> None:
    """By the scripted judge, which says what the rules say; an answer that it could not score has no reward."""
    task = Problems(DOMAINS["writing"], encode, "direct")
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
