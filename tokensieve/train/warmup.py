"""Dense warm-up, stage 1: the trunk is frozen and attends densely; each layer's indexer learns equation (3) from that layer's attention."""

from torch import Tensor

from tokensieve.config import TrainConfig
from tokensieve.model import DecoderForCausalLM, KLScale
from tokensieve.train.stage import Losses, Stage, StepTotals


def prepare(model: DecoderForCausalLM, config: TrainConfig) -> None:
    model.train_for("warmup")


def losses(model: DecoderForCausalLM, batch: dict[str, Tensor], totals: StepTotals) -> Losses:
    """The model's loss is the KL; labels play no part, so they are not passed on and no logits are computed."""
    model.model.kl_scale = KLScale(per_query=1.0 / totals.queries)
    loss = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).loss
    return Losses(loss, None, loss.detach())


STAGE = Stage(prepare, losses)
