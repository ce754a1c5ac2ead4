"""Dense warm-up, stage 1: each layer's indexer learns equation (3) from that layer's attention.

The trunk is frozen and attends densely.
"""

from torch import Tensor

from tokensieve.model import DecoderForCausalLM, ForwardOptions
from tokensieve.train.stage import Losses, Stage, StepTotals


def losses(model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals, options: ForwardOptions) -> Losses:
    """The model's loss is the KL; labels play no part, so they are not passed on and no logits are computed."""
    loss = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], options=options).loss
    return Losses(loss, None, loss.detach())


STAGE = Stage(lambda config: "warmup", lambda config: "indexers", losses)
