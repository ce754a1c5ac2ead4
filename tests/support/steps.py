"""One step of training on several ranks against one process: the models, their packs, and the comparison.

The ranks share a step of ragged packs: parameters are sharded over all of them, and tokens over some.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import grouped, models, ranks
from tests.support.training import OPTIMIZER, VOCAB, apart, batch, config, cut, step_gradients
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM
from tokensieve.train import parallelize, precision
from tokensieve.train.parallelize import divide

ROWS, LENGTH = 4, 48
FREE = replace(OPTIMIZER, clip=1e9, indexer_clip=1e9)
SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32"),
    "glm": lambda: config("glm", index_topk=16, **SHARED),  # layers that share an indexer
    "qwen3_dsa": lambda: grouped.config("qwen3_dsa"),
    "qwen3_moe_dsa": lambda: grouped.config("qwen3_moe_dsa", tie_word_embeddings=True),
    "fp8": lambda: config("v32", index_dtype="fp8", q_lora_rank=None),
    "parted": lambda: config("v32"),
}
WITH_EXPERTS = ("v32", "glm", "qwen3_moe_dsa", "parted")
STAGES = ("warmup", "adapt", "pretrain")


def settings(
    stage: str, context_parallel: int = 1, micro_batch: int = 1, length: int = LENGTH, **changes: Any
) -> TrainConfig:
    phases = (PhaseConfig(4, length, ROWS, micro_batch),)
    made: dict[str, Any] = {"optimizer": FREE, "device": "cpu", "context_parallel": context_parallel}
    return TrainConfig(stage, "", "", phases, **made | changes)


def made(family: str) -> DecoderForCausalLM:
    """A model. The tokens of a "parted" one go to the first half of the experts or to the second, by their half of the
    vocabulary.
    """
    model = models.ours(FAMILIES[family]())
    if family == "parted":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                half = torch.ones(len(parameter), 1)
                half[len(parameter) // 2 :] = -1
                if name.endswith("embed_tokens.weight"):
                    parameter += half
                elif name.endswith("mlp.gate.weight"):
                    parameter += 0.1 * half
    return model


def step(family: str, run: TrainConfig) -> list[dict[str, Tensor]]:
    """Packs whose documents begin at other places in each row, and cross the bounds of all chunks.

    Of a "parted" model the first half of the rows has one half of the vocabulary, and the second half the other.
    """
    phase = run.phases[0]
    whole = batch(ROWS, phase.context, documents=True)
    if family == "parted":
        whole["input_ids"] = whole["input_ids"] % (VOCAB // 2)
        whole["input_ids"][ROWS // 2 :] += VOCAB // 2
    return cut(whole, ROWS // phase.micro_batch)


def outcome(
    run: TrainConfig, model: DecoderForCausalLM, micro: list[dict[str, Tensor]], mesh: Mesh | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients of a step, with the routers' new biases, and its figures."""
    gradients, figures = step_gradients(run, model, micro, mesh)
    biases = {name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")}
    return gradients | biases, figures


@contextmanager
def in_bfloat16(gathered: bool = True) -> Iterator[None]:
    """On a CPU, products as on a GPU. gathered False: parameters are gathered as they are, and autocast rounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "product_dtype", lambda device: torch.bfloat16)
        if not gathered:
            patch.setattr(precision, "gather_policy", lambda dtype, policy=precision.gather_policy: policy(None))
        yield


# in a rank's process


def step_of_rank(family: str, run: TrainConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The whole gradients of a step of all ranks, and its figures."""
    mesh = ranks.HERE[0]
    division = divide(run, mesh)
    own = step(family, run)[division.shard :: division.shards]
    found, figures = outcome(run, made(family), own, mesh)
    return {name: parallelize.whole(g).cpu().numpy() for name, g in found.items()}, figures


# here


def check_step(group: ranks.Group, family: str, run: TrainConfig, step_here: Callable[..., Any] = step_of_rank) -> None:
    """One step's figures and gradients are those of one process. step_here: what a rank is asked."""
    whole = replace(run, context_parallel=1, expert_parallel=1, activation_checkpointing=False)
    expected, figures = outcome(whole, made(family), step(family, run))
    for answer, reported in group.ask(step_here, family, run):
        found = {name: torch.from_numpy(x) for name, x in answer.items()}
        assert apart(found, expected) < 1e-4  # float32 sums in another order
        for name in figures.keys() - {"seconds", "tokens_per_second"}:
            assert reported[name] == pytest.approx(figures[name], rel=1e-5), name
