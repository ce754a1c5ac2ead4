"""Settings of sharing indexers, as a frozen dataclass (see `tokensieve.config`)."""

from dataclasses import dataclass

from tokensieve.config import UserError


@dataclass(frozen=True)
class ShareConfig:
    """`tokensieve share`: the texts by whose loss layers are chosen that give up their indexer."""

    context: int  # tokens of a text, more than k
    texts: int

    def __post_init__(self) -> None:
        for name in ("context", "texts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
