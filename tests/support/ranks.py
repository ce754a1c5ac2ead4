"""Ranks as the tests start them: processes that hold one model together, and what they are asked to do.

They stay for many questions.
"""

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import forks
from tests.support.models import ours, tokens
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, engine_on, tensor_parallel
from tokensieve.engine.tensor_parallel import load_rank
from tokensieve.mesh import Mesh, join_mesh
from tokensieve.model import DecoderForCausalLM, fp8
from tokensieve.model.attention import Attention
from tokensieve.model.selection import ONE_GROUP

LIMIT = 120  # seconds for a question
HERE: list[Mesh] = []  # in a rank's process: what it has joined


class Group:
    """Ask all ranks the same; their answers, by rank."""

    def __init__(self, pools: list[ProcessPoolExecutor]):
        self._pools, self.count = pools, len(pools)

    def ask(self, question: Callable[..., Any], *arguments: Any) -> list[Any]:
        asked: list[Future] = [pool.submit(question, *arguments) for pool in self._pools]
        done, left = wait(asked, LIMIT, FIRST_EXCEPTION)
        for future in done:
            future.result()
        assert not left, f"{len(left)} of {self.count} ranks hang"
        return [future.result() for future in asked]


@contextmanager
def started(count: int, device: str = "cpu") -> Iterator[Group]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = forks.context()
    pools = [ProcessPoolExecutor(1, context, join, (rank, count, port, device)) for rank in range(count)]
    group = Group(pools)
    try:
        yield group
    finally:
        for pool in pools:
            for process in pool._processes.values():
                process.kill()
            pool.shutdown()


# from here on in a rank's process


def join(rank: int, count: int, port: int, device: str) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    HERE.append(join_mesh(device).__enter__())


def part_of(config: Any) -> DecoderForCausalLM:
    """Of the same model on every rank; on a GPU in bfloat16."""
    model, device = ours(config, seed=1), HERE[0].device
    if device.type == "cuda":
        model = model.to(device, torch.bfloat16)
    tensor_parallel.shard(model, HERE[0])
    return model


@torch.no_grad()
def logits(config: Any) -> dict[str, Any]:
    """Of a prompt longer than k, and of one token after it; and what this rank holds."""
    part, ids = part_of(config), tokens(2, 90)
    whole = part(ids, return_selection=True)
    begun = part(ids[:1, :-1], use_cache=True)
    following = part(ids[:1, -1:], past_key_values=begun.past_key_values)
    return {
        "logits": whole.logits.numpy(),
        "next": following.logits[0, -1].numpy(),
        "selection": [None if x is None else x.numpy() for x in whole.selection],
        "shapes": {name: tuple(x.shape) for name, x in part.state_dict().items()},
    }


@torch.no_grad()
def oracle_selection(config: Any) -> list[Any]:
    """What a control selects that looks at all heads of the attention."""
    with tokensieve.selecting(part := part_of(config), "oracle"):
        return [x.numpy() for x in part(tokens(1, 60), return_selection=True).selection]


def answers(config: Any, requests: list[Request], engine_config: EngineConfig) -> list[Any] | None:
    """The leader's outputs; the others follow."""
    with engine_on(HERE[0], part_of(config), tokensieve.load_tokenizer("base"), engine_config) as engine:
        return None if engine is None else everything(engine, requests)


def everything(engine: Engine, requests: list[Request]) -> list[Any]:
    """What comes of the requests, of which one is aborted, and what one ends in that can never run; before that, some
    end with an error.
    """
    for request in requests[:2]:
        engine.add(request)
    said: list[Any] = engine.step() + engine.fail_all("once")
    for request in requests:
        engine.add(request)
    try:
        engine.add(Request("never", ()))
    except UserError as error:
        said.append(str(error))
    said += engine.step()
    said.append(engine.abort(requests[0].id))
    while engine.busy:
        said += engine.step()
    assert engine.scheduler.pool.used == 0
    return said


def read_keys(config: Any, requests: list[Request], engine_config: EngineConfig, handed: bool) -> list[Any]:
    """All indices that this rank's attention was given, by ranks whose indexers differ."""
    read: list[Tensor] = []
    part, attend = part_of(config), Attention._attend

    def recording(attention: Attention, queries: Any, keys: Any, indices: Tensor | None, *more: Any) -> Tensor:
        if indices is not None:
            read.append(indices)
        return attend(attention, queries, keys, indices, *more)

    noise = torch.Generator().manual_seed(HERE[0].rank)
    for name, parameter in part.named_parameters():
        if "indexer.wq_b" in name:
            parameter.data += torch.randn(parameter.shape, generator=noise)
    if not handed:
        for layer in part.model.layers:
            layer.self_attn.head_group = ONE_GROUP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "_attend", recording)
        with engine_on(HERE[0], part, tokensieve.load_tokenizer("base"), engine_config) as engine:
            if engine is not None:
                everything(engine, requests)
    return [x.numpy().tobytes() for x in read]


@torch.no_grad()
def from_folder(folder: Path, keep_fp8: bool = False) -> tuple[Any, str]:
    """The logits of what `load_rank` makes of a folder, or the error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "pays", lambda device: keep_fp8)  # as on a GPU that multiplies FP8
        try:
            part = load_rank(folder, HERE[0])
        except UserError as error:
            return None, str(error)
    assert fp8.holds(part) == keep_fp8
    return part(tokens(2, 60) % part.config.vocab_size).logits.numpy(), ""


def step_that_fails_here(config: Any, rank: int) -> str:
    """What a rank sees where a step raised on one of them."""
    part = part_of(config)
    if HERE[0].rank == rank:
        part.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("a defect")))
    try:
        with engine_on(HERE[0], part, tokensieve.load_tokenizer("base"), EngineConfig(pages=4)) as engine:
            if engine is not None:
                engine.add(Request("x", (17, 18, 19)))
                engine.step()
    except (RuntimeError, ValueError) as error:
        torch.distributed.destroy_process_group()  # as the end of its process does
        return f"{type(error).__name__}: {error}"
    return "nothing"
