"""On-policy distillation under TRL: each prompt's own teacher, the engine's rollouts, the indexers' loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DistillationConfig

import tokensieve
from tests.support.models import config, ours
from tokensieve.config import LoraConfig, UserError
from tokensieve.engine import EngineConfig
from tokensieve.posttrain.on_policy import SparseDistillationTrainer
from tokensieve.train import lora

K = 16
TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * 6 for number in range(4)]
SMALL = EngineConfig(pages=64, running=8, chunk=64)


def model_of(seed: int, kind: str = "v32", **changes: Any) -> Any:
    """A random model; those of other seeds than 0 have other weights."""
    more = {"index_topk": K} if kind == "v32" else {}
    model = ours(config(kind, **{"vocab_size": 4096} | more | changes))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model


def trainer(folder: Path, model: Any, teachers: Any, names: Any, **changes: Any) -> SparseDistillationTrainer:
    own = {name: changes.pop(name) for name in ("selection", "respond", "config") if name in changes}
    settings = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 2, "learning_rate": 1e-3,
        "max_completion_length": 12, "bf16": False,
    }  # fmt: skip
    args = DistillationConfig(
        output_dir=str(folder), report_to=[], logging_steps=1, use_cpu=True,
        save_strategy="no", disable_tqdm=True, **settings | changes,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": TEXTS, "teacher": names})
    tokenizer = tokensieve.load_tokenizer("base")
    return SparseDistillationTrainer(model, teachers, tokenizer, args, data, tokens=256, **{"config": SMALL} | own)


def logged(trained: SparseDistillationTrainer, name: str) -> list[float]:
    return [row[name] for row in trained.state.log_history if name in row]


def test_a_step_is_the_reverse_kl_to_each_prompts_own_teacher(tmp_path: Path) -> None:
    """Against log-softmaxes of whole passes of plain models, at the answers that were sampled."""
    model, teachers = model_of(0), {"a": model_of(1), "b": model_of(2)}
    before, names = copy.deepcopy(model).eval(), ["a", "b", "b", "a"]
    trained = trainer(tmp_path, model, teachers, names, max_steps=1)
    trained.train()
    chosen = {tuple(trained._encode.prompt(text)): teachers[name] for text, name in zip(TEXTS, names, strict=True)}
    total = tokens = 0.0
    for rollout in trained.latest:
        ids, first = torch.tensor([[*rollout.prompt, *rollout.answer]]), len(rollout.prompt) - 1
        with torch.no_grad():
            own, wanted = (m(ids).logits[0, first:-1].log_softmax(-1) for m in (before, chosen[rollout.prompt].eval()))
        total += float((own.exp() * (own - wanted)).sum())
        tokens += len(rollout.answer)
    (loss,) = logged(trained, "loss")
    assert loss == pytest.approx(total / tokens, rel=1e-4)  # float32, other orders of summation
    assert loss > 1e-3


def test_under_autocast_passes_and_rollouts_are_in_bfloat16(tmp_path: Path) -> None:
    """The same loss as in float32, within the rounding of products."""
    losses = []
    for bf16 in (False, True):
        model, seen = model_of(0), set()
        trained = trainer(tmp_path, model, {"a": model_of(1)}, ["a"] * 4, max_steps=1, bf16=bf16)
        mlp = model.model.layers[0].mlp
        hook = mlp.register_forward_hook(lambda _, __, made, seen=seen: seen.add(made.dtype))
        trained.train()
        hook.remove()
        dtype = torch.bfloat16 if bf16 else torch.float32
        assert seen == {dtype} == {trained._sampler.engine.model.dtype} and model.dtype == torch.float32
        losses += logged(trained, "loss")
        assert max(logged(trained, "rollout/logp_difference")) < (2**-5 if bf16 else 1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # of other answers, which roundings change


def test_rollouts_and_training_agree_and_everything_learns(tmp_path: Path) -> None:
    model, teacher = model_of(0), model_of(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    trained = trainer(tmp_path, model, {"a": teacher}, ["a"] * 4, max_steps=4, learning_rate=3e-3)
    trained.train()
    assert max(logged(trained, "rollout/logp_difference")) < 1e-6
    assert all(0.5 < share < 1 for share in logged(trained, "rollout/queries_past_k"))
    losses = logged(trained, "loss")
    assert len(logged(trained, "kl")) == 4 and losses[-1] < 0.95 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".indexer." in name} <= moved and any("kv_b_proj" in name for name in moved)
    assert all(torch.equal(p, kept[name]) for name, p in teacher.named_parameters())


def test_what_tools_return_is_not_learnt(tmp_path: Path) -> None:
    """Every token ends a turn, so that each answer is a turn, a result and a turn."""
    model, result = model_of(0), [5, 6, 7]
    model.generation_config.eos_token_id = [*range(4096)]

    def respond(prompt: Any, turns: Any) -> list[int] | None:
        return result if len(turns) == 1 else None

    trained = trainer(tmp_path, model, {"a": model_of(1)}, ["a"] * 4, max_steps=1, respond=respond)
    _, answers, masks, *_ = trained._generate(TEXTS)
    assert all(ids[1:4] == result and mask == [1, 0, 0, 0, 1] for ids, mask in zip(answers, masks, strict=True))
    trained.train()
    (loss,) = logged(trained, "loss")
    assert loss > 1e-3 and max(logged(trained, "rollout/logp_difference")) < 1e-6


def test_the_dense_twin(tmp_path: Path) -> None:
    model = model_of(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = trainer(tmp_path, model, {"a": model_of(1)}, ["a"] * 4, selection="dense")
    trained.train()
    assert trained.latest[0].selection == () and max(logged(trained, "rollout/logp_difference")) < 1e-5
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not any(".indexer." in name for name in moved)


def test_adapters_learn_in_place_of_the_trunk(tmp_path: Path) -> None:
    model = model_of(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with lora.adapted(model, LoraConfig(rank=4, targets=("o_proj",))) as adapter:
        trained = trainer(tmp_path, adapter, {"a": model_of(1)}, ["a"] * 4, learning_rate=1e-2)
        trained.train()
        assert max(logged(trained, "rollout/logp_difference")) < 1e-6
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in moved if ".indexer." not in name} == {name for name in before if ".o_proj." in name}
    assert {name for name in before if ".indexer." in name} <= moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size is 2; every row has a teacher of its own"),
        ({"temperature": 0.5}, "temperature is 0.5; rollouts of the engine train at 1 alone"),
        ({"cache_implementation": "static"}, "cache_implementation is static; rollouts of the engine do not take it"),
        ({"use_vllm": True}, "use_vllm excludes the engine's rollouts"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "the teachers are the specialists; leave it out"),
        ({"selection": "windw"}, "selection 'windw'"),
        ({"config": EngineConfig(pages=64, top_k=4)}, "the engine's top_k is 4, and training selects 16; leave it out"),
        ({"model": torch.nn.Linear(2, 2)}, "rollouts of the engine take a model of tokensieve, .* not Linear"),
        ({"names": ["b"] * 4}, "prompts name the teacher b, which is not there; name one of a"),
        ({"teachers": {"a": model_of(0, vocab_size=64)}}, "teacher a has 64 tokens, and the student 4096"),
    ],
)
def test_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    teachers, names = changes.pop("teachers", {"a": model_of(0)}), changes.pop("names", ["a"] * 4)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, changes.pop("model", model_of(0)), teachers, names, **changes)


def test_a_prompt_without_room_for_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with 250 of an answer more than the 256 that rollouts have room for"):
        trainer(tmp_path, model_of(0), {"a": model_of(0)}, ["a"] * 4, max_completion_length=250).train()
