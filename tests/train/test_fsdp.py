"""What training on many GPUs will stand on: FSDP2's hooks see the indexers' KL. Two processes on gloo, one step each."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.training import apart, batch, indexers, model
from tokensieve.model import ForwardOptions, KLScale, Objective
from tokensieve.train.learning import learning

ROWS, LENGTH = 4, 40


def gradients_of_one(objective: str) -> dict[str, torch.Tensor]:
    """One process, the whole batch."""
    made, inputs = model(), batch(ROWS, LENGTH)
    made.train()
    options = ForwardOptions(objective=Objective(objective, KLScale(per_query=1.0 / (ROWS * LENGTH))))
    with learning(made, "indexers" if objective == "warmup" else "all"):
        out = made(**inputs, options=options)
        out.loss.backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def rank(rank: int, port: int, objective: str, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    made = model().train()
    with learning(made, "indexers" if objective == "warmup" else "all"):
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
        inputs = {name: x.chunk(2)[rank] for name, x in batch(ROWS, LENGTH).items()}
        # FSDP2 averages gradients over the ranks, each of which has half of the queries.
        options = ForwardOptions(objective=Objective(objective, KLScale(per_query=2.0 / (ROWS * LENGTH))))
        made(**inputs, options=options).loss.backward()
        found = {name: p.grad.full_tensor() for name, p in made.named_parameters() if p.grad is not None}
    if rank == 0:
        from safetensors.torch import save_file

        save_file({name: x.contiguous() for name, x in found.items()}, f"{folder}/gradients.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("objective", ["warmup", "adapt"])
def test_a_step_under_fully_shard_has_the_gradients_of_one_process(objective: str, tmp_path) -> None:
    from safetensors.torch import load_file

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(rank, (port, objective, str(tmp_path)), nprocs=2)
    found, expected = load_file(tmp_path / "gradients.safetensors"), gradients_of_one(objective)
    assert indexers(found) and (objective == "adapt" or found.keys() == indexers(found).keys())
    # float32 sums in another order
    assert apart(indexers(found), indexers(expected)) < 1e-5
    assert apart(found, expected) < 1e-4
