"""The parts of the pipeline, one by one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokensieve.config import load_config
from tokensieve.posttrain import LanguageShare, parts
from tokensieve.posttrain.parts import BASE, DISTILLED, Parts, Watch
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks.problems import DOMAINS

NAMES = ["logic", "writing"]


class Quiet(Watch):
    def note(self) -> None:
        pass


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Of a base that has figures, with models that answer nothing."""
    base = {f"{name}-direct": {"difficulty": DOMAINS[name].difficulty[1], "scores": [0.0]} for name in NAMES}
    changes = ("model=sparse", f"out={tmp_path}", 'modes=["direct"]', "difficulty.fixed={}")
    settings = load_config(PosttrainConfig, "posttrain-tiny", changes)
    monkeypatch.setattr(Parts, "load", lambda *_: SimpleNamespace(top_k=16, is_sparse=True))
    monkeypatch.setattr(Parts, "path", lambda *_: "somewhere")
    monkeypatch.setattr(Parts, "_sample", lambda *_, **__: [[]] * 28)
    return Parts(settings, {name: DOMAINS[name] for name in NAMES}, {"evaluation": {BASE: base}}, Quiet())


def test_a_stopped_evaluation_leaves_no_figures_that_are_half_done(
    measured: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would count as done. Groups that are asked by themselves would be in batches of other sizes, too."""

    def stopped(scores: Sequence[float], before: Sequence[float]) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "figures", lambda *_: {"scores": [1.0]})
    monkeypatch.setattr(parts, "gain", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured.evaluate(DISTILLED, NAMES)
    assert measured.found["evaluation"][DISTILLED] == {}


@pytest.mark.parametrize("installed", [True, False])
def test_language_is_measured_where_it_can_be(
    installed: bool, measured: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its weight in the reward: at 0 it is traded too. Only a reward needs the package."""
    if not installed:
        monkeypatch.setitem(sys.modules, "py3langid", None)
    given: list[Any] = []
    monkeypatch.setattr(parts, "figures", lambda *all_of_it: given.append(all_of_it[2]) or {"scores": [1.0]})
    measured.evaluate(DISTILLED, NAMES)
    assert [isinstance(language, LanguageShare) for language in given] == [installed] * 2
