"""The counts of a plan beside what two ranks hold: their parts between steps, and the layers that FSDP gathers."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import grouped, models, ranks
from tests.support.steps import in_bfloat16
from tests.support.training import batch, config
from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.cost.train_memory import GATHERED, Ranks, memory
from tokensieve.train.loop import STAGES
from tokensieve.train.parallelize import divide, shard
from tokensieve.train.stage import StepTotals, backward, options_of

SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32"),
    "glm": lambda: config("glm", index_topk=16, **SHARED),
    "qwen3_moe_dsa": lambda: grouped.config("qwen3_moe_dsa", tie_word_embeddings=True),
}


def bytes_of_rank(family: str) -> tuple[int, list[int]]:
    """Bytes that this rank holds between steps, and those of the parameters of each FSDP module once it is gathered."""
    run = TrainConfig("adapt", "", "", (PhaseConfig(1, 64, 2),), device="cpu")
    with in_bfloat16():
        root = shard(models.ours(FAMILIES[family]()), divide(run, ranks.HERE[0]))
    parts = [p.to_local() for p in root.parameters() if isinstance(p, DTensor)]
    assert len(parts) == len(list(root.parameters()))
    gathered = []
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            gathered.append(sum(p.numel() * p.element_size() for p in root.parameters() if not isinstance(p, DTensor)))
            module.reshard()
    assert all(part.dtype == torch.float32 for part in parts)
    return sum(part.numel() * part.element_size() for part in parts), gathered


class Copies(TorchDispatchMode):
    """Numbers of weights that are copied to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            self.made.append(result.numel())
        return result


def copies_of_rank(family: str, gathered: bool) -> list[int]:
    """Weights that are copied in a forward and backward pass, with layers gathered in bfloat16 or as they are."""
    run = TrainConfig("adapt", "", "", (PhaseConfig(1, 64, 2),), device="cpu", activation_checkpointing=True)
    with in_bfloat16(gathered):
        division, model = divide(run, ranks.HERE[0]), models.ours(FAMILIES[family]()).train()
        model.model.gradient_checkpointing = True
        stage = STAGES["adapt"]
        with Copies() as copies:
            root = shard(model, division)
            backward(stage, root, batch(1, 64), StepTotals(64, 64), options_of(stage, run), division.mesh.device)
    return copies.made


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(two: ranks.Group, family: str) -> None:
    made = FAMILIES[family]()
    shape = cost.shape_of(made)
    counted = memory(shape, "adapt", Ranks(2), sequences=1, context=64, checkpointing=True)
    held = {h.name: h.bytes for h in counted}
    answers = two.ask(bytes_of_rank, family)
    buffers = 4 * shape.moe_layers * shape.experts * shape.router_bias  # the routers' biases, which every rank has
    assert sum(size for size, _ in answers) == 2 * held["weights, float32"] - buffers
    _, gathered = answers[0]
    tables = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    last_norm = shape.hidden
    exact = shape.hidden * (shape.index_layers * shape.index_heads + shape.moe_layers * shape.experts)
    exact += 2 * shape.index_layers * shape.index_dim
    of_roots = 4 * exact, GATHERED * (tables + last_norm)
    assert all(size in gathered for size in of_roots)
    # A plan takes the largest layer for each of those that are gathered together.
    layers = sorted(size for size in gathered if size and size not in of_roots)
    planned = (held["gathered layers, embedding and head"] - GATHERED * tables - 4 * exact) // 2
    assert layers[-1] <= planned
    if shape.index_layers == shape.layers:
        assert layers[-1] == planned


@pytest.mark.parametrize("family", FAMILIES)
def test_no_copies_stand_beside_what_is_gathered(two: ranks.Group, family: str) -> None:
    """Autocast would copy all linear layers of a model that is gathered in float32."""
    assert not any(two.ask(copies_of_rank, family, True))
    assert all(len(copies) > 20 for copies in two.ask(copies_of_rank, family, False))
