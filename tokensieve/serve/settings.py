"""What a server is told when it starts."""

import math
from dataclasses import dataclass

from tokensieve.config import UserError

DENSE = ":dense"


class UnknownModel(Exception):
    """A request names a model that is not served."""


@dataclass(frozen=True)
class ServeConfig:
    """name: the model's id. dense: serve `NAME:dense` too, the same model with attention to every key. mirror: of the answers, the share
    that is given once more with the other kind of attention, after the client has its own, and compared in the log. keys: API keys; none:
    everyone may ask. max_tokens: of an answer; max_prompt_tokens: of a prompt; 0: as many as the engine has
    room for. max_body: bytes of a request."""

    name: str
    dense: bool = True
    mirror: float = 0.0
    keys: tuple[str, ...] = ()
    max_tokens: int = 0
    max_prompt_tokens: int = 0
    max_body: int = 16 * 2**20

    def __post_init__(self) -> None:
        if not (0 <= self.mirror <= 1) or math.isnan(self.mirror):
            raise UserError(f"mirror is {self.mirror}; it is a share between 0 and 1")
        if self.max_tokens < 0 or self.max_prompt_tokens < 0 or self.max_body < 1:
            raise UserError("max_tokens and max_prompt_tokens must be 0 or more, max_body at least 1")
        if any(not key or key != key.strip() or not key.isascii() for key in self.keys):
            raise UserError("an API key is empty, not ASCII, or has spaces around it; give another one")

    @property
    def models(self) -> tuple[str, ...]:
        return (self.name, self.name + DENSE) if self.dense else (self.name,)

    def selection_of(self, model: str) -> str:
        """Who selects keys for a model of this id."""
        if model not in self.models:
            raise UnknownModel(f"there is no model {model!r}; there is {' and '.join(self.models)}")
        return "dense" if model == self.name + DENSE else "indexer"
