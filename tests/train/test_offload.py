"""Parameters, gradients and moments in the host's memory: the same runs, where it can be, and counted.

FSDP moves them to a GPU and back. Of a CPU the memory is the host's, so here it does the same without moving anything.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import tokensieve
from tests.support import ranks
from tests.support.steps import FAMILIES, check_step, settings, step_of_rank
from tests.support.training import Workplace, workplace
from tests.support.training_runs import assert_same_content, run, waiting
from tokensieve import checkpoint, cost
from tokensieve.config import LoraConfig, TrainConfig, UserError
from tokensieve.families import model_config
from tokensieve.mesh import Mesh
from tokensieve.train import loop, parallelize
from tokensieve.train.parallelize import Division, check_model, divide, empty_model, own_part, read_parts


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("offload"))


# in a rank's process


def offloaded(patch: pytest.MonkeyPatch, rank: int = 0) -> None:
    """Runs whose parameters are offloaded, on a CPU."""

    def divided(config: TrainConfig, mesh: Mesh) -> Division:
        return replace(divide(config, mesh), offload=True)

    patch.setattr(loop, "divide", divided)


def offloaded_and_waiting(patch: pytest.MonkeyPatch, rank: int) -> None:
    offloaded(patch)
    waiting(patch, rank)


def offloaded_step(family: str, settings: TrainConfig) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    policies: list[Any] = []

    def recorded(module: Any, **more: Any) -> Any:
        policies.append(more["offload_policy"])
        return fully_shard(module, **more)

    with pytest.MonkeyPatch.context() as patch:
        offloaded(patch)
        patch.setattr(parallelize, "fully_shard", recorded)
        found = step_of_rank(family, settings)
    assert len(policies) >= 4 and all(isinstance(policy, CPUOffloadPolicy) for policy in policies)
    return found


def read_beside_gpus(folder: Path) -> bool:
    """Whether this rank's parts of a model that is sharded over GPUs are read into the host's memory.

    The mesh is one of GPUs by its name alone, and whatever moves to one fails here.
    """
    gpus = DeviceMesh("cuda", [0, 1], _init_backend=False)
    model = empty_model(model_config(checkpoint.read_config(folder)))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            own = distribute_tensor(parameter.detach(), gpus, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(own))
    read_parts(model, folder, Division(ranks.HERE[0], offload=True))
    whole = tokensieve.load(folder, torch.float32).state_dict()
    return all(
        isinstance(p, DTensor)
        and p.device_mesh == gpus
        and p.to_local().device.type == "cpu"
        and torch.equal(p.to_local(), whole[name][own_part(p.shape, p)])
        for name, p in model.named_parameters()
    )


# here


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("warmup", {}),
        ("adapt", {"context_parallel": 2, "activation_checkpointing": True}),
        ("adapt", {"expert_parallel": 2}),
        ("adapt", {"lora": LoraConfig(rank=3)}),
    ],
)
def test_a_step(two: ranks.Group, stage: str, changes: dict[str, Any]) -> None:
    check_step(two, "v32", settings(stage, **changes), offloaded_step)


def test_parts_are_read_into_the_hosts_memory(two: ranks.Group, here: Workplace) -> None:
    assert all(two.ask(read_beside_gpus, here.root / "sparse"))


def test_a_run_goes_on_with_and_without(two: ranks.Group, here: Workplace) -> None:
    whole = here.run("adapt", "whole", save_every=2)
    begun = replace(whole, out=whole.out.replace("whole", "begun"))
    expected = run(two, whole).losses
    assert run(two, begun, False, 3, offloaded_and_waiting).losses == expected[:3]
    assert run(two, begun, True, 0, offloaded).losses == expected[2:]
    assert_same_content(Path(begun.out, "step-000004"), Path(whole.out, "step-000004"))
    later = replace(begun, phases=(replace(begun.phases[0], steps=5),))
    assert len(run(two, later, True).losses) == 1


@pytest.mark.parametrize(
    ("size", "device", "words"),
    [
        (1, "cuda", "offload keeps in the host's memory what several ranks shard, .* or start several, on GPUs$"),
        (2, "cpu", "offload is true, and the ranks train on the CPU, whose memory is the host's; leave it out"),
    ],
)
def test_where_it_cannot_be(size: int, device: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        divide(settings("adapt", device="auto", offload=True), Mesh(0, size, torch.device(device)))


def test_a_cpu_by_name() -> None:
    with pytest.raises(UserError, match="offload is true and device is cpu, whose memory is the host's; leave one"):
        settings("adapt", offload=True)


def test_the_hosts_memory_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the copy of a checkpoint; the GPUs are not asked."""
    made, one = FAMILIES["v32"](), settings("adapt", device="auto", offload=True)
    needed = cost.run_estimate(made, one, 1.0)
    held = 2 * (needed.weight_bytes + needed.optimizer_bytes) + needed.gradient_bytes
    mesh = Mesh(0, 2, torch.device("cuda"))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=held // 2))
    check_model(one, made, mesh)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=held // 2 - 8))
    with pytest.raises(UserError, match="with the copy of a checkpoint"):
        check_model(one, made, mesh)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus(here: Workplace) -> None:
    """The gradients of a step are those of GPUs that keep everything, and so are the losses of a run that goes on."""
    with ranks.started(2, "cuda") as group:
        kept, away = (
            group.ask(step_of_rank, "v32", settings("adapt", device="auto", offload=offload))[0][0]
            for offload in (False, True)
        )
        runs = {}
        for offload in (False, True):
            whole = here.run("adapt", f"gpus-{offload}", device="auto", offload=offload)
            begun = run(group, whole)
            later = replace(whole, phases=(replace(whole.phases[0], steps=6),))
            runs[offload] = [*begun.losses, *run(group, later, True).losses]
    assert len(runs[True]) == 6
    np.testing.assert_allclose(runs[True], runs[False], rtol=5e-3)  # as between GPUs and one (test_parallelize_gpu.py)
    assert kept.keys() == away.keys()
    for name, gradient in kept.items():
        # Kernels add in any order, and round to bfloat16.
        np.testing.assert_allclose(away[name], gradient, rtol=0, atol=2**-6 * abs(gradient).max())
