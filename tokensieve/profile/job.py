"""The whole of `tokensieve profile`: from a model and a sample of its user's data to the figures of metrics.json."""

from dataclasses import asdict
from typing import Any

from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.evals import OnProgress
from tokensieve.model import DecoderForCausalLM, sparsify
from tokensieve.model.positions import check_positions
from tokensieve.profile.advice import advise
from tokensieve.profile.concentration import measure
from tokensieve.profile.crossover import crossover, spent
from tokensieve.profile.lengths import Sample, draw
from tokensieve.profile.recipe import training_costs
from tokensieve.profile_config import ProfileConfig
from tokensieve.tasks import PlainEncoder


def profile(
    model: DecoderForCausalLM,
    encode: PlainEncoder,
    sample: Sample,
    settings: ProfileConfig,
    seconds: float,
    context: int | None = None,
    peak_flops: float | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The lengths of the sample, the concentration of the model's attention on it, and what follows.

    Args:
        seconds: for the measurement of attention.
        context: tokens at which texts are cut; None: the model's positions.
        peak_flops: of the device that would train; None: this machine, timed.

    Returns {"lengths", "attention", "indexer": heads and width, "crossover": by k, "advice", "spent": shares of dense
    attention's costs, "training": stages}. The last two are None if the advice is to stay dense.

    Raises:
        UserError: a context past the model's positions or not longer than the smallest k, an indexer for a model that
            has one, or one whose heads cannot hold the positions.
    """
    positions, ks = model.config.max_position_embeddings, settings.top_k
    shape = cost.shape_of(model.config)
    if model.is_sparse and shape.index_layers < shape.layers:
        raise UserError("layers of this model share indexers already, which profile cannot measure; give a dense model")
    if positions <= ks[0]:
        raise UserError(
            f"the model has {positions} positions, and nothing is selected up to k = {ks[0]}; try fewer keys with "
            f"--set top_k=[{max(1, positions // 4)}]"
        )
    if context is not None:
        check_positions(positions, context, f"texts of {context} tokens are", "shorten them with --context")
        if context <= ks[0]:
            raise UserError(f"--context {context}: nothing is selected up to k = {ks[0]} tokens; give more")
    if model.is_sparse and (settings.index_heads or settings.index_dim):
        raise UserError("index_heads and index_dim are for dense models, and this one has an indexer; leave them out")
    texts = draw(sample, encode, settings.texts, ks[0], context or positions)
    attention = measure(model, texts, ks, settings.queries, seconds, on_progress)
    shapes = {k: cost.with_indexer(shape, k, settings.index_heads, settings.index_dim) for k in ks}
    crossovers = {k: crossover(shapes[k]) for k in ks}
    advice = advise(
        {k: attention.mass(k) for k in ks},
        sample.share_past,
        crossovers.__getitem__,
        attention.loss,
        attention.layers,
        positions,
        settings,
    )
    saved = training = None
    heads, dim = shapes[ks[0]].index_heads, shapes[ks[0]].index_dim
    if advice.verdict == "sparse" and advice.top_k and advice.dense_below:
        saved = spent(shapes[advice.top_k], sample.lengths.tolist(), advice.dense_below)
        sparse = model if model.is_sparse else sparsify(model, advice.top_k, heads, dim)
        length, rate = min(context or positions, int(sample.lengths.max())), attention.flops_per_second
        costs = training_costs(sparse, advice.top_k, length, rate, peak_flops, settings.utilization)
        training = [asdict(stage) for stage in costs]
    return {
        "lengths": sample.to_dict(),
        "attention": attention.to_dict(),
        "indexer": {"heads": heads, "dim": dim},
        "crossover": {str(k): asdict(found) for k, found in crossovers.items()},
        "advice": advice.to_dict(),
        "spent": saved,
        "training": training,
    }
