"""Which numbers of ranks can divide a run, for training and for its plan. A rank is a process, on GPUs one for each."""

from tokensieve.config import TrainConfig
from tokensieve.cost.shape import Shape
from tokensieve.cost.train_memory import Ranks
from tokensieve.cost.training import Adapters

ADAPTED_EXPERTS = (
    "lora.targets names experts, whose adapters add to all of a layer at once, and expert_parallel divides them; leave "
    "one of the two out"
)


def refusal(config: TrainConfig, ranks: Ranks) -> str | None:
    """Reason why a run cannot be divided over these ranks, with a remedy; or None."""
    count = "one rank" if ranks.gpus == 1 else f"{ranks.gpus} ranks"
    for name, sharing in (("context_parallel", ranks.context), ("expert_parallel", ranks.experts)):
        if ranks.gpus % sharing:
            start = f"start a multiple of {sharing}: torchrun --nproc-per-node {sharing}"
            remedy = f"leave it out, or {start}" if ranks.gpus == 1 else f"make it a divisor, or {start}"
            return f"{name} is {sharing}, which does not divide {count}; {remedy}"
    if config.offload and ranks.gpus == 1:
        return (
            "offload keeps in the host's memory what several ranks shard, and this is one; leave it out, or start "
            "several, on GPUs"
        )
    if config.budget is not None and ranks.gpus > 1:
        return f"budget runs in one process so far, and this run has {ranks.gpus}; leave it out"
    for phase in config.phases:
        together = phase.micro_batch * ranks.shards
        members = "one rank" if ranks.context == 1 else f"{ranks.context} ranks"
        if phase.sequences % together:
            return (
                f"{phase.sequences} sequences a step do not divide into micro-batches of {phase.micro_batch} on "
                f"{ranks.shards} groups of {members}; make phases.sequences a multiple of {together}, or "
                f"change how many ranks share a sequence (context_parallel)"
            )
        multiple = 2 * ranks.context * config.kl_queries
        if ranks.context > 1 and phase.context % multiple:
            return (
                f"phases.context is {phase.context}; {ranks.context} ranks share sequences of a multiple of {multiple} "
                "tokens; change it"
            )
    return None


def experts_refusal(shape: Shape, ranks: Ranks, adapters: Adapters | None = None) -> str | None:
    """Reason why so many ranks cannot divide the experts of a model and then the matrices of one; or None."""
    experts, sharing = ranks.experts, ranks.gpus // ranks.experts
    if experts == 1:
        return None
    if not shape.experts:
        return f"expert_parallel is {experts}, and the model has no routed experts; leave it out"
    if adapters is not None and adapters.experts:
        return ADAPTED_EXPERTS
    if shape.experts % experts:
        return (
            f"expert_parallel is {experts}, and the model has {shape.experts} routed experts; make it a divisor of them"
        )
    widths = 2 * shape.expert_ffn, shape.hidden
    if any(width % sharing for width in widths):
        return (
            f"expert_parallel is {experts}, so {sharing} of {ranks.gpus} ranks share an expert, and they do not divide "
            f"the {widths[0]} and {widths[1]} rows of its matrices; make it larger, or start another number of ranks"
        )
    return None
