"""Which layers keep their indexer: the training-free choice of IndexCache (arXiv 2603.12201)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.evals.evaluation import evaluating
from tokensieve.evals.losses import token_losses
from tokensieve.evals.progress import OnProgress
from tokensieve.families import family_of
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.model.sharing import check_one_k
from tokensieve.selectors import Shared


@dataclass(frozen=True)
class Step:
    """One layer gave up its indexer. loss: nats per token after it, in the mean over the sequences."""

    layer: int
    loss: float


@dataclass(frozen=True)
class Choice:
    """Layers that keep their indexer, and how it came to that. loss: nats per token before the first step."""

    kept: tuple[int, ...]
    loss: float
    steps: tuple[Step, ...]

    @property
    def kinds(self) -> list[str]:
        """`indexer_types` of config.json."""
        layers = len(self.kept) + len(self.steps)
        return ["full" if layer in self.kept else "shared" for layer in range(layers)]


def greedy_choice(
    model: DecoderForCausalLM, sequences: Sequence[Tensor], keep: int, on_progress: OnProgress | None = None
) -> Choice:
    """`keep` layers that keep their indexer: one after the other, the layer loses it without which the loss is least.

    A layer without an indexer reads the keys of the layer before it; the first keeps its own. The loss is that of the
    tokens after the first k of each sequence, of which earlier ones select nothing. Of equal losses the later layer's
    counts. For L layers and n left that is (L - n)(L + n - 1) / 2 passes over the sequences, and one more.

    Raises:
        UserError: `keep` is below 1 or not less than the layers; layers share indexers already, or have a k of their
            own; a sequence of at most k tokens.
    """
    family, layers = family_of(model.config), len(model.model.layers)
    if not family.sparse:
        raise UserError("the model is dense and has no indexers to share; make it sparse first: tokensieve sparsify")
    if model.model.indexers < layers:
        raise UserError("layers of this model share indexers already; choose from the model that has one in each")
    check_one_k(model.config)
    if not 1 <= keep < layers:
        raise UserError(f"keep is {keep}; of {layers} indexers at least 1 is kept, and fewer than all")
    shortest = min((len(ids) for ids in sequences), default=0)
    if shortest <= model.top_k:
        raise UserError(
            f"a sequence has {shortest} tokens, and nothing is selected up to k = {model.top_k}; use longer ones"
        )
    passes = 1 + (layers - keep) * (layers + keep - 1) // 2
    done = 0

    def loss(shared: tuple[int, ...]) -> float:
        nonlocal done
        with selecting(model, Shared(shared)):
            found = fmean(float(token_losses(model, ids)[model.top_k :].double().mean()) for ids in sequences)
        done += 1
        if on_progress is not None:
            on_progress("choosing", done, passes)
        return found

    shared: tuple[int, ...] = ()
    steps: list[Step] = []
    with evaluating(model):
        before = loss(())
        while layers - len(shared) > keep:
            tried = [(loss((*shared, layer)), -layer) for layer in range(1, layers) if layer not in shared]
            best, layer = min(tried)
            shared = (*shared, -layer)
            steps.append(Step(-layer, best))
    return Choice(tuple(layer for layer in range(layers) if layer not in shared), before, tuple(steps))
