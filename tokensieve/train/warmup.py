"""Dense warm-up, stage 1: each layer's indexer learns equation (3) from that layer's attention.

The trunk is frozen and attends densely.
"""

from torch import Tensor

from tokensieve.model import DecoderForCausalLM, ForwardOptions
from tokensieve.train.stage import Losses, Stage, StepTotals


def losses(model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals, options: ForwardOptions) -> Losses:
    """The loss is the KL; labels play no part, so the trunk is enough."""
    kl = model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], options=options).kl
    assert kl is not None
    return Losses(kl, None, kl.detach())


STAGE = Stage(lambda config: "warmup", lambda config: "indexers", losses)
