"""The difficulty at which some answers to a domain's problems pass, but not all: elsewhere GRPO has no signal."""

from collections.abc import Callable
from typing import Any

from tokensieve.posttrain_config import DifficultyConfig


def find_difficulty(
    rate_at: Callable[[int], float], bounds: tuple[int, int, int], config: DifficultyConfig
) -> dict[str, Any]:
    """{"difficulty", "rates": pass rate by difficulty that was measured, "within": whether that of the chosen one is}.

    It goes up from the usual difficulty while the rate is above `high`, and down while it is below `low`. If no rate is
    within them, the difficulty is the one whose rate is closest to them, the lower one of two.

    rate_at: measures one. bounds: the least difficulty, the usual one, and the greatest.
    """
    least, difficulty, most = bounds
    rates: dict[int, float] = {}
    while len(rates) < config.tries and least <= difficulty <= most and difficulty not in rates:
        rate = rates[difficulty] = rate_at(difficulty)
        difficulty += (rate > config.high) - (rate < config.low)
    chosen = min(sorted(rates), key=lambda level: max(config.low - rates[level], rates[level] - config.high, 0.0))
    within = config.low <= rates[chosen] <= config.high
    return {"difficulty": chosen, "rates": {str(level): rates[level] for level in sorted(rates)}, "within": within}
