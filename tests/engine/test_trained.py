"""A model that several ranks have trained is served as it is saved: on one rank, and on several, here the same ones."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tokensieve
from tests.support import ranks
from tests.support.training import Workplace, workplace
from tokensieve import train
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.engine import Engine, EngineConfig, Request, Sampling, engine_on
from tokensieve.engine.tensor_parallel import load_rank

ROOM = EngineConfig(pages=16, running=4, chunk=64, chunks=2)
PROMPTS = [tuple(range(20 + i, 20 + i + length)) for i, length in enumerate((3, 40, 90))]  # k is 16


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("trained"))


def greedy(engine: Engine) -> list[list[int]]:
    """The tokens that follow each prompt."""
    for number, prompt in enumerate(PROMPTS):
        engine.add(Request(str(number), prompt, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)))
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    while engine.busy:
        for output in engine.step():
            tokens[int(output.id)] += output.tokens
    return tokens


# in a rank's process


def trained(settings: TrainConfig) -> bool:
    """Trains. Returns whether the ranks that FSDP shards over are those of the engine's collectives."""
    mesh = ranks.HERE[0]
    train.run(settings, progress=False, mesh=mesh)
    return mesh.axes(ranks=mesh.size).get_group() is dist.group.WORLD


def served(folder: Path) -> list[list[int]] | None:
    mesh = ranks.HERE[0]
    with engine_on(mesh, load_rank(folder, mesh), tokensieve.load_tokenizer(folder), ROOM) as engine:
        return None if engine is None else greedy(engine)


# here


@pytest.mark.parametrize("changes", [{"context_parallel": 2, "expert_parallel": 2}, {}])
def test_served_without_a_conversion(here: Workplace, changes: dict[str, int]) -> None:
    """Greedy tokens are those of one rank, of `generate`, and of the same training in one process."""
    settings = here.run("adapt", f"served-{len(changes)}", PhaseConfig(1, 48, 4, 2))
    settings = replace(settings, optimizer=replace(settings.optimizer, warmup_steps=0), **changes)
    folder = Path(settings.out, "step-000001")
    with ranks.started(2) as two:
        assert two.ask(trained, settings) == [True, True]
        on_two, nothing = two.ask(served, folder)
    model = tokensieve.load(folder)
    before = tokensieve.load(settings.model).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    alone = greedy(Engine(model, tokensieve.load_tokenizer(folder), ROOM))
    assert nothing is None and on_two == alone and all(len(tokens) == 12 for tokens in alone)
    single = replace(settings, out=f"{settings.out}-alone", context_parallel=1, expert_parallel=1)
    whole = train.run(single, progress=False, rehearse=False)
    assert greedy(Engine(whole, tokensieve.load_tokenizer(folder), ROOM)) == alone
    ids = torch.tensor([PROMPTS[2]])
    generated = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated[0, ids.shape[1] :].tolist() == alone[2]
