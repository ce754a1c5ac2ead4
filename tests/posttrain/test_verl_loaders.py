"""Config, data and rewards through verl's own loaders, on a CPU. verl is in an environment of its own: `make verl`."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verl", reason="verl is in an environment of its own: make verl")

import numpy
import torch
from hydra import compose, initialize_config_dir
from transformers import PreTrainedTokenizerFast
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.dataset.rl_dataset import RLHFDataset

from tokensieve.posttrain.rewards import length_penalty
from tokensieve.posttrain.verl import rows_of, write_rows
from tokensieve.tasks.problems import DOMAINS, Problems

ROOT = Path(__file__).resolve().parents[2]
LONGEST, BUFFER = 1024, 256  # of grpo.yaml


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("verl")
    words: Any = str.split  # for want of a tokenizer
    for split in ("train", "test"):
        task = Problems(DOMAINS["mathematics"], words, tokens=200)
        write_rows(folder / f"{split}.parquet", rows_of("mathematics", task.examples(split, 8), split))
    with initialize_config_dir(str(ROOT / "integrations" / "verl"), version_base=None):
        return compose(
            "grpo",
            [
                "hydra.searchpath=[pkg://verl.trainer.config]", f"actor_rollout_ref.model.path={folder}",
                f"data.train_files={folder}/train.parquet", f"data.val_files={folder}/test.parquet",
                f"+data.cache_dir={folder}",
            ],
        )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(ROOT / "tokensieve" / "bundled" / "base")


def test_the_config_composes_and_is_valid(config: Any) -> None:
    assert config.algorithm.adv_estimator == "grpo" and need_reference_policy(config) and not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)


def test_prompts_load(config: Any, tokenizer: Any) -> None:
    loaded = RLHFDataset(config.data.train_files, tokenizer, config.data)
    assert len(loaded) == 8
    row = loaded[3]
    assert row["data_source"] == "mathematics" and row["index"] == 3 and row["raw_prompt"][0]["role"] == "user"


def test_answers_are_scored(config: Any, tokenizer: Any) -> None:
    """Right and wrong ones, and long ones less."""
    row = RLHFDataset(config.data.train_files, tokenizer, config.data)[0]
    right = Problems(DOMAINS["mathematics"], str.split, tokens=200).examples("train", 1)[0].item.answer  # type: ignore[arg-type]

    async def rewarded(text: str, tokens: int) -> dict[str, Any]:
        manager = load_reward_manager(config, tokenizer)
        ids = [tokenizer.pad_token_id] * tokens  # which are cut out before the text is scored
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids[: len(answer)] = answer
        names = ("data_source", "reward_model", "extra_info")
        batch = {"responses": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        data = DataProto.from_dict(batch, {name: numpy.array([row[name]], dtype=object) for name in names})
        return await manager.run_single(data)

    for text, outcome in ((right, 1.0), (f"{right}1", 0.0)):
        for tokens in (8, 800, LONGEST):
            found = asyncio.run(rewarded(text, tokens))
            kept, terms = found["reward_extra_info"]["language"], found["reward_extra_info"]
            assert terms["outcome"] == terms["acc"] == outcome
            penalty = length_penalty(tokens, LONGEST - BUFFER, LONGEST)
            assert float(found["reward_score"]) == pytest.approx(outcome + 0.1 * kept - 0.1 * penalty)
