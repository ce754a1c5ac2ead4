"""What training on many GPUs will stand on: FSDP2's hooks see the indexers' KL. Two processes, one step each."""

import numpy as np
import torch
from torch.distributed.fsdp import fully_shard

from tests.support import ranks
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


def gradients_of_rank(objective: str) -> dict[str, np.ndarray]:
    """In a rank's process, which has its half of the rows: the whole gradients, gathered."""
    mesh = ranks.HERE[0]
    made = model().train()
    with learning(made, "indexers" if objective == "warmup" else "all"):
        for layer in made.model.layers:
            fully_shard(layer)
        fully_shard(made)
        inputs = {name: x.chunk(mesh.size)[mesh.rank] for name, x in batch(ROWS, LENGTH).items()}
        # FSDP2 averages gradients over the ranks, each of which has half of the queries.
        options = ForwardOptions(objective=Objective(objective, KLScale(per_query=mesh.size / (ROWS * LENGTH))))
        made(**inputs, options=options).loss.backward()
        return {n: p.grad.full_tensor().numpy() for n, p in made.named_parameters() if p.grad is not None}


def test_a_step_under_fully_shard_has_the_gradients_of_one_process() -> None:
    with ranks.started(2) as group:
        for objective in ("warmup", "adapt"):
            expected = gradients_of_one(objective)
            for answer in group.ask(gradients_of_rank, objective):
                found = {name: torch.from_numpy(x) for name, x in answer.items()}
                assert indexers(found) and (objective == "adapt" or found.keys() == indexers(found).keys())
                # float32 sums in another order
                assert apart(indexers(found), indexers(expected)) < 1e-5, objective
                assert apart(found, expected) < 1e-4, objective
