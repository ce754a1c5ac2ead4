"""The words of a profile: what the recommendation's parts are called."""

from typing import Any

from tokensieve.report.profile_table import answers, attention_text, mass_rows


def advice(**changes: Any) -> dict[str, Any]:
    reasons = {"verdict": "a", "top_k": "b", "dense_below": "c", "groups": "d"}
    figures = {"verdict": "sparse", "top_k": 512, "dense_below": 2146, "groups": [[0], [1, 2], [3], [4, 5, 6]]}
    return figures | {"reasons": reasons} | changes


def test_answers_have_names() -> None:
    assert [answer for answer, _ in answers(advice())] == [
        "Use sparse attention",
        "k = 512",
        "Stay dense below 2,146 tokens",
        "Layers 1 to 2, 4 to 6 can share an indexer",
    ]
    assert answers(advice(groups=[[0], [1]]))[-1] == ("Every layer needs its own indexer", "d")
    dense = advice(verdict="dense", top_k=None, dense_below=None, groups=[], reasons={"verdict": "a"})
    assert answers(dense) == [("Stay with dense attention", "a")]


def test_a_sample_that_time_has_cut_says_so() -> None:
    figures = {"texts": 5, "texts_wanted": 24, "context": 4096, "queries": 320, "seconds": 61.0}
    assert attention_text(figures).startswith("Attention in 5 texts of 24, for want of time, of at most 4,096 tokens")
    assert ", for want of time" not in attention_text(figures | {"texts": 24})


def test_rows_name_the_worst_layer() -> None:
    mass = {
        "8": {"value": 0.9, "low": 0.8, "high": 1.1, "n": 3},
        "64": {"value": 1.0, "low": None, "high": None, "n": 0},
    }
    rows = mass_rows({"mass": mass, "mass_by_layer": {"8": [0.95, 0.85]}, "overlap": {"8": [0.4]}})
    assert rows[0] == ("8", "0.900", "0.800 to 1.000", "3", "0.850 (1)", "40% to 40%")
    assert rows[1][3] == "0" and "no text is longer" in rows[1]
