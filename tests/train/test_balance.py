"""Load balancing of the experts by their biases."""

from dataclasses import replace

import torch
from torch import Tensor

from tests.support.models import config, ours
from tests.support.training import OPTIMIZER, batch, cut, model, step_gradients
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model.moe import Router
from tokensieve.train import pretrain

SETTINGS = TrainConfig("pretrain", "", "", (PhaseConfig(4, 48, 4, 4),), optimizer=OPTIMIZER, device="cpu")


def test_the_bias_moves_towards_even_load() -> None:
    made = model("v3")
    settings = replace(SETTINGS, balance_rate=0.02)
    router = next(m for m in made.modules() if isinstance(m, Router))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.linspace(0.5, -0.5, router.experts))
    step = batch(8, 48)

    def loads() -> tuple[Tensor, ...]:
        counted = made.model(**{k: v for k, v in step.items() if k != "labels"}).loads
        return tuple(load for load in counted if load is not None)

    with torch.no_grad():
        first = loads()[0]
        before = router.e_score_correction_bias.clone()
        pretrain.balance(made, settings, loads())
        moved = router.e_score_correction_bias - before
        mean = first.float().mean()
        assert torch.allclose(moved, settings.balance_rate * torch.sign(mean - first.float()), atol=1e-7)
        for _ in range(60):
            last = loads()[0]
            pretrain.balance(made, settings, loads())
    assert int(first.sum()) == 8 * 48 * router.top_k == int(last.sum())
    assert last.float().std() < 0.4 * first.float().std()


def test_a_softmax_router_has_no_bias_to_move() -> None:
    made = ours(config("v2"))
    count = sum(isinstance(m, Router) and m.softmax for m in made.modules())
    assert count
    pretrain.balance(made, SETTINGS, (torch.ones(4),) * count)


def test_experts_are_counted_over_the_whole_step() -> None:
    biases = []
    for parts in (1, 4):
        made = model("v3")
        step_gradients(replace(SETTINGS, balance_rate=0.5), made, cut(batch(4, 48), parts))
        biases.append([m.e_score_correction_bias for m in made.modules() if isinstance(m, Router)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*biases, strict=True))
