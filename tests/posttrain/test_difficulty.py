"""The knob between cold start and GRPO: where it goes, where it stops, and what it says if nothing fits."""

from typing import Any

import pytest

from tokensieve.posttrain.difficulty import find_difficulty
from tokensieve.posttrain_config import DifficultyConfig

SETTINGS = DifficultyConfig(prompts=1, samples=1, tries=4)


@pytest.mark.parametrize(
    ("rates", "bounds", "chosen", "measured", "within"),
    [
        ({2: 0.5}, (1, 2, 9), 2, [2], True),
        ({2: 0.9, 3: 0.8, 4: 0.6}, (1, 2, 9), 4, [2, 3, 4], True),
        ({3: 0.0, 2: 0.05, 1: 0.1}, (1, 3, 9), 1, [1, 2, 3], True),
        ({2: 0.0, 1: 0.02}, (1, 2, 9), 1, [1, 2], False),  # the easiest is too hard
        ({8: 1.0, 9: 0.95}, (1, 8, 9), 9, [8, 9], False),  # the hardest is too easy
        ({2: 0.9, 3: 0.05}, (1, 2, 9), 3, [2, 3], False),  # none between: the one that is closer
        ({2: 0.0, 1: 0.0}, (1, 2, 9), 1, [1, 2], False),  # of two that are alike the lower one
        ({5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}, (1, 5, 12), 5, [5, 6, 7, 8], False),  # no more than `tries`
    ],
)
def test_where_it_stops(
    rates: dict[int, float], bounds: tuple[int, int, int], chosen: int, measured: list[int], within: bool
) -> None:
    found: dict[str, Any] = find_difficulty(rates.__getitem__, bounds, SETTINGS)
    assert found == {"difficulty": chosen, "rates": {str(at): rates[at] for at in measured}, "within": within}
