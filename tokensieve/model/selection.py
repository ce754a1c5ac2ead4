"""Selectors, the plug-in: functions from one layer's queries and keys to the positions that its attention may read.

Legend: N query tokens, T keys, H heads, D key width, K selected keys.

There is one contract, `SelectionContext`. The same function runs in training, `generate`, the engine, the server and
evaluation, on contiguous keys and on pages. The model's own selector is `indexer`, equation (2). The others here are
the controls that every evaluation puts beside it. A selector of your own, for instance the indexer's choice and the
last 64 tokens:

    from tokensieve.model.selection import indexer, join, window

    def with_recent(c):
        return join(indexer(c), window(c, 64))

    with tokensieve.selecting(model, with_recent): ...

On the command line its name is `module:function` (`--selection my_module:with_recent`). A selector with
options is a frozen dataclass that can be called, and is written as in Python: `tokensieve.selectors:Recent(last=64)`.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import dacite
import torch
from torch import Tensor

from tokensieve.config import SELECTOR_NAMES, UserError, check_selector
from tokensieve.importing import named_object
from tokensieve.model.entries import Keys
from tokensieve.model.indexer import IndexInputs
from tokensieve.model.rope import Rows, taken

BLOCK = 256  # queries for which a control holds whole rows of scores or probabilities at a time


class HeadGroup:
    """The ranks that share the heads of a model. This class is the group of a model that is not divided."""

    def select(self, queries: int, choose: "Callable[[Rows], Tensor | None]") -> Tensor | None:
        """Indices (queries, K), the same on all ranks. Each rank chooses for some of the queries by `choose(rows)`."""
        return choose(None)

    def all_heads(self, q_NHD: Tensor) -> Tensor:
        """The queries of every rank's heads."""
        return q_NHD


ONE_GROUP = HeadGroup()


class ScoresError(UserError, ValueError):
    """Scores of which no key is the best, such as NaN. A ValueError as that of the ops, for which training looks."""


class Once:
    """A computation that runs when its result is first asked for, with gradients if they were on when it was made.

    Selectors ask without gradients, and attention may read the same result with them. Each layer makes one, for which
    functools.cache costs too much.
    """

    __slots__ = ("_compute", "_grad", "_result")

    def __init__(self, compute: Callable[[], Any]):
        self._compute, self._grad, self._result = compute, torch.is_grad_enabled(), None

    def __call__(self) -> Any:
        if self._result is None:
            if self._grad == torch.is_grad_enabled():
                self._result = self._compute()
            else:
                with torch.set_grad_enabled(self._grad):
                    self._result = self._compute()
        return self._result


class SelectionContext:
    """The input of a selector: queries of one layer, and the keys that they may see.

    layer: its index. layers: how many the model has. k: the most keys to select per query in this layer, which may be
    more than a query sees. starts_N, ends_N (int32): each query may see the keys [start, end). Positions count along
    the packed keys of the pass, or on pages from each sequence's own beginning; a selector that keeps to [start, end),
    as `topk` and `select` do, need not know which. before (N, K): what the layer before reads, which a selector may
    read again; None in the first layer, and behind one that attends to every key. divided: whether ranks divide the
    model, so that each chooses for some of the queries: then K and None must not depend on values. Everything is
    computed only if it is used.
    """

    def __init__(
        self,
        layer: int,
        layers: int,
        k: int,
        keys: Keys,
        index: IndexInputs | None,
        attention: Callable[[], tuple[Tensor, float]],
        before: Tensor | None = None,
        divided: bool = False,
        rows: Rows = None,
    ):
        """attention: returns the main attention's queries (N, H, D), all heads in the entries' form, and its scale."""
        self.layer, self.layers, self.k, self.keys = layer, layers, k, keys
        self._index, self._attention, self._before, self._rows = index, attention, before, rows
        self.divided = divided
        self.starts_N, self.ends_N = taken(keys.starts_N, rows), taken(keys.ends_N, rows)

    @property
    def before(self) -> Tensor | None:
        """(N, K) int32, ascending, then -1: what the layer before reads."""
        return None if self._before is None else taken(self._before, self._rows)

    def __len__(self) -> int:
        return self.ends_N.shape[0]

    def rows(self, rows: slice | Tensor) -> "SelectionContext":
        """The context of some of these queries: a slice, or their indices (int64)."""
        if self._rows is not None:
            numbers = torch.arange(self.keys.ends_N.shape[0], device=self.ends_N.device)
            rows = numbers[self._rows][rows]
        return SelectionContext(
            self.layer, self.layers, self.k, self.keys, self._index, self._attention, self._before, self.divided, rows
        )

    def blocks(self) -> "Iterator[SelectionContext]":
        """These queries in blocks of at most 256, for selectors that read whole rows of scores or probabilities."""
        return (self.rows(slice(a, a + BLOCK)) for a in range(0, len(self), BLOCK))

    @property
    def index_queries(self) -> tuple[Tensor, Tensor]:
        """q_I (N, H_I, d_I) and w (N, H_I) of equation (1). UserError on a model without an indexer."""
        if self._index is None:
            raise UserError("this model has no indexer to select with; make it sparse first: tokensieve sparsify")
        return self._index.queries(self._rows, self.keys.quantized_index)

    @property
    def attention_queries(self) -> tuple[Tensor, float]:
        """Queries (N, H, D) of the main attention, in the form that reads cached entries, and the softmax scale."""
        q, scale = self._attention()
        return taken(q, self._rows), scale

    def scores(self) -> Tensor:
        """Index scores (N, T) float32 of equation (1), unspecified outside a range. UserError without an indexer."""
        return self.keys.index_scores(*self.index_queries, self._rows)

    def head_mass(self) -> Tensor:
        """p (N, T) float32: the mean over heads of dense attention's probabilities; 0 outside a query's range."""
        return self.keys.head_mass(*self.attention_queries, self._rows)

    def topk(self, k: int | None = None) -> Tensor:
        """The k keys with the largest index scores, equation (2): (N, k) int32, ascending, then -1.

        The scores need not fit in memory. k: self.k unless given. UserError without an indexer, and for k < 1.
        """
        with self._naming_layer("NaN"):
            return self.keys.index_topk(*self.index_queries, self.columns(k), self._rows)

    def topk_blocks(self, block: int, blocks: int, k: int | None = None) -> Tensor:
        """As `topk`, among the keys of the best `blocks` blocks of `block` keys: `tokensieve.ops.index_topk_blocks`."""
        with self._naming_layer("NaN"):
            return self.keys.index_topk_blocks(*self.index_queries, self.columns(k), block, blocks, self._rows)

    def select(self, scores_NT: Tensor, k: int | None = None) -> Tensor:
        """The k keys with the largest of your own scores (N, T): (N, k) int32, ascending, then -1.

        Ties go to the smaller position. k: self.k unless given. UserError for k < 1, for scores of another shape, and
        on the CPU for NaN.
        """
        if not isinstance(scores_NT, Tensor) or scores_NT.dim() != 2 or len(scores_NT) != len(self):
            found = tuple(scores_NT.shape) if isinstance(scores_NT, Tensor) else type(scores_NT).__name__
            raise UserError(
                f"a selector gave {found} as scores in layer {self.layer}; select takes ({len(self)}, T), as c.scores()"
            )
        with self._naming_layer(""):
            return self.keys.select(scores_NT, self.columns(k), self._rows)

    @contextmanager
    def _naming_layer(self, word: str) -> Iterator[None]:
        """ScoresError instead of a ValueError of the ops whose message has `word`."""
        try:
            yield
        except ValueError as error:
            if word not in str(error):
                raise
            raise ScoresError(f"layer {self.layer}: {error}") from error

    def columns(self, k: int | None = None) -> int:
        """Columns for k keys of a query, self.k unless given. UserError for k < 1, and for what is no whole number."""
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise UserError(
                f"a selector asked for k = {k!r} keys in layer {self.layer}; give a whole number (int) of at least 1"
            )
        return self.keys.columns(self.k if k is None else k)


Selector = Callable[[SelectionContext], Tensor | None]
"""Returns (N, K) int32 positions, ascending and without duplicates, then -1; None to attend to every key. K is free,
and the same for all queries of a call. A query's choice may depend on its own scores and range only. On a GPU, looking
at values stops the queue; if ranks divide the model, K and None must not depend on them."""


def indexer(c: SelectionContext) -> Tensor:
    """The k keys with the largest index score: equation (2)."""
    return c.topk()


def window(c: SelectionContext, width: int | None = None) -> Tensor:
    """The last `width` keys, k unless given, as a sliding window reads them. UserError for width < 1."""
    width = c.columns(width)
    starts, ends = c.starts_N[:, None], c.ends_N[:, None]
    position = torch.maximum(starts, ends - width) + torch.arange(width, device=starts.device, dtype=torch.int32)
    return torch.where(position < ends, position, -1).to(torch.int32)


FIRST = 4  # keys at the beginning that attention falls back on: attention sinks


def sinks(c: SelectionContext) -> Tensor:
    """The first 4 keys that a query may see, and the last k - 4: a sliding window that keeps its attention sinks.

    UserError for k of 4 or less. Source: Xiao et al., arXiv 2309.17453.
    """
    if c.k <= FIRST:
        raise UserError(f"sinks selects the first {FIRST} keys and some of the last; k = {c.k} is too few for both")
    width = c.keys.columns(c.k)
    starts, ends = c.starts_N[:, None], c.ends_N[:, None]
    column = torch.arange(width, device=starts.device, dtype=torch.int32)
    last = torch.where(column < FIRST, starts, ends - width)
    position = torch.maximum(starts, last) + column
    return torch.where(position < ends, position, -1).to(torch.int32)


def oracle(c: SelectionContext) -> Tensor:
    """The k keys with the most probability in dense attention, averaged over heads. A reference, not an upper bound."""
    return torch.cat([block.select(block.head_mass()) for block in c.blocks()])


def dense(c: SelectionContext) -> None:
    """No selection: the model attends to every key."""
    return None


def join(a_NK: Tensor, b_NK: Tensor) -> Tensor:
    """The union of two index sets per query: (N, K_a + K_b) int32, ascending and without duplicates, then -1.

    Both are as selectors return them. No value is copied to the host, so a GPU's queue does not stop. UserError for
    anything but two sets of the same queries, such as None.
    """
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (a_NK, b_NK)]
    if any(isinstance(shape, str) or len(shape) != 2 for shape in shapes) or len(a_NK) != len(b_NK):
        raise UserError(
            f"join got {shapes[0]} and {shapes[1]}; give two sets (N, K) of the same queries (c.before is None in the "
            "first layer, and behind dense attention)"
        )
    last = torch.iinfo(torch.int32).max
    union = torch.cat((a_NK, b_NK), dim=1).to(torch.int32)
    union = union.masked_fill(union < 0, last).sort(dim=1).values
    duplicates = torch.zeros_like(union, dtype=torch.bool)
    duplicates[:, 1:] = union[:, 1:] == union[:, :-1]
    union = union.masked_fill(duplicates, last).sort(dim=1).values
    return union.masked_fill(union == last, -1)


SELECTORS: Mapping[str, Selector] = MappingProxyType(
    dict(zip(SELECTOR_NAMES, (indexer, window, sinks, oracle, dense), strict=True))
)


def resolve(selector: str | Selector) -> Selector:
    """A selector by its name, `module:function` or `module:Dataclass(options)`; a function is returned as it is.

    UserError for an unknown name, and for options that are not literals, that the selector does not take, or that are
    given to anything but a dataclass.
    """
    if not isinstance(selector, str):
        return selector
    if selector in SELECTORS:
        return SELECTORS[selector]
    module, _, called = check_selector(selector).partition(":")
    name, options = _parsed(selector, called)
    target = named_object(f"selection {selector}", module, name)
    if not callable(target):
        raise UserError(f"selection {selector}: {name} is not callable")
    if options is None:
        if isinstance(target, type):
            raise UserError(f"selection {selector}: {name} has options; write {module}:{name}(...)")
        return target
    # Whatever else takes literals, such as a function of the operating system, is not called.
    if not (isinstance(target, type) and is_dataclass(target)):
        raise UserError(f"selection {selector}: options are for a selector that is a dataclass, and {name} is none")
    known = [field.name for field in fields(target)]
    by_place, by_name = options
    given = dict(zip(known, by_place, strict=False)) | by_name
    if len(given) < len(by_place) + len(by_name) or not {*given} <= {*known}:
        raise UserError(f"selection {selector}: the options of {name} are {', '.join(known)}, each at most once")
    try:
        built: Any = dacite.from_dict(target, given, dacite.Config(cast=[tuple, float]))
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise UserError(f"selection {selector}: {' '.join(str(error).split())}; correct the option") from error
    if not callable(built):
        raise UserError(f"selection {selector}: {name} is not callable")
    return built


def _parsed(selector: str, called: str) -> tuple[str, tuple[list[Any], dict[str, Any]] | None]:
    """The dotted name in `name` or `name(options)`, and the options, which are literals of Python."""
    name, bracket, _ = called.partition("(")
    if not bracket:
        return called, None
    wrong = UserError(f"selection {selector}: write options as in Python, for instance {name}(layers=[1, 2])")
    try:
        call = ast.parse(called, mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != name:
            raise wrong
        if any(keyword.arg is None for keyword in call.keywords):
            raise wrong
        by_place = [ast.literal_eval(value) for value in call.args]
        return name, (by_place, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, ValueError, TypeError) as error:
        raise wrong from error


def is_own(selector: Selector) -> bool:
    """Whether the selector is one of `SELECTORS`, which all keep to the contract."""
    return selector in SELECTORS.values()


def name_of(selector: Selector) -> str:
    """A selector's name in messages: that of the function, or of the class."""
    return getattr(selector, "__name__", type(selector).__name__)


def check_indices(selector: Selector, c: SelectionContext, indices_NK: Any) -> None:
    """UserError, naming the query, if a selector broke its contract.

    It may not return another shape or dtype, a key that its query may not see, a key twice, positions that do not
    ascend, or no key at all for a query that sees some: attention would be 0 there. The check reads values, so a GPU's
    queue stops for it.
    """
    name = name_of(selector)
    if not isinstance(indices_NK, Tensor) or indices_NK.dim() != 2 or indices_NK.shape[0] != len(c):
        result = tuple(indices_NK.shape) if isinstance(indices_NK, Tensor) else type(indices_NK).__name__
        raise UserError(f"selection {name} returned {result} in layer {c.layer}; return ({len(c)}, K) int32 positions")
    if indices_NK.shape[1] < 1:
        raise UserError(f"selection {name} returned no key in layer {c.layer}; return at least one column")
    if indices_NK.device != c.ends_N.device or indices_NK.layout != torch.strided:
        found = f"a {indices_NK.layout} on {indices_NK.device}"
        raise UserError(f"selection {name} returned {found} in layer {c.layer}; make it dense, on {c.ends_N.device}")
    if indices_NK.dtype not in (torch.int32, torch.int64):
        raise UserError(f"selection {name} returned {indices_NK.dtype} in layer {c.layer}; return int32 positions")
    used = indices_NK >= 0
    unseen = ((indices_NK < c.starts_N[:, None]) | (indices_NK >= c.ends_N[:, None])) & used
    before, after = indices_NK[:, :-1], indices_NK[:, 1:]
    disorder = (after <= before) & used[:, 1:]  # -1 in front of a position is disorder too
    disorder |= used[:, 1:] & ~used[:, :-1]
    for wrong, reason in (
        ((indices_NK < -1).any(1), "a negative position other than -1"),
        (unseen.any(1), "a key that its query may not see: outside of [starts, ends)"),
        (disorder.any(1), "positions that do not ascend, or a key twice; join() puts sets in order"),
        (~used.any(1) & (c.starts_N < c.ends_N), "no key, though it sees some; give each query at least one"),
    ):
        if bool(wrong.any()):
            raise UserError(f"selection {name} gave query {int(wrong.nonzero()[0])} of layer {c.layer} {reason}")
