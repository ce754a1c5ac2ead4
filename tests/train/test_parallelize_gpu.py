"""The equality tests of several ranks on GPUs: NCCL, our kernels, and bfloat16 under autocast.

A step of several GPUs is compared with that of one, from the same weights and packs. Products are the same there up to
the order of sums in bfloat16, and a rounding may send a token to another expert or select another key. So gradients are
compared as wholes, and not number by number: by how far they are apart, relative to their length.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import grouped, models, ranks
from tests.support.steps import ROWS, SHARED, outcome, settings
from tests.support.training import batch, config, cut
from tokensieve.config import TrainConfig
from tokensieve.mesh import Mesh
from tokensieve.train import parallelize
from tokensieve.train.parallelize import divide

pytestmark = pytest.mark.gpu

# Widths that every kernel takes.
WIDTHS = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 1024}
LATENT = WIDTHS | {"num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": 128}
LATENT |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 128}
INDEX = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 64}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "index_rope_head_dim": 64}
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32", **LATENT | INDEX),
    "glm": lambda: config("glm", **LATENT | INDEX | SHARED),
    "qwen3_dsa": lambda: grouped.config("qwen3_dsa", **WIDTHS | HEADS | INDEX),
}
LENGTH = 512
LOSS = 5e-3  # relative: bfloat16 has 8 bits, and a loss is a mean over hundreds of queries
APART = 0.1  # of a gradient's length; 0.3 to 3% on a CPU under autocast, and a kernel may sum in another order
QUICK = [
    ("v32", "warmup", 2, 1),
    ("v32", "adapt", 2, 1),
    ("glm", "warmup", 2, 1),
    ("qwen3_dsa", "adapt", 2, 1),
    ("v32", "adapt", 1, 1),
    ("v32", "pretrain", 2, 1),
    ("glm", "warmup", 1, 2),
    ("v32", "adapt", 2, 2),
]


def why_not(count: int) -> pytest.MarkDecorator:
    there = torch.cuda.device_count()
    return pytest.mark.skipif(there < count, reason=f"needs {count} CUDA devices, and there are {there}")


def on_gpu(family: str, run: TrainConfig, mesh: Mesh, own: slice) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The gradients and figures of a step of this rank's micro-batches, `own`."""
    rows = cut(batch(ROWS, LENGTH, documents=True), ROWS)
    found, figures = outcome(run, models.ours(FAMILIES[family]()), rows[own], mesh)
    return {name: parallelize.whole(g).float().cpu().numpy() for name, g in found.items()}, figures


def step_of_gpu(family: str, run: TrainConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    division = divide(run, ranks.HERE[0])
    return on_gpu(family, run, ranks.HERE[0], slice(division.shard, None, division.shards))


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12))


def check(group: ranks.Group, family: str, run: TrainConfig) -> None:
    whole = replace(run, context_parallel=1, expert_parallel=1)
    expected, figures = on_gpu(family, whole, Mesh(0, 1, torch.device("cuda", 0)), slice(None))
    answers = group.ask(step_of_gpu, family, run)
    for found, reported in answers:
        assert found.keys() == expected.keys()
        for name in figures.keys() & {"loss", "lm", "kl"}:
            assert reported[name] == pytest.approx(figures[name], rel=LOSS), name
        for part in (".indexer.", ""):  # as they are clipped
            names = [n for n in expected if (".indexer." in n) == bool(part) and not n.endswith("correction_bias")]
            if names:
                both = [np.concatenate([values[n].ravel() for n in names]) for values in (found, expected)]
                assert apart(*both) < APART, part
    for found, _ in answers[1:]:  # a gradient is one, of which all ranks have parts
        assert all((found[name] == answers[0][0][name]).all() for name in found)


@pytest.fixture(scope="module")
def two_gpus() -> Any:
    with ranks.started(2, "cuda") as group:
        yield group


@pytest.fixture(scope="module")
def four_gpus() -> Any:
    with ranks.started(4, "cuda") as group:
        yield group


@why_not(2)
@pytest.mark.parametrize(("family", "stage", "sharing", "dividing"), QUICK)
def test_a_step_of_two_gpus(two_gpus: ranks.Group, family: str, stage: str, sharing: int, dividing: int) -> None:
    check(two_gpus, family, settings(stage, sharing, length=LENGTH, device="cuda", expert_parallel=dividing))


@why_not(4)
@pytest.mark.parametrize(("family", "stage", "sharing", "dividing"), QUICK)
def test_a_step_of_four_gpus(four_gpus: ranks.Group, family: str, stage: str, sharing: int, dividing: int) -> None:
    check(four_gpus, family, settings(stage, sharing, length=LENGTH, device="cuda", expert_parallel=dividing))
