"""The settings of a server."""

import math
from dataclasses import dataclass

from tokensieve.config import UserError
from tokensieve.model.selection import SELECTORS, resolve

DENSE = ":dense"


class UnknownModel(Exception):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, to whom, and within which limits.

    name: the model's id. dense: whether the same model is also served as NAME:dense, with attention to every key (not
    if its own id is served so). selection: who selects keys under the model's own id: a name that
    `tokensieve.selecting` takes, module:function too.
    mirror: share of the answers, between 0 and 1, that are repeated with the other kind of attention once the client
    has its own, and compared in the log. keys: the API keys; without any, anyone may use the server. max_tokens,
    max_prompt_tokens: limits of an answer and of a prompt in tokens; 0: as many as the engine has room for. max_body:
    limit of a request in bytes. playground: whether the page, /lens and /documents are served beside the API.
    Raises UserError for values outside of these ranges, and for a mirror of dense answers that has no other attention.
    """

    name: str
    dense: bool = True
    selection: str = "indexer"
    mirror: float = 0.0
    keys: tuple[str, ...] = ()
    max_tokens: int = 0
    max_prompt_tokens: int = 0
    max_body: int = 16 * 2**20
    playground: bool = True

    def __post_init__(self) -> None:
        if not (0 <= self.mirror <= 1) or math.isnan(self.mirror):
            raise UserError(f"mirror is {self.mirror}; it is a share between 0 and 1")
        if self._selects_nothing and self.mirror:
            raise UserError(
                f"mirror with selection {self.selection} compares dense attention with itself; leave one of them out"
            )
        if self.max_tokens < 0 or self.max_prompt_tokens < 0 or self.max_body < 1:
            raise UserError("max_tokens and max_prompt_tokens must be 0 or more, max_body at least 1")
        if any(not key or key != key.strip() or not key.isascii() for key in self.keys):
            raise UserError("an API key is empty, not ASCII, or has spaces around it; give another one")

    @property
    def _selects_nothing(self) -> bool:
        return resolve(self.selection) is SELECTORS["dense"]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.name, self.name + DENSE) if self.dense and not self._selects_nothing else (self.name,)

    def selector_of(self, model: str) -> str:
        """Who selects keys for this model id. UnknownModel if it is not served."""
        if model not in self.models:
            raise UnknownModel(f"there is no model {model!r}; there is {' and '.join(self.models)}")
        return "dense" if model == self.name + DENSE else self.selection
