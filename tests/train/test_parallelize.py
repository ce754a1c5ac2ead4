"""Training on several ranks against one process: losses, gradients and selected keys.

The ranks share a step of ragged packs: parameters are sharded over all of them, and tokens over some.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import ranks
from tests.support.steps import FAMILIES, LENGTH, ROWS, STAGES, WITH_EXPERTS, check_step, made, settings
from tests.support.training import batch, config
from tokensieve import cost
from tokensieve.config import BudgetConfig, LoraConfig, UserError
from tokensieve.mesh import Mesh
from tokensieve.model import ForwardOptions, SelectionContext
from tokensieve.model.gathered import ContextGroup
from tokensieve.model.selection import indexer
from tokensieve.train import parallelize
from tokensieve.train.parallelize import check_model, divide

# in a rank's process


@torch.no_grad()
def selections(family: str, context: ContextGroup | None, ties: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every layer's index scores, -inf outside a query's range, and selected keys of this rank's queries."""
    model = made(family)
    if ties:
        for name, parameter in model.named_parameters():
            if "indexer.wq_b" in name:
                parameter.zero_()  # every score is 0
    scores, chosen = [], []

    def recording(c: SelectionContext) -> Tensor:
        key, found = torch.arange(ROWS * LENGTH), c.scores()
        unseen = (key < c.starts_N[:, None]) | (key >= c.ends_N[:, None])
        scores.append(found.masked_fill(unseen, float("-inf")).numpy())
        chosen.append(indexer(c).numpy())
        return torch.from_numpy(chosen[-1])

    inputs = batch(ROWS, LENGTH, documents=True)
    with tokensieve.selecting(model, recording):
        model.model(inputs["input_ids"], position_ids=inputs["position_ids"], options=ForwardOptions(context=context))
    return scores, chosen


def selections_of_rank(family: str, ties: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return selections(family, divide(settings("adapt", ranks.HERE[0].size), ranks.HERE[0]).context, ties)


# here


@pytest.mark.parametrize(
    ("family", "stage", "context_parallel"),
    [("v32", "warmup", 2), ("v32", "adapt", 2), ("glm", "warmup", 2), ("qwen3_dsa", "adapt", 2), ("v32", "adapt", 1)],
)
def test_a_step_of_two_ranks(two: ranks.Group, family: str, stage: str, context_parallel: int) -> None:
    check_step(two, family, settings(stage, context_parallel))


@pytest.mark.parametrize(("family", "stage", "context_parallel"), [("glm", "warmup", 1), ("v32", "adapt", 2)])
def test_two_ranks_that_divide_the_experts(two: ranks.Group, family: str, stage: str, context_parallel: int) -> None:
    check_step(two, family, settings(stage, context_parallel, expert_parallel=2))


LORA = LoraConfig(rank=3, targets=("q_b_proj", "kv_b_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"))


@pytest.mark.parametrize(
    ("stage", "context_parallel", "changes"),
    [
        ("adapt", 1, {}),
        ("adapt", 2, {"activation_checkpointing": True}),
        ("adapt", 2, {"selection": False}),
        ("adapt", 2, {"expert_parallel": 2, "lora": LoraConfig(rank=3)}),
    ],
)
def test_adapters_on_two_ranks(two: ranks.Group, stage: str, context_parallel: int, changes: dict[str, Any]) -> None:
    check_step(two, "v32", settings(stage, context_parallel, **{"lora": LORA} | changes))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_all_linear_layers(two: ranks.Group, four: ranks.Group, family: str) -> None:
    check_step(two, family, settings("adapt", 2, lora=LoraConfig(rank=4)))
    check_step(four, family, settings("adapt", 2, lora=LoraConfig(rank=4)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(two: ranks.Group, family: str, stage: str) -> None:
    for context_parallel in (1, 2):
        check_step(two, family, settings(stage, context_parallel, 2, activation_checkpointing=context_parallel == 2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(four: ranks.Group, family: str, stage: str) -> None:
    for context_parallel in (1, 2, 4):
        check_step(four, family, settings(stage, context_parallel))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_two_ranks_divide_the_experts(two: ranks.Group, family: str, stage: str) -> None:
    for sharing in (1, 2):
        run = settings(stage, sharing, 2, expert_parallel=2, activation_checkpointing=sharing == 1)
        check_step(two, family, run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_four_ranks_divide_the_experts(four: ranks.Group, family: str, stage: str) -> None:
    """By two, each half sharded over two, and by four. No token of the first two rows of a parted model goes to the
    second half, so one of the ranks that share it has none.
    """
    for sharing, dividing in ((1, 2), (1, 4), (2, 2), (2, 4), (4, 2)):
        run = settings(stage, sharing, expert_parallel=dividing, activation_checkpointing=sharing == 2)
        check_step(four, family, run)


@pytest.mark.slow
def test_kl_of_some_queries(two: ranks.Group) -> None:
    check_step(two, "v32", settings("warmup", 2, kl_every=3))
    check_step(two, "v32", settings("adapt", 2, kl_every=2, length=256))


@pytest.mark.parametrize("ties", [False, True])
def test_the_keys_of_one_process_are_selected(two: ranks.Group, ties: bool) -> None:
    """Wherever scores are the same to the bit, and equal scores go to the smaller position."""
    family = "glm"
    expected, whole = selections(family, None, ties)
    query = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    for rank, (found, chosen) in enumerate(two.ask(selections_of_rank, family, ties)):
        own = ContextGroup(rank, 2, None).own(query).flatten().numpy()
        assert len(found) == len(expected) == 2  # two layers have an indexer
        for layer, scores in enumerate(found):
            equal = (scores == expected[layer][own]).all(1)
            assert equal.all() if ties or layer == 0 else equal.any()
            assert (chosen[layer] == whole[layer][own])[equal].all()


@pytest.mark.parametrize(
    ("size", "context_ranks", "changes", "words"),
    [
        (1, 2, {}, ("context_parallel is 2", "one rank", "leave it out", "torchrun --nproc-per-node 2")),
        (4, 3, {}, ("context_parallel is 3", "4 ranks", "divisor", "multiple of 3")),
        (1, 1, {"expert_parallel": 2}, ("expert_parallel is 2", "one rank", "torchrun --nproc-per-node 2")),
        (4, 1, {"expert_parallel": 3}, ("expert_parallel is 3", "4 ranks", "multiple of 3")),
        (8, 1, {}, ("4 sequences", "8 groups of one rank;", "multiple of 8")),
        (4, 2, {"micro_batch": 4}, ("micro-batches of 4", "2 groups of 2")),
        (2, 1, {"budget": BudgetConfig()}, ("budget runs in one process", "leave it out")),
    ],
)
def test_what_does_not_divide(size: int, context_ranks: int, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        divide(settings("adapt", context_ranks, **changes), Mesh(0, size, torch.device("cpu")))
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("family", "size", "dividing", "words"),
    [
        ("v32", 16, 16, "expert_parallel is 16, and the model has 8 routed experts; make it a divisor of them"),
        ("qwen3_dsa", 2, 2, "expert_parallel is 2, and the model has no routed experts; leave it out"),
        ("v32", 6, 2, "expert_parallel is 2, so 3 of 6 ranks share an expert, .* the 48 and 32 rows .* make it larger"),
    ],
)
def test_experts_that_do_not_divide(family: str, size: int, dividing: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_model(settings("adapt", expert_parallel=dividing), FAMILIES[family](), Mesh(0, size, torch.device("cpu")))


def test_settings_that_experts_do_not_take() -> None:
    with pytest.raises(UserError, match="expert_parallel is 0; it must be at least 1"):
        settings("adapt", expert_parallel=0)


def test_rows_that_are_too_short() -> None:
    with pytest.raises(UserError, match="context_parallel is 16; .* every phases.context must be a multiple of 32"):
        settings("warmup", 16)
    with pytest.raises(UserError, match="kl_every is 8 and context_parallel is 2; .* a multiple of 32"):
        settings("warmup", 2, kl_every=8)


def test_a_model_that_the_ranks_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """On machines of their memory's size it needs so many; on GPUs there is the host's memory too."""
    made, run = config("v32", num_hidden_layers=40), settings("adapt", 2)
    needed = cost.run_estimate(made, run, 1.0)
    gradients, moments = needed.gradient_bytes, needed.optimizer_bytes
    held = needed.weight_bytes + gradients + moments
    copied = needed.weight_bytes + moments
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=(held + copied) // 5 + 8))
    monkeypatch.setattr(parallelize, "rank_info", lambda: SimpleNamespace(local_size=2))
    with pytest.raises(UserError, match=r"2 ranks cannot hold the model: .* ranks on at least 5 such machines$"):
        check_model(run, made, Mesh(0, 2, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=held // 3 + 1))
    with pytest.raises(UserError, match=r"start at least 4 ranks, or set offload=true$"):
        check_model(run, made, Mesh(0, 2, torch.device("cuda")))


def test_the_copy_of_a_checkpoint_counts_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and gradients of 4 bytes a parameter, moments of 8, and weights and moments once more."""
    made, run = config("v32", num_hidden_layers=40), settings("adapt", 2)
    needed = cost.run_estimate(made, run, 1.0)
    held = 2 * (needed.weight_bytes + needed.optimizer_bytes) + needed.gradient_bytes
    for total, fits in ((held, True), (held - 8, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total // 2))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="with the copy of a checkpoint"):
            check_model(run, made, Mesh(0, 2, torch.device("cpu")))
