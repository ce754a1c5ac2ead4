"""Options of one forward pass, the context that its layers read, and the results that they return.

Nothing about a pass is kept on the model. A caller passes `ForwardOptions` with the call. For code that calls the model
by itself (generation, trainers), the caller opens a `with_options` block around it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch.nn as nn
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.entries import Entries
from tokensieve.model.gathered import ContextGroup
from tokensieve.model.indexer import IndexInputs
from tokensieve.model.kl import ALL_QUERIES, KLQueries, Objective
from tokensieve.model.pack import Pack
from tokensieve.model.rope import Rotation
from tokensieve.model.selection import SelectionContext, Selector, resolve

Form = Literal["auto", "masked", "gathered"]
"""How attention reads its keys. masked: makes keys and values of every head over the whole range and masks those that
are not selected. gathered: reads the entries of the selected keys alone. auto: whichever costs less."""

Trace = Callable[[SelectionContext, Tensor | None], None]
"""Called with every layer's selection: its context, and the indices or None if attention is dense."""


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How a forward pass runs. None takes the option of an enclosing `with_options` block, else the default.

    The comment behind each field names its default first.
    """

    selector: Selector | None = None  # indexer
    top_k: int | None = None  # index_topk of the config, and its numbers by layer; another one is that of all layers
    form: Form | None = None  # auto
    backend: str | None = None  # auto, of the ops
    objective: Objective | None = None  # none
    yarn: bool | None = None  # True; False: plain frequencies, as a model trains before its context is extended
    context: ContextGroup | None = None  # none; whole rows are given to its ranks, and each returns its own tokens'
    check_selection: bool | None = None  # on the CPU only; True: on a GPU too, waiting for its queue; False: never

    def over(self, outer: "ForwardOptions | None") -> "ForwardOptions":
        """These options, and `outer`'s for each field that is None here."""
        if outer is None:
            return self
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(outer, **values)


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """Inputs of a pass that all of its layers share."""

    pack: Pack
    rotation: Rotation
    entries: Entries
    selector: Selector
    top_k: tuple[int, ...]  # of each layer
    form: Form = "auto"
    backend: str = "auto"
    objective: Literal["none", "warmup", "adapt"] = "none"
    kl_queries: KLQueries = ALL_QUERIES  # the queries that have a KL, of the N
    kl_weight: Tensor | None = None  # of each of these: gradient weight of its KL in every layer
    replay: list[Tensor | None] | None = None  # per layer (N, K) indices to use instead of selecting; None: dense
    keep_indices: bool = False
    check_selection: bool = False
    trace: Trace | None = None
    real: int | None = None  # the first `real` rows are tokens; the others are padding, which no expert sees


class Lent(NamedTuple):
    """What a layer hands to the next one, which may read the same keys.

    indices (N, K): its selection; None: attention was dense. learner: the indexer behind it in warm-up; tensors: its
    q_I, k_I and w in adaptation. A layer that borrows the selection teaches that indexer too.
    """

    indices: Tensor | None = None
    learner: IndexInputs | None = None
    tensors: tuple[Tensor, Tensor, Tensor] | None = None


NOTHING = Lent()


class LayerResult(NamedTuple):
    """Results of a layer beside its hidden states.

    It is a tuple of tensors and tuples, so that hooks on outputs, such as FSDP2's, see its tensors.

    kl (): sum over queries of weight * KL, which carries gradients in warm-up. indices (N, K), if the caller asked for
    them. load_E: tokens sent to each expert. lent: for the next layer alone; the trunk keeps none.
    """

    kl: Tensor | None = None
    indices: Tensor | None = None
    load_E: Tensor | None = None
    lent: Lent = NOTHING


@contextmanager
def filling(
    model: nn.Module, fill: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]], *, prepend: bool = False
) -> Iterator[None]:
    """Within the block `fill(args, kwargs)` adds to the keyword arguments of every pass of `model`, or of a wrapper
    around it, whatever code calls it. Of nested blocks the outermost fills first, or with `prepend` the innermost.

    UserError for a model that is not tokensieve's.
    """
    trunks = [module for module in model.modules() if getattr(module, "takes_forward_options", False)]
    if not trunks:
        raise UserError(f"{type(model).__name__} is no model of tokensieve; load it with tokensieve.load")

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | fill(args, kwargs)

    hooks = [trunk.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True) for trunk in trunks]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def with_options(model: nn.Module, options: ForwardOptions) -> Iterator[None]:
    """Within the block every pass of `model` (or of a wrapper around it) runs with these options.

    Options of the call and of an inner block come first. This works for whatever code calls the model, and leaves
    nothing behind. An engine does not call the model: its requests name their selector (`Request.selector`), and
    `EngineConfig` has top_k and check_selection. UserError for a model that is not tokensieve's.
    """

    def fill(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        from_call = kwargs.get("options") or ForwardOptions()
        return {"options": from_call.over(options)}

    # The innermost block comes first; outer blocks fill in what it leaves open.
    with filling(model, fill, prepend=True):
        yield


@contextmanager
def selecting(
    model: nn.Module, selector: str | Selector, top_k: int | None = None, check: bool | None = None
) -> Iterator[None]:
    """Within the block `model` selects keys by `selector`: a function, its `module:function`, or a name.

    `top_k`: keys per query; not given, or the model's own k: its numbers, layer by layer; else as many in every layer.
    The indices that your own function returns are checked on the CPU; check=True checks them on a GPU too, check=False
    nowhere. UserError for an unknown name, and for top_k < 1.
    """
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; the number of selected keys must be at least 1")
    with with_options(model, ForwardOptions(selector=resolve(selector), top_k=top_k, check_selection=check)):
        yield
