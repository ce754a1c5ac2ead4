"""The choice of the parameters that learn, within a block. Whatever happens in it, the caller's choice is restored."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.nn as nn

from tokensieve.config import UserError

Learners = Literal["all", "indexers", "trunk"]


def is_indexer(name: str) -> bool:
    """Whether a parameter of this name belongs to an indexer. PEFT's frozen original of a copy that learns does not."""
    return ".indexer." in name and ".original_module." not in name


@contextmanager
def learning(model: nn.Module, learners: Learners) -> Iterator[None]:
    """Within the block these parameters require gradients.

    all: those that require them already, and the indexers. indexers: the indexers alone. trunk: those that require them
    already, without the indexers.
    """
    # By module, since FSDP2 replaces the parameters.
    before = [
        (module, name, parameter.requires_grad)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    for name, parameter in model.named_parameters():
        learns = learners != "trunk" if is_indexer(name) else parameter.requires_grad and learners != "indexers"
        parameter.requires_grad_(learns)
    try:
        yield
    finally:
        for module, name, required in before:
            module.get_parameter(name).requires_grad_(required)


def check_indexers(model: nn.Module, objective: str) -> None:
    """UserError for a model without an indexer."""
    if not any(is_indexer(name) for name, _ in model.named_parameters()):
        raise UserError(
            f"{objective} trains indexers and this model has none; make it sparse first: tokensieve sparsify"
        )
