"""The settings of a server."""

import math
import re
from dataclasses import dataclass

from tokensieve.config import UserError
from tokensieve.model.selection import SELECTORS, resolve
from tokensieve.serve.hosts import is_pattern

DENSE = ":dense"
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class UnknownModel(Exception):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that a client may take. One that sends nothing, or a byte now and then, holds memory and a file.

    head: for a request's first line and headers, counted from the connection's beginning or from the last answer.
    body: for the next part of its body. For the whole body, as long, and a second more for every `body_rate` bytes that
    are there, so that 16 MiB may come over a slow line.
    idle: of silence after an answer before the connection is closed.
    answer: for reading the rest of an answer once the server stops.
    """

    head: float = 20
    body: float = 30
    body_rate: float = 16 * 2**10
    idle: int = 5
    answer: float = 30


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
    allow_origins: origins of other sites, as https://example.com, whose pages may use the server; "*" for any.
    allow_hosts: names, besides localhost, by which the server may be asked; "*.example.com" and "*" are patterns.
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
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    seconds: TimeLimits = TimeLimits()

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

        for origin in self.allow_origins:
            if not ORIGIN.fullmatch(origin):
                raise UserError(
                    f"{origin!r} is no origin; write it as browsers do: https://example.com, without a path"
                )
        for host in self.allow_hosts:
            if not is_pattern(host):
                raise UserError(f"{host!r} is no host; write a name or an address, without scheme and port")

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
