"""Registers ops with PyTorch. An `Op` is up to four registrations: the op, its fake implementation, its backward, and
the backward's fake implementation.

The bodies pick a backend and call it. The mathematics is in `reference/` and its faster siblings, the rows are in
`table.py`, the public signatures and their meaning in `__init__.py` and `paged.py`. A backward is an op too, so that
torch.compile sees through it.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from tokensieve.ops.dispatch import pick
from tokensieve.ops.eager import can_skip_registry, without_autocast

WRITTEN = re.compile(r"\(\w!\)")  # PyTorch's mark of an argument that is written to


def _full_precision(body: Callable[[tuple[Any, ...]], Any]) -> Callable[..., Any]:
    """`body` without autocast: an op chooses its own precision, whatever autocast the model runs under."""

    def run(*inputs: Any) -> Any:
        x = inputs[0]
        if x.is_cuda:  # a Triton kernel is launched on the current device, wherever its tensors are
            with torch.cuda.device_of(x), without_autocast(x):
                return body(inputs)
        with without_autocast(x):
            return body(inputs)

    return run


def _as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


class Op:
    """The op `tokensieve::NAME`, called as `op(*arguments, backend)`, all tensors on the device of the first one.

    schema: name, arguments and results in PyTorch's notation, without `str backend`, which every op takes last.
        Integers are SymInt.
    outputs: takes the arguments and returns empty results of the right shapes and dtypes.
    gradients: names of the arguments that have a gradient. All other tensors are detached.
    saved: names of the results that the backward reads.
    optional: names of the results whose gradient the backward takes as None if nothing depends on them. For the others
        it is zeros then.

    A backend has a function NAME(*arguments). If there are `gradients`, it also has NAME_backward(*gradients of the
    results, *saved results, *arguments), which returns them.
    """

    def __init__(
        self, schema: str, outputs: Callable[..., Any], *, gradients: str = "", saved: str = "", optional: str = ""
    ) -> None:
        signature, results = schema.split(" -> ")
        self.name, arguments = signature.removesuffix(")").split("(", 1)
        kinds, self.names = zip(*(argument.split() for argument in arguments.split(", ")), strict=True)
        self.outputs = outputs
        self.tensors = tuple(i for i, kind in enumerate(kinds) if kind.startswith("Tensor"))
        self.gradients = tuple(self.names.index(name) for name in gradients.split())
        self.detached = tuple(i for i in self.tensors if i not in self.gradients)
        self.results = re.findall(r"Tensor (\w+)", results)
        self.saved = tuple(self.results.index(name) for name in saved.split())
        self.optional = tuple(self.results.index(name) for name in optional.split())
        definition = custom_op(
            f"tokensieve::{self.name}",
            _full_precision(self.compute),
            mutates_args=[name for name, kind in zip(self.names, kinds, strict=True) if WRITTEN.search(kind)],
            schema=f"({arguments}, str backend) -> {results}",
        )
        definition.register_fake(lambda *inputs: outputs(*inputs[:-1]))
        if gradients:
            self.register_backward(arguments)
            definition.register_autograd(self.backward, setup_context=self.setup_context)
        self.registered = getattr(torch.ops.tokensieve, self.name).default

    def __call__(self, *inputs: Any) -> Any:
        """The results, straight from the backend if possible: decode on the CPU cannot afford the registry."""
        if can_skip_registry(inputs[0]):
            return self.compute(inputs)
        for i in self.detached:
            if inputs[i] is not None and inputs[i].requires_grad:
                inputs = (*inputs[:i], inputs[i].detach(), *inputs[i + 1 :])
        return self.registered(*inputs)

    def compute(self, inputs: tuple[Any, ...]) -> Any:
        backend = pick(self.name, inputs[0], inputs[-1], dict(zip(self.names, inputs)))
        return getattr(backend, self.name)(*inputs[:-1])

    def differentiate(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The gradients, from the results' gradients, the saved results, and what the op itself takes."""
        forward = inputs[len(self.results) + len(self.saved) :]
        backend = pick(self.name, forward[0], forward[-1], dict(zip(self.names, forward)))
        return getattr(backend, f"{self.name}_backward")(*inputs[:-1])

    def register_backward(self, arguments: str) -> None:
        received = [f"Tensor{'?' if i in self.optional else ''} d_{name}" for i, name in enumerate(self.results)]
        received += [f"Tensor {self.results[i]}" for i in self.saved]
        returned = ", ".join(["Tensor"] * len(self.gradients))
        begin = len(received)  # of what the op itself takes
        definition = custom_op(
            f"tokensieve::{self.name}_backward",
            _full_precision(self.differentiate),
            mutates_args=(),
            schema=f"({', '.join(received)}, {arguments}, str backend) -> ({returned})",
        )
        definition.register_fake(
            lambda *inputs: tuple(inputs[begin + i].new_empty(inputs[begin + i].shape) for i in self.gradients)
        )
        self.registered_backward = getattr(torch.ops.tokensieve, f"{self.name}_backward").default

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        results = _as_tuple(output)
        ctx.save_for_backward(*(inputs[i] for i in self.tensors), *(results[i] for i in self.saved))
        ctx.inputs = [
            None if i in self.tensors else x for i, x in enumerate(inputs)
        ]  # `backward` puts the tensors back

    def backward(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, saved = list(ctx.inputs), ctx.saved_tensors
        for i, tensor in zip(self.tensors, saved, strict=False):
            inputs[i] = tensor
        missing = [i for i, gradient in enumerate(gradients) if gradient is None and i not in self.optional]
        if missing:
            results = _as_tuple(self.outputs(*inputs[:-1]))
            gradients = tuple(results[i].zero_() if i in missing else gradient for i, gradient in enumerate(gradients))
        computed = self.registered_backward(*gradients, *saved[len(self.tensors) :], *inputs)
        returned: list[Tensor | None] = [None] * len(inputs)
        for i, gradient in zip(self.gradients, computed, strict=True):
            returned[i] = gradient
        return tuple(returned)
