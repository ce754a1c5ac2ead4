"""Steps whose products are in bfloat16: parameters are gathered in it, and results are those of autocast alone.

A GPU trains so. These are CPUs that are told to.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch import Tensor

from tests.support import ranks
from tests.support.steps import in_bfloat16, made, outcome, settings, step, step_of_rank
from tests.support.training import apart
from tokensieve import cost
from tokensieve.config import LoraConfig, TrainConfig
from tokensieve.model.moe import Experts
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train.stage import _entropies

# Relative to a gradient's largest value. The same numbers go into the same products, so only sums in float32 differ.
SUMS = 1e-6
# One rounding to bfloat16 more, or less: of the sum over the tokens of a row of the embedding.
ROUNDED = 2**-8
EMBEDDING = "model.embed_tokens.weight"
SHARED_INDEXER = ".indexer.w"  # its matrices


# in a rank's process


def rounded_step(family: str, run: TrainConfig, gathered: bool = True) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with in_bfloat16(gathered):
        return step_of_rank(family, run)


def dtypes_in_a_pass(family: str, run: TrainConfig) -> dict[str, torch.dtype]:
    """The dtypes of the gathered parameters that layers read, by their name in a layer; experts' without the layer."""
    read: dict[str, torch.dtype] = {}

    def recorded(kind: type[torch.nn.Module]) -> Callable[..., Any]:
        forward = kind.forward

        def recording(module: torch.nn.Module, *arguments: Any) -> Any:
            read.update((name, parameter.dtype) for name, parameter in module.named_parameters())
            return forward(module, *arguments)

        return recording

    with pytest.MonkeyPatch.context() as patch, in_bfloat16():
        for kind in (DecoderLayer, Experts):
            patch.setattr(kind, "forward", recorded(kind))
        gradients, _ = step_of_rank(family, run)
    assert {g.dtype for g in gradients.values()} == {np.dtype(np.float32)}
    return read


# here


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = (EMBEDDING,)) -> None:
    """but: gradients in which a rounding more is allowed, by a part of their name."""
    rest = {name for name in expected if not any(part in name for part in but)}
    assert apart({n: found[n] for n in rest}, {n: expected[n] for n in rest}) < SUMS
    assert apart(found, expected) < ROUNDED


def excepted(family: str) -> tuple[str, ...]:
    """Layers that share an indexer add their gradients of it in bfloat16, which autocast's copies do not do."""
    return (EMBEDDING, SHARED_INDEXER) if family == "glm" else (EMBEDDING,)


@pytest.mark.parametrize(
    ("family", "stage", "changes"),
    [
        ("v32", "adapt", {}),
        ("v32", "warmup", {}),
        ("glm", "warmup", {}),  # its layers share indexers
        ("qwen3_moe_dsa", "pretrain", {"activation_checkpointing": True}),  # its head is the embedding
        ("v32", "adapt", {"lora": LoraConfig(rank=3, targets=("q_b_proj", "o_proj", "gate_proj"))}),
    ],
)
def test_a_step_is_that_of_one_process(two: ranks.Group, family: str, stage: str, changes: dict[str, Any]) -> None:
    """With a row at a time on either side, so that products sum over the same tokens."""
    run = settings(stage, **changes)
    with in_bfloat16():
        expected, figures = outcome(replace(run, activation_checkpointing=False), made(family), step(family, run))
    found, reported = two.ask(rounded_step, family, run)[0]
    check(tensors(found), expected, excepted(family))
    assert reported["loss"] == pytest.approx(figures["loss"], rel=1e-6)


@pytest.mark.parametrize(("family", "stage", "changes"), [
    ("v32", "adapt", {"context_parallel": 2}),
    ("v32", "adapt", {"expert_parallel": 2}),
    ("glm", "warmup", {"context_parallel": 2}),
])  # fmt: skip
def test_gathering_rounds_as_autocast_does(two: ranks.Group, family: str, stage: str, changes: dict[str, Any]) -> None:
    """If ranks share a row, their products sum over other tokens than one process's. So the same ranks do it twice."""
    run = settings(stage, **changes)
    found, figures = two.ask(rounded_step, family, run)[0]
    expected, autocast = two.ask(rounded_step, family, run, False)[0]
    check(tensors(found), tensors(expected), excepted(family))
    assert figures["loss"] == pytest.approx(autocast["loss"], rel=1e-6)


@pytest.mark.parametrize("gathered", [False, True])
def test_pieces_of_the_head_are_summed_in_bfloat16(gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether autocast rounds the head or FSDP has: one rounding of its gradient, or as many as pieces."""
    draw = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 4096, 64, 512
    hidden, weight = torch.randn(tokens, width, generator=draw), 0.02 * torch.randn(vocabulary, width, generator=draw)
    targets = torch.randint(vocabulary, (tokens,), generator=draw)

    def gradient(pieces: int, rounded: bool = True) -> Tensor:
        monkeypatch.setattr(cost, "head_rows", lambda _: tokens // pieces)
        head = nn.Linear(width, vocabulary, bias=False)
        head.weight = nn.Parameter(weight.bfloat16() if gathered and rounded else weight.clone())
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            _entropies(head, hidden, targets).mean().backward()
        return head.weight.grad.float()

    exact = gradient(1, rounded=False)
    one, many = ((gradient(pieces) - exact).abs().max() / exact.abs().max() for pieces in (1, 128))
    assert one < 2**-7 < many < 2**-5  # docs/training.md: 0.4 and 1.8% of the largest


@pytest.mark.parametrize("changes", [{}, {"expert_parallel": 2}])
def test_gathered_in_bfloat16(two: ranks.Group, changes: dict[str, Any]) -> None:
    """All but what decides which experts and keys are chosen; the sums of gradients are float32."""
    for read in two.ask(dtypes_in_a_pass, "v32", settings("adapt", **changes)):
        if "expert_parallel" in changes:  # experts are gathered by themselves, within their layer
            read = {name: dtype for name, dtype in read.items() if not name.startswith("mlp.experts.")}
        exact = {name for name, dtype in read.items() if dtype == torch.float32}
        index = "self_attn.indexer"
        assert exact == {
            "mlp.gate.weight", f"{index}.weights_proj.weight", f"{index}.k_norm.weight", f"{index}.k_norm.bias"
        }  # fmt: skip
        assert {dtype for name, dtype in read.items() if name not in exact} == {torch.bfloat16}
        assert {"self_attn.o_proj.weight", "self_attn.indexer.wq_b.weight", "down_proj", "gate_up_proj"} <= read.keys()
