"""The counts of a plan beside what two ranks hold: their parts between steps, and the layers that FSDP gathers."""

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import grouped, models, ranks
from tests.support.training import batch, config
from tokensieve import cost
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.cost.train_memory import GATHERED, Ranks, memory
from tokensieve.train.loop import STAGES
from tokensieve.train.parallelize import divide, shard
from tokensieve.train.stage import StepTotals, options_of

SHARED = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "full"]}
FAMILIES: dict[str, Any] = {
    "v32": lambda: config("v32"),
    "glm": lambda: config("glm", index_topk=16, **SHARED),
    "qwen3_moe_dsa": lambda: grouped.config("qwen3_moe_dsa", tie_word_embeddings=True),
}


def bytes_of_rank(family: str) -> tuple[int, list[int]]:
    """Bytes that this rank holds between steps, and those of the parameters of each FSDP module once it is gathered."""
    run = TrainConfig("adapt", "", "", (PhaseConfig(1, 64, 2),), device="cpu")
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
    """bfloat16 copies of weights, and the most bytes of them that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, StorageWeakRef]] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
            assert result.dtype == torch.bfloat16
            self.made.append((result.numel() * result.element_size(), StorageWeakRef(result.untyped_storage())))
            self.most = max(self.most, self.live())
        return result

    def live(self) -> int:
        return sum(size for size, storage in self.made if not storage.expired())


def copies_of_rank(family: str) -> tuple[int, int, int]:
    """Bytes of bfloat16 copies in a forward and backward pass: the most, those after the forward pass, and all."""
    run = TrainConfig("adapt", "", "", (PhaseConfig(1, 64, 2),), device="cpu", activation_checkpointing=True)
    division, model = divide(run, ranks.HERE[0]), models.ours(FAMILIES[family]()).train()
    model.model.gradient_checkpointing = True
    root, inputs = shard(model, division), batch(1, 64)
    with Copies() as copies, torch.autocast("cpu", torch.bfloat16):  # as a GPU trains
        losses = root(STAGES["adapt"].losses, inputs, StepTotals(64, 64), options_of(STAGES["adapt"], run))
        after = copies.live()
    with copies:
        losses.total.backward()
    return copies.most, after, sum(size for size, _ in copies.made)


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
    assert GATHERED * (tables + last_norm) in gathered
    # A plan takes the largest layer for each of those that are gathered together.
    layers = sorted(size for size in gathered if size and size != GATHERED * (tables + last_norm))
    planned = (held["gathered layers, embedding and head"] - GATHERED * tables) // 2
    assert layers[-1] <= planned
    if shape.index_layers == shape.layers:
        assert layers[-1] == planned


@pytest.mark.parametrize("family", FAMILIES)
def test_autocasts_copies_go_with_their_layer(two: ranks.Group, family: str) -> None:
    """At no time there are more than a plan counts. After the forward pass the head's and the last norm's are left."""
    shape = cost.shape_of(FAMILIES[family]())
    counted = memory(shape, "adapt", Ranks(2), sequences=1, context=64, checkpointing=True)
    planned = {h.name: h.bytes for h in counted}["weights in bfloat16, for products"]
    for most, after, made in two.ask(copies_of_rank, family):
        assert after == 2 * (cost.parameters(shape).head + shape.hidden)
        assert 0 < most <= planned < made / 2
