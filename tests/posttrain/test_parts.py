"""The parts of the pipeline, one by one."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokensieve.config import load_config
from tokensieve.posttrain import parts
from tokensieve.posttrain.parts import BASE, DISTILLED, Parts, Watch
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks.problems import DOMAINS


def test_a_stopped_evaluation_leaves_no_figures_that_are_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would count as done. Groups that are asked by themselves would be in batches of other sizes, too."""

    class Quiet(Watch):
        pass

    def stopped(scores: Sequence[float], before: Sequence[float]) -> Any:
        raise KeyboardInterrupt

    names = ["logic", "writing"]
    base = {f"{name}-direct": {"difficulty": DOMAINS[name].difficulty[1], "scores": [0.0]} for name in names}
    changes = ("model=sparse", f"out={tmp_path}", 'modes=["direct"]', "difficulty.fixed={}")
    settings = load_config(PosttrainConfig, "posttrain-tiny", changes)
    measured = Parts(settings, {name: DOMAINS[name] for name in names}, {"evaluation": {BASE: base}}, Quiet())
    monkeypatch.setattr(Parts, "load", lambda *_: SimpleNamespace(top_k=16, is_sparse=True))
    monkeypatch.setattr(Parts, "path", lambda *_: "somewhere")
    monkeypatch.setattr(Parts, "_sample", lambda *_, **__: [[]] * 28)
    monkeypatch.setattr(parts, "figures", lambda *_: {"scores": [1.0]})
    monkeypatch.setattr(parts, "gain", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured.evaluate(DISTILLED, names)
    assert measured.found["evaluation"][DISTILLED] == {}
