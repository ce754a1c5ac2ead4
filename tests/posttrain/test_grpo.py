"""A step of GRPO under TRL: the engine samples, training replays, and both agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import tokensieve
from tests.support.models import config, ours
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig
from tokensieve.posttrain.grpo import SparseGRPOTrainer

K = 16
TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * 6 for number in range(8)]
SMALL = EngineConfig(pages=64, running=8, chunk=64)


def rewarded(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(text) % 7) for text in completions]


def trainer(folder: Path, model: Any, prompts: Any = TEXTS, **changes: Any) -> SparseGRPOTrainer:
    own = {name: changes.pop(name) for name in ("selection", "replay", "tokens", "held_out") if name in changes}
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=12, max_steps=2,
        learning_rate=1e-3, report_to=[], logging_steps=1, use_cpu=True, save_strategy="no", bf16=False,
        disable_tqdm=True, **{"beta": 0.0} | changes,
    )  # fmt: skip
    data, tokenizer = Dataset.from_dict({"prompt": prompts}), tokensieve.load_tokenizer("base")
    return SparseGRPOTrainer(model, tokenizer, [rewarded], args, data, config=SMALL, **{"tokens": 256} | own)


def logged(trained: SparseGRPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trained.state.log_history if name in row]


@pytest.mark.parametrize("changes", [{}, {"steps_per_generation": 2, "gradient_accumulation_steps": 2}])
def test_training_agrees_with_the_rollouts_and_everything_learns(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = trainer(tmp_path, model, **changes)
    trained.train()
    differences = logged(trained, "rollout/logp_difference")
    assert len(differences) == 2 and max(differences) < 1e-6
    assert all(0.5 < share < 1 for share in logged(trained, "rollout/queries_past_k"))
    assert len(logged(trained, "kl")) == 2  # of the indexers
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".indexer." in name} <= moved and any("kv_b_proj" in name for name in moved)


def test_without_replay_it_trains_and_says_what_that_does(tmp_path: Path) -> None:
    trained = trainer(tmp_path, ours(config("v32", index_topk=K, vocab_size=4096)), replay=False)
    trained.train()
    assert trained.latest["train"][0].selection == () and max(logged(trained, "rollout/logp_difference")) < 1e-2


@pytest.mark.parametrize("kind", ["v32", "v3"])
def test_the_dense_twin(kind: str, tmp_path: Path) -> None:
    """A sparse model attending densely, and a dense one: the same trainer, no selection, no loss of an indexer."""
    more = {"index_topk": K} if kind == "v32" else {}
    model = ours(config(kind, vocab_size=4096, **more))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".indexer." in name}
    trained = trainer(tmp_path, model, selection="dense")
    trained.train()
    assert max(logged(trained, "rollout/logp_difference")) < 1e-5 and trained.latest["train"][0].selection == ()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_cut_off_answers_may_be_masked_and_evaluation_has_rollouts_of_its_own(tmp_path: Path) -> None:
    """TRL's options that change the rows: answers masked as cut off, and an evaluation between buffered steps."""
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    more = {"mask_truncated_completions": True, "eval_strategy": "steps", "eval_steps": 1, "steps_per_generation": 2}
    held_out = Dataset.from_dict({"prompt": TEXTS[:1]})
    trained = trainer(tmp_path, model, **more, per_device_eval_batch_size=4, held_out=held_out)
    trained.train()
    assert len(trained.latest["eval"]) == 4 and len(logged(trained, "eval_reward")) == 2


def test_what_is_refused(tmp_path: Path) -> None:
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    with pytest.raises(UserError, match=r"temperature is 0.7; rollouts of the engine train at 1 alone"):
        trainer(tmp_path, model, temperature=0.7)
    for changes, message in (
        ({"beta": 0.1}, "beta is 0.1: there is no reference model"),
        ({"selection": "window"}, "selection 'window': rollouts and training select by the indexer"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, model, **changes)
    with pytest.raises(UserError, match="takes a model of tokensieve, not Linear"):
        trainer(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens, and with 12 of an answer more than the 64"):
        trainer(tmp_path, model, tokens=64).train()
