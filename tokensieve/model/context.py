"""What one forward pass is told, and what its layers answer.

Nothing about a pass is kept on the model. A caller gives `ForwardOptions` with the call, or, for code that calls the model itself (generation,
trainers), opens a `with_options` block around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch.nn as nn
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.entries import Entries
from tokensieve.model.kl import Objective
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rotation
from tokensieve.model.selection import SelectionContext, Selector, resolve

Form = Literal["auto", "masked", "gathered"]
"""How attention reads its keys. masked: keys and values of every head over the whole range, what is not selected is masked. gathered: the
entries of the selected keys alone. auto: whichever costs less."""

Trace = Callable[[SelectionContext, Tensor | None], None]
"""Sees every layer's selection: its context and the indices, None if attention is dense."""


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass runs. None: as an enclosing `with_options` block says, else the default that stands behind each field."""

    selector: Selector | None = None  # indexer
    top_k: int | None = None  # index_topk of the config
    form: Form | None = None  # auto
    backend: str | None = None  # auto, of the ops
    objective: Objective | None = None  # none
    yarn: bool | None = None  # True; False: plain frequencies, as a model trains before its context is extended
    check_selection: bool | None = None  # on the CPU; True: also on a GPU, where it waits for the queue; False: nowhere

    def over(self, outer: "ForwardOptions | None") -> "ForwardOptions":
        """These options, with `outer`'s where these say nothing."""
        if outer is None:
            return self
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(outer, **given)


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """What every layer of one pass reads."""

    pack: Pack
    rotation: Rotation
    entries: Entries
    selector: Selector
    top_k: int
    form: Form = "auto"
    backend: str = "auto"
    objective: Literal["none", "warmup", "adapt"] = "none"
    kl_weight: Tensor | None = None  # (N): gradient weight of each query's KL in every layer
    replay: list[Tensor | None] | None = None  # per layer (N, K) indices to use instead of selecting; None: dense
    keep_indices: bool = False
    check_selection: bool = False
    trace: Trace | None = None
    real: int | None = None  # the first `real` rows are tokens and the others padding, which no expert sees


class LayerResult(NamedTuple):
    """What a layer hands back beside its hidden states. (A tuple, so that hooks on outputs, as FSDP2's, see the tensors in it.)

    kl (): sum over queries of weight * KL, from which gradients flow in warm-up; indices (N, K); load_E: tokens sent to each expert.
    """

    kl: Tensor | None = None
    indices: Tensor | None = None
    load_E: Tensor | None = None


@contextmanager
def with_options(model: nn.Module, options: ForwardOptions) -> Iterator[None]:
    """Within the block every pass of `model` (or of what wraps it) runs with these options, unless the call or an inner block says otherwise.

    Works for whoever calls the model, and leaves nothing behind. UserError for a model that is not tokensieve's.
    """
    trunks = [module for module in model.modules() if getattr(module, "takes_forward_options", False)]
    if not trunks:
        raise UserError(f"{type(model).__name__} is no model of tokensieve; load it with tokensieve.load")

    def fill(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("options") or ForwardOptions()
        return args, kwargs | {"options": given.over(options)}

    # The innermost block comes first, and outer ones fill in what it leaves open.
    hooks = [trunk.register_forward_pre_hook(fill, prepend=True, with_kwargs=True) for trunk in trunks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def selecting(
    model: nn.Module, selector: str | Selector, top_k: int | None = None, check: bool | None = None
) -> Iterator[None]:
    """Within the block `model` selects by `selector` (a function, its `module:function`, or a name), `top_k` keys per query if given.

    What a function of yours returns is checked on the CPU; check=True does so on a GPU too, check=False nowhere. UserError for a name
    that names no selector, and for top_k < 1.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; the number of selected keys must be at least 1")
    with with_options(model, ForwardOptions(selector=resolve(selector), top_k=top_k, check_selection=check)):
        yield
