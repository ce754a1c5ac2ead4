"""The recommendation on made-up figures: the answers, and a reason for each."""

from dataclasses import replace

import pytest

from tokensieve.config import UserError, load_config
from tokensieve.evals.intervals import Estimate
from tokensieve.profile.advice import Advice, advise, share_groups
from tokensieve.profile.crossover import Crossover
from tokensieve.profile_config import ProfileConfig

SETTINGS = ProfileConfig((256, 512, 1024), 1, 1, 1, mass=0.9, tokens_past_k=0.5, sharing=0.05)
MASS = {256: (0.85, 12), 512: (0.92, 12), 1024: (0.97, 9)}
CHEAPER = Crossover(1000, 1500, 4000)


def advice(
    mass: dict[int, tuple[float, int]] = MASS,
    past: float = 0.8,
    cheaper: Crossover = CHEAPER,
    half: float = 0.01,
    loss: float = 0.2,
    positions: int = 32768,
) -> Advice:
    """past: share of tokens that see more than any k up to 4,000 keys. half: that of the interval around each mass."""
    found = {
        k: Estimate(v, v - half, v + half, n) if n > 1 else Estimate(v, None, None, n) for k, (v, n) in mass.items()
    }
    share = lambda position: past if position <= 4000 else past / 2  # noqa: E731
    return advise(found, share, lambda k: cheaper, lambda k, i, j: loss * (j - i), 4, positions, SETTINGS)


CASES = [
    ("all is well", {}, ("sparse", 512, 4000), {"top_k": "the best 256 only 0.850 (0.840 to 0.860)"}),
    ("the smallest holds enough", {"mass": MASS | {256: (0.95, 9)}}, ("sparse", 256, 4000), {"top_k": "none smaller"}),
    ("within noise", {"half": 0.05}, ("sparse", 512, 4000), {"top_k": "the interval reaches below"}),
    ("one text", {"mass": {512: (0.92, 1)}}, ("sparse", 512, 4000), {"top_k": "one has no interval"}),
    ("short data", {"past": 0.3}, ("dense", 512, 4000), {"verdict": "mostly shorter than k = 512: 30% of its tokens"}),
    ("no text is long", {"mass": {256: (1.0, 0)}}, ("dense", None, None), {"verdict": "no text has more than 256"}),
    ("spread", {"mass": {256: (0.2, 9), 512: (0.3, 9), 1024: (1.0, 0)}}, ("dense", None, None),
     {"verdict": "the best 512 keys, the most that could be tried, hold 0.300 (0.290 to 0.310)"}),
    ("never cheaper", {"cheaper": Crossover(1000, None, 4000)}, ("dense", 512, None), {"verdict": "FLOPs never"}),
    ("past the positions", {"positions": 2048}, ("dense", 512, 4000), {"verdict": "the model's 2,048 positions"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected", "reasons"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_answers(given: dict, expected: tuple, reasons: dict[str, str]) -> None:
    found = advice(**given)
    assert (found.verdict, found.top_k, found.dense_below) == expected
    for part, words in reasons.items():
        assert words in found.reasons[part], found.reasons[part]
    parts = {"verdict", "top_k", "dense_below", "groups"} if found.verdict == "sparse" else {"verdict"}
    assert set(found.reasons) - {"top_k"} == parts - {"top_k"} and ("top_k" in found.reasons) == (
        expected[1] is not None
    )


def test_no_text_reaches_the_crossover() -> None:
    figures = {512: Estimate(0.92, 0.91, 0.93, 5)}
    found = advise(figures, lambda n: float(n < 600), lambda k: CHEAPER, lambda k, i, j: 1.0, 4, 32768, SETTINGS)
    assert found.verdict == "dense" and "no text reaches the 4,000 tokens" in found.reasons["verdict"]


@pytest.mark.parametrize(
    ("loss", "groups"),
    [
        (0.2, [[0], [1], [2], [3], [4], [5]]),
        (0.02, [[0, 1, 2], [3, 4, 5]]),  # the third layer loses 0.06
        (0.0, [[0, 1, 2, 3], [4, 5]]),  # no more than four are tried together
    ],
)
def test_groups_are_judged_by_their_first_layer(loss: float, groups: list[list[int]]) -> None:
    assert share_groups(6, lambda source, layer: loss * (layer - source), 0.05) == groups


def test_groups_have_a_reason() -> None:
    assert "every layer loses more than 5%" in advice(loss=0.2).reasons["groups"]
    found = advice(loss=0.03)
    assert found.groups == [[0, 1], [2, 3]] and "2 indexers serve 4 layers" in found.reasons["groups"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": (512, 256)}, "ascending"),
        ({"top_k": ()}, "ascending"),
        ({"texts": 0}, "texts is 0"),
        ({"mass": 1.5}, "mass is 1.5"),
    ],
)
def test_settings_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(load_config(ProfileConfig, "profile"), **change)
