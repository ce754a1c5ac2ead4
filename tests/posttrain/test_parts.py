"""The parts of the pipeline, one by one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokensieve import pipeline
from tokensieve.config import UserError, load_config
from tokensieve.posttrain import LanguageShare, parts
from tokensieve.posttrain.parts import BASE, DISTILLED, FINAL, ON_POLICY, Parts, Watch
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks.problems import DOMAINS

NAMES = ["logic", "writing"]


class Quiet(Watch):
    def note(self) -> None:
        pass


def settings(out: Path, *changes: str) -> PosttrainConfig:
    return load_config(PosttrainConfig, "posttrain-tiny", ("model=sparse", f"out={out}", *changes))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Of a base that has figures, with models that answer nothing."""
    base = {f"{name}-direct": {"difficulty": DOMAINS[name].difficulty[1], "scores": [0.0]} for name in NAMES}
    config = settings(tmp_path, 'modes=["direct"]', "difficulty.fixed={}")
    monkeypatch.setattr(Parts, "load", lambda *_: SimpleNamespace(top_k=16, is_sparse=True))
    monkeypatch.setattr(Parts, "path", lambda *_: "somewhere")
    monkeypatch.setattr(Parts, "_sample", lambda *_, **__: [[]] * 28)
    return Parts(config, {name: DOMAINS[name] for name in NAMES}, {"evaluation": {BASE: base}}, Quiet())


CHAINED = (f"distill.on_policy.model={DISTILLED}", f"rl.model={ON_POLICY}")


def test_stages_may_start_from_the_runs_own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On-policy distillation from the distilled model, and the mixed stage from what that leaves."""

    def starts(*changes: str) -> list[Any]:
        run = Parts(settings(tmp_path, *changes), {}, {}, Quiet())
        return [run.start(model) for model in (ON_POLICY, FINAL)]

    with pytest.raises(UserError, match="there is no distilled model yet; run first: tokensieve distill"):
        Parts(settings(tmp_path, *CHAINED), {}, {}, Quiet()).check_start(ON_POLICY, ())
    monkeypatch.setattr(Parts, "is_done", lambda *_: True)
    distilled, on_policy = tmp_path / "distilled/train/model", tmp_path / "on-policy/model"
    assert starts() == ["sparse", distilled]
    assert starts(*CHAINED) == [distilled, on_policy]
    assert starts("distill.on_policy.model=one", "rl.model=another") == ["one", "another"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "distill.on_policy.model=disilled",
            r"^distill.on_policy.model: model 'disilled': .*; or distilled, of this run",
        ),
        (
            "rl.model=specialist-logic",
            r"^rl.model: model 'specialist-logic': .*; or distilled or on-policy, of this run",
        ),
    ],
)
def test_a_start_that_is_not_there_is_named_by_its_key(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Parts(settings(tmp_path, change, "device=cpu"), {}, {}, Quiet()).check((), rewarded=False)


def test_what_a_model_starts_from_counts_among_its_settings(tmp_path: Path) -> None:
    def of(*changes: str) -> dict[str, str]:
        config = settings(tmp_path, *changes)
        return pipeline._settings(config, pipeline._plan(config, ("logic",), {"logic": None}))

    before, after = of(*CHAINED), of(*CHAINED, "distill.train.steps=99")
    assert {name for name in before if before[name] != after[name]} == {DISTILLED, ON_POLICY, FINAL}
    with pytest.raises(UserError, match="rl.model is on-policy, and no such model is made"):
        load_config(PosttrainConfig, "posttrain-base", (f"rl.model={ON_POLICY}",))


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
