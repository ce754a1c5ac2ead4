"""Two GPUs that hold one model: nccl, and its calls inside of the decode step's CUDA graphs.

How fast that is: torchrun --nproc-per-node 2 -m tokensieve bench serve --shape deepseek_v32 --fp8 --set
num_hidden_layers=8 --filled
"""

from typing import Any

import pytest
import torch

import tokensieve
from tests.engine.test_engine_gpu import SPARSE, WIDTHS
from tests.engine.test_tensor_parallel import asked
from tests.support import ranks
from tests.support.models import config, ours
from tokensieve.engine import Engine, EngineConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROOM = EngineConfig(pages=256, running=16, chunk=64, chunks=2)
KINDS: dict[str, Any] = {
    "sparse": config("v32", index_dtype="fp8", **(WIDTHS | SPARSE | {"index_topk": 64})),
    "dense": config("v3", **WIDTHS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_answer_as_one(kind: str) -> None:
    """A token's log probability is the same to rounding, for as long as the tokens before it are the same."""
    with ranks.started(2, "cuda") as group:
        said = group.ask(ranks.answers, KINDS[kind], asked(), ROOM)[0]
    alone = Engine(ours(KINDS[kind], seed=1).to("cuda", torch.bfloat16), tokensieve.load_tokenizer("base"), ROOM)
    expected, found = (_logprobs(x) for x in (ranks.everything(alone, asked()), said))
    assert found.keys() == expected.keys()
    apart = []
    for id, known in expected.items():
        assert len(found[id]) == len(known)
        for (token, logprob), (other, its) in zip(known, found[id], strict=True):
            apart.append(abs(logprob - its) if token == other else 0.0)
            if token != other:
                break
    # bfloat16, entries in E4M3, and experts that a rounding may choose otherwise
    assert len(apart) >= len(expected) and sum(apart) / len(apart) < 0.2


def _logprobs(said: list[Any]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for output in said[said.index(next(x for x in said if getattr(x, "error", "") == "once")) :]:
        if not isinstance(output, str):
            found.setdefault(output.id, []).extend((told.token, told.logprob) for told in output.logprobs)
    return found
