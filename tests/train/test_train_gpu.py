"""What training does for the sake of a GPU, checked without one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tokensieve
from tests.support.training import VOCAB, Workplace, apart, batch, model, step_gradients, workplace
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.model.indexer import Indexer
from tokensieve.ops import registry, table
from tokensieve.train import run

STAGES = ("pretrain", "warmup", "adapt")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype, str]]:
    """(op, dtype of the queries, backend asked for) of every call of an op, backward passes too."""
    calls: list[tuple[str, torch.dtype, str]] = []
    original = registry.pick

    def pick(op: str, q: torch.Tensor, backend: str, operands: Any) -> Any:
        calls.append((op, q.dtype, backend))
        return original(op, q, backend, operands)

    monkeypatch.setattr(registry, "pick", pick)
    monkeypatch.setattr(table, "pick", pick)
    return calls


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_op_of_a_run_is_asked_of_its_backend(stage: str, backend: str, here: Workplace, picked: list) -> None:
    made = run(here.run(stage, f"{stage}-{backend}", backend=backend), progress=False)
    expected = {
        "pretrain": {"dense_attention"},
        "warmup": {"dense_attention", "indexer_kl_dense"},
        "adapt": {"index_topk", "sparse_attention_kl"},
    }
    assert {op for op, _, _ in picked} == expected[stage]
    assert {asked for _, _, asked in picked} == {backend}
    picked.clear()
    made(torch.ones(1, 20, dtype=torch.long))
    assert {asked for _, _, asked in picked} == {"auto"}  # it was the run's choice


@pytest.mark.parametrize("objective", ["warmup", "adapt"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_under_autocast_every_op_gets_what_the_kernels_take(
    objective: str, weights: torch.dtype, picked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries in bfloat16 (what `dispatch` looks at), keys too, head weights in float32; and every indexer's matrix has
    a gradient.
    """
    made = model()
    for name, parameter in made.named_parameters():
        if "weights_proj" not in name:
            parameter.data = parameter.data.to(weights)
    made.train()
    seen: list[tuple[torch.dtype, ...]] = []

    def note(original: Any) -> Any:
        def op(*args: Any) -> Any:
            seen.append(tuple(x.dtype for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()))
            return original(*args)

        return op

    for op in ("index_topk", "sparse_attention_kl", "indexer_kl_dense_sum"):
        monkeypatch.setattr(table, op, note(getattr(table, op)))
    with torch.autocast("cpu", torch.bfloat16), tokensieve.training(made, objective):
        made(**batch(2, 48, documents=True)).loss.backward()
    narrow, wide = torch.bfloat16, torch.float32
    expected = {
        "warmup": {(narrow, narrow, wide, narrow, narrow, wide, wide)},  # q, k, lse, q_I, k_I, w, weight
        "adapt": {(narrow, narrow, wide), (narrow, narrow, narrow, narrow, wide)},  # q_I, k_I, w; q, kv, q_I, k_I, w
    }
    assert set(seen) == expected[objective]
    assert {dtype for _, dtype, _ in picked} == {narrow}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.indexer_parameters())


def test_adaptation_computes_index_queries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = model(), []
    original = Indexer.queries
    monkeypatch.setattr(Indexer, "queries", lambda self, *args: calls.append(self) or original(self, *args))
    with tokensieve.training(made, "adapt"):
        made.train()(**batch(1, 48)).loss.backward()
    assert len(calls) == len(made.model.layers)


@pytest.mark.parametrize("stage", ["pretrain", "adapt"])
def test_logits_a_piece_at_a_time_change_nothing(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, settings = batch(2, 48, documents=True), TrainConfig(stage, "", "", (PhaseConfig(1, 48, 2, 2),))
    sizes: list[int] = []
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, *rest, **how: sizes.append(len(x)) or original(x, *rest, **how))
    whole, figures = step_gradients(settings, model().double(), [step])
    assert sizes == [96]
    monkeypatch.setattr("tokensieve.cost.training.LOGITS", 40 * VOCAB)
    found, again = step_gradients(settings, model().double(), [step])
    assert sizes[1:4] == [40, 40, 16] and max(sizes[1:]) == 40
    assert apart(found, whole) < 1e-12 and again["loss"] == pytest.approx(figures["loss"], rel=1e-9)
