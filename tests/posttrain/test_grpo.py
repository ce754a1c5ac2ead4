"""A step of GRPO under TRL: the engine samples, training replays, and both agree."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import tokensieve
from tests.support.models import config, difference, ours, tokens
from tokensieve.config import LoraConfig, UserError
from tokensieve.engine import EngineConfig
from tokensieve.posttrain.grpo import SparseGRPOTrainer
from tokensieve.train import lora

K = 16
TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * 6 for number in range(8)]
SMALL = EngineConfig(pages=64, running=8, chunk=64)
TARGETS = ("q_b_proj", "kv_b_proj", "o_proj")


def rewarded(completions: list[str], **_: Any) -> list[float | None]:
    return [float(len(text) % 7) for text in completions]


OWN = ("selection", "replay", "tokens", "held_out", "peft_config")


def adapter(**changes: Any) -> peft.LoraConfig:
    settings = {"r": 4, "target_modules": [*TARGETS], "modules_to_save": ["indexer"]}
    return peft.LoraConfig(**settings | changes)


def trainer(folder: Path, model: Any, prompts: Any = TEXTS, **changes: Any) -> SparseGRPOTrainer:
    own = {name: changes.pop(name) for name in OWN if name in changes}
    args = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=12,
        report_to=[], logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
        **{"beta": 0.0, "learning_rate": 1e-3, "max_steps": 2, "bf16": False} | changes,
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


@pytest.mark.parametrize("adapters", [False, True])
def test_under_autocast_rollouts_read_rounded_weights(adapters: bool, tmp_path: Path) -> None:
    """Training multiplies in bfloat16, and so does the engine, by a copy that follows the weights. Log probabilities
    near -8 have steps of 2^-5 in bfloat16; the mean over answers is below one."""
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    before = model.lm_head.weight.detach().clone()
    more = {"peft_config": adapter()} if adapters else {}
    trained = trainer(tmp_path, model, bf16=True, learning_rate=1e-2, **more)
    trained.train()
    copy = trained._sampler.engine.model
    assert copy.dtype == torch.bfloat16 and model.dtype == torch.float32
    heads = [p.dtype for name, p in copy.named_parameters() if name.endswith("weights_proj.weight")]
    layers = len(copy.model.layers)
    assert heads == [torch.float32] * layers * (2 if adapters else 1)  # PEFT keeps the original beside the active one
    assert max(logged(trained, "rollout/logp_difference")) < 2**-5
    assert len(logged(trained, "kl")) == 2  # of the indexers
    assert torch.equal(model.lm_head.weight, before) == adapters
    rollout = trained.sample(TEXTS[:1])[0]
    weights = zip(copy.parameters(), model.parameters(), strict=True)
    assert len(rollout.answer) == 12 and all(torch.equal(a, b.to(a.dtype)) for a, b in weights)


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


@pytest.mark.parametrize("way", ["ours", "PEFT's", "a config"])
def test_adapters_learn_in_place_of_the_trunk(way: str, tmp_path: Path) -> None:
    """However they come, the engine samples with them, and the reference is the model without them, on equal keys."""
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    before, ids = {name: p.detach().clone() for name, p in model.named_parameters()}, tokens(1, 60)
    first = model(ids).logits
    house = lora.adapted(model, LoraConfig(rank=4, targets=TARGETS)) if way == "ours" else nullcontext()
    with house as wrapped:
        given = peft.get_peft_model(model, adapter()) if way == "PEFT's" else wrapped or model
        more = {"peft_config": adapter()} if way == "a config" else {}
        trained = trainer(tmp_path, given, beta=0.5, learning_rate=1e-2, **more)
        trained.train()
        assert max(logged(trained, "rollout/logp_difference")) < 1e-6
        assert len(logged(trained, "kl")) == 2  # of the indexers
        kl = logged(trained, "reference/kl")
        assert abs(kl[0]) < 1e-6 and kl[1] > 1e-4  # the same model at first, and not after a step
        trained.save_model(str(tmp_path / "adapter"))
        with trained.model.disable_adapter():
            assert torch.equal(model(ids).logits, first)
        last = model(ids).logits
    merged = model if way == "ours" else trained.model.merge_and_unload()
    assert difference(merged(ids).logits, last) < 1e-4 and difference(last, first) > 1e-2
    moved = {name for name, p in merged.named_parameters() if not torch.equal(p, before[name])}
    assert {n for n in moved if ".indexer." not in n} == {n for n in before if any(f".{t}." in n for t in TARGETS)}
    assert {name for name in before if ".indexer." in name} <= moved
    again = ours(config("v32", index_topk=K, vocab_size=4096))
    assert difference(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")(ids).logits, last) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"selection": "dense"}, {"replay": False}])
def test_without_adapters_the_reference_is_a_copy(changes: dict[str, Any], tmp_path: Path) -> None:
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held_out = Dataset.from_dict({"prompt": TEXTS[:1]})
    trained = trainer(tmp_path, model, beta=0.5, held_out=held_out, per_device_eval_batch_size=4, **changes)
    trained.train()
    kl = logged(trained, "reference/kl")
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-4
    assert all(torch.equal(p, before[name]) for name, p in trained.ref_model.named_parameters())
    assert trained.evaluate()["eval_reference/kl"] > 1e-4


def test_the_reference_reads_the_keys_of_the_rollout(tmp_path: Path) -> None:
    """An indexer that chooses otherwise makes no KL: the keys are the rollout's, in a copy and without adapters."""
    for more in ({}, {"peft_config": adapter()}):
        model = ours(config("v32", index_topk=K, vocab_size=4096))
        trained = trainer(tmp_path, model, beta=0.5, max_steps=1, **more)
        frozen = trained.ref_model or trained.model
        with torch.no_grad():
            for name, p in frozen.named_parameters():
                if ".indexer." in name and ".modules_to_save." not in name:
                    p.copy_(torch.randn_like(p))
        trained.train()
        assert abs(logged(trained, "reference/kl")[0]) < 1e-6


def test_what_is_refused(tmp_path: Path) -> None:
    model = ours(config("v32", index_topk=K, vocab_size=4096))
    with pytest.raises(UserError, match=r"temperature is 0.7; rollouts of the engine train at 1 alone"):
        trainer(tmp_path, model, temperature=0.7)
    for changes, message in (
        ({"beta": 0.1, "sync_ref_model": True}, "sync_ref_model: the reference stays as training began"),
        ({"peft_config": peft.IA3Config()}, "the adapters are IA3's, and the engine runs LoRA's"),
        ({"peft_config": adapter(lora_dropout=0.1)}, "lora_dropout is 0.1, and rollouts drop nothing"),
        ({"peft_config": adapter(modules_to_save=None)}, "the indexers learn, and the adapter would not save them"),
        (
            {"generation_kwargs": {"min_tokens": 50}},
            r"generation_kwargs is {'min_tokens': 50}; rollouts of the engine do",
        ),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs is .* leave it out"),
        ({"cache_implementation": "static"}, "cache_implementation is static"),
        ({"max_tool_calling_iterations": 3}, "max_tool_calling_iterations is 3"),
        ({"selection": "window"}, "selection 'window': rollouts and training select by the indexer"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path, model, **changes)
    learnt = peft.get_peft_model(model, adapter(init_lora_weights=False))
    with pytest.raises(UserError, match=r"beta is 0.1, and the adapters are not zero: .* merge them"):
        trainer(tmp_path, learnt, beta=0.1)
    model = learnt.unload()
    with pytest.raises(UserError, match="take a model of tokensieve, or PEFT's wrapper of one, not Linear"):
        trainer(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"a prompt has \d+ tokens, and with 12 of an answer more than the 64"):
        trainer(tmp_path, model, tokens=64).train()
