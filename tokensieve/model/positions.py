"""The positions that a model knows."""

from tokensieve.config import UserError


def check_positions(limit: int, tokens: int, what: str, remedy: str) -> None:
    """UserError if `tokens` are past the model's `limit` positions.

    what: begins the message, verb included, such as "prompts of 4096 tokens are". remedy: ends it.
    """
    if tokens > limit:
        raise UserError(f"{what} past the model's {limit} positions; {remedy}")
