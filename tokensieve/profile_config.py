"""Settings of a profile, as a frozen dataclass (see `tokensieve.config`)."""

from dataclasses import dataclass

from tokensieve.config import UserError


@dataclass(frozen=True)
class ProfileConfig:
    """`tokensieve profile`: how much it measures, and the thresholds of its recommendation."""

    top_k: tuple[int, ...]  # numbers of selected keys that are tried, ascending
    limit_bytes: int  # of text read for the lengths, and for the texts that are measured
    texts: int  # in which attention is measured, at most
    queries: int  # measured in each layer of each of these texts
    mass: float  # share of the attention's mass that k keys have to hold
    tokens_past_k: float  # share of the tokens that have to see more than k keys
    sharing: float  # share of its mass that a layer may lose by the keys of another one
    utilization: float = 0.4  # of --peak-flops that training reaches
    index_heads: int | None = None  # of a dense model's indexers; None: half as many as query heads
    index_dim: int | None = None  # width of an index head; None: that of a value

    def __post_init__(self) -> None:
        if not self.top_k or min(self.top_k) < 1 or list(self.top_k) != sorted(set(self.top_k)):
            raise UserError(f"top_k is {list(self.top_k)}; give ascending numbers of at least 1, such as [256, 1024]")
        for name in ("limit_bytes", "texts", "queries"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("mass", "tokens_past_k", "sharing", "utilization"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a share from 0 to 1")
