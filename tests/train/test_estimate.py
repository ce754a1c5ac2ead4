"""What a run says before it starts: how long it will take, and how much memory."""

import time
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

import tokensieve
from tests.support.training import Workplace, batch, model, workplace
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.train import Run, estimate, loop
from tokensieve.train.learning import learning
from tokensieve.train.starting import make_optimizer


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("estimate"))


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_a_rehearsal_leaves_everything_as_it_was(stage: str, here: Workplace) -> None:
    settings = here.run(stage, "rehearsal")
    made = model("v3" if stage == "pretrain" else "v32").train()
    random_state, weights = torch.get_rng_state(), {n: t.clone() for n, t in made.state_dict().items()}
    with learning(made, loop.STAGES[stage].learners(settings)):
        told, _ = estimate.estimate(settings, loop.STAGES[stage], made, torch.device("cpu"))
    assert told.seconds > 0 and told.tokens == 4 * 4 * 48
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(t, weights[n]) for n, t in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


def test_a_cold_pass_is_not_the_only_sample(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is compiled in the first pass takes seconds, once."""
    settings, made, clock = here.run("warmup", "cold"), model().train(), iter([0.0, 9.0, 9.0, 9.5, 9.5, 10.05])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    with learning(made, "indexers"):
        stage = loop.STAGES["warmup"]
        assert estimate.rehearse(settings, stage, made, 48, 1, torch.device("cpu"), 9) == pytest.approx(0.525)


def test_passes_that_never_agree_are_averaged(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [t for begin, took in zip((0, 9, 12, 18), (9, 3, 6, 3), strict=True) for t in (begin, begin + took)]
    settings, made, clock = here.run("warmup", "busy"), model().train(), iter(map(float, times))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    with learning(made, "indexers"):
        took = estimate.rehearse(settings, loop.STAGES["warmup"], made, 48, 1, torch.device("cpu"), 9)
    assert took == pytest.approx(4.5) and len(list(clock)) == 2  # 18 seconds were enough


@pytest.mark.parametrize(
    ("lost", "passes", "expected", "taken"),
    [(100, 1000, 2.0, 5), (10, 1000, 1.0, 3), (100, 20, 1.0, 3)],  # shared; alone; shared, and a run of 20 s
)
def test_passes_that_agree_are_not_enough_beside_busy_processes(
    lost: int, passes: float, expected: float, taken: int, here: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [
        float(t) for begin, took in zip((0, 2, 3, 4, 7), (2, 1, 1, 3, 3), strict=True) for t in (begin, begin + took)
    ]
    clock, told = iter(times), iter(range(0, 10_000, lost))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(estimate, "_preemptions", lambda: next(told) * 3)
    made = model().train()
    with learning(made, "indexers"):
        took = estimate.rehearse(
            here.run("warmup", "shared"), loop.STAGES["warmup"], made, 48, 1, torch.device("cpu"), passes
        )
    assert took == expected and len(list(clock)) == 10 - 2 * taken


def test_a_system_that_counts_no_preemptions_seems_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(process: psutil.Process) -> None:
        raise NotImplementedError

    assert estimate._preemptions() >= 0
    monkeypatch.setattr(psutil.Process, "num_ctx_switches", none)
    assert estimate._preemptions() == 0


def test_a_short_row_leads_to_the_runs_own_where_that_is_affordable(here: Workplace, monkeypatch: Any) -> None:
    settings, made = here.run("warmup", "affordable", PhaseConfig(1, 2048, 1)), model().train()
    for per_token, rows in ((1e-4, [512, 2048]), (1.0, [512])):  # seconds a token, and the rows that are timed
        timed: list[int] = []

        def rehearse(c: Any, s: Any, m: Any, tokens: int, *rest: Any, seen=timed, each=per_token) -> float:
            seen.append(tokens)
            return each * tokens

        monkeypatch.setattr(estimate, "rehearse", rehearse)
        told, rehearsal = estimate.estimate(settings, loop.STAGES["warmup"], made, torch.device("cpu"))
        assert timed == rows and rehearsal.seconds == per_token * rows[-1]
        if len(rows) > 1:
            assert told.seconds == pytest.approx(rehearsal.seconds)


def test_the_estimate_counts_the_process(here: Workplace) -> None:
    settings, made = here.run("warmup", "memory"), model().train()
    with learning(made, "indexers"):
        told, _ = estimate.estimate(settings, loop.STAGES["warmup"], made, torch.device("cpu"))
    rss = psutil.Process().memory_info().rss
    assert 0.5 * rss < told.process_bytes <= rss  # torch is most of it
    assert told.memory_bytes == told.process_bytes + replace(told, process_bytes=0).memory_bytes


def test_a_rehearsed_row_selects_and_is_no_longer_than_the_run(here: Workplace) -> None:
    made = model(index_topk=300)
    for stage, context, tokens in (
        ("adapt", 4096, 600),
        ("adapt", 400, 400),
        ("warmup", 4096, 512),
        ("warmup", 48, 48),
    ):
        assert estimate.row_tokens(here.run(stage, "rows", PhaseConfig(1, context, 1)), made) == tokens
    assert estimate.row_tokens(here.run("adapt", "rows", PhaseConfig(1, 4096, 1), selection=False), made) == 512


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
@pytest.mark.parametrize("context", [512, 2048])
def test_the_estimate_is_about_right(stage: str, context: int) -> None:
    """Processor time, not the clock's: other processes may be at work. The bundled model, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = TrainConfig(stage, "sparse", "", (PhaseConfig(1, context, 2),), device="cpu")
    try:
        made = tokensieve.load("base" if stage == "pretrain" else "sparse", torch.float32)
        this = Run(settings, made.train())
        with learning(made, loop.STAGES[stage].learners(settings)):
            this.optimizer = make_optimizer(settings, made, torch.device("cpu"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(estimate.time, "perf_counter", time.process_time)
                told, _ = estimate.estimate(settings, loop.STAGES[stage], made, torch.device("cpu"))
            begin = time.process_time()
            this.step(0, [batch(1, context, seed=seed) for seed in range(2)])
            took = time.process_time() - begin
    finally:
        torch.set_num_threads(threads)
    assert 1 / 1.6 < told.seconds / took < 1.6, (told.seconds, took)
