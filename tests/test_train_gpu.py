"""What training does for the sake of a GPU, checked without one."""

from typing import Any

import pytest
import torch

from tests.training import Workplace, workplace
from tokensieve.ops import custom, custom_kl
from tokensieve.train import run

STAGES = ("pretrain", "warmup", "adapt")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype, str]]:
    """(op, dtype of the queries, backend asked for) of every call of an op, backward passes too."""
    calls: list[tuple[str, torch.dtype, str]] = []
    original = custom.pick

    def pick(op: str, q: torch.Tensor, backend: str = "auto", **rest: Any) -> Any:
        calls.append((op, q.dtype, backend))
        return original(op, q, backend, **rest)

    for module in (custom, custom_kl):
        monkeypatch.setattr(module, "pick", pick)
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
