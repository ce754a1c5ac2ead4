"""A training run on a number of GPUs before it starts: memory of one GPU, time of a step and of the schedule, dollars.

Memory is that of `tokensieve/cost/train_memory.py`. Operations run one after the other, with the tokens that go to
divided experts and back, for which they wait. Beside them FSDP's layers and gradients go between GPUs, and to the host
and back if they are kept there, and so do the entries of context parallelism. A step takes the longer of the two.
Gradients that go to the host to be added to those of an earlier micro-batch are waited for. FLOPs are divided evenly
over the GPUs. Not counted: the optimizer's own pass over its moments, what else the processors do, reading data,
checkpoints, and GPUs that wait for each other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.cost.division import experts_refusal, refusal
from tokensieve.cost.gpus import NODE, Gpu, gpu_of
from tokensieve.cost.rates import PEAK, Rate
from tokensieve.cost.serving import USABLE
from tokensieve.cost.shape import Shape
from tokensieve.cost.token_cost import Part, Timed
from tokensieve.cost.train_memory import (
    ACTIVATIONS,
    GATHERED,
    VALUE,
    WEIGHT,
    Held,
    Ranks,
    exact,
    host_memory,
    layer_parameters,
    memory,
    stored,
    tables,
    trained,
)
from tokensieve.cost.train_rates import TrainRates, measured_rates
from tokensieve.cost.training import Adapters, Stage, TrainFlops, recomputed_flops, train_flops_parts

TRAINING = ("H100", "H200", "H800", "B200")  # training runs on CUDA devices
TOKENS = "tokens on the way to experts and back"
ADDED = "gradients to the host, to be added there"
WAITED_FOR = (TOKENS, ADDED)
MACHINES = 256  # the most that a refusal looks for


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives from others in a step, and the bandwidth of their way in bytes/s."""

    name: str
    bytes: float
    bandwidth: float


@dataclass(frozen=True)
class PhasePlan(Timed):
    """A step of one phase, seen from one GPU.

    model_flops: of all GPUs together, without what is recomputed. offload: of what lasts to the host's memory.
    """

    phase: PhaseConfig
    memory: tuple[Held, ...]
    traffic: tuple[Traffic, ...]
    model_flops: float
    offload: bool

    @property
    def label(self) -> str:
        """As of all times; with offload they are lower bounds, since what the processors do is not counted."""
        return "roofline" if self.offload else super().label

    @property
    def bytes(self) -> int:
        return sum(held.bytes for held in self.memory)


@dataclass(frozen=True)
class Job:
    """A configured run of a model of this shape. adapters: those that learn in the trunk's place (LoRA)."""

    config: TrainConfig
    shape: Shape
    adapters: Adapters | None = None


@dataclass(frozen=True)
class StagePlan:
    """The plan of a job. `ranks` has the config's context_parallel and expert_parallel."""

    job: Job
    gpu: Gpu
    ranks: Ranks
    phases: tuple[PhasePlan, ...]

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def heaviest(self) -> PhasePlan:
        """The phase with the most memory."""
        return max(self.phases, key=lambda p: p.bytes)

    def activations(self, checkpointing: bool) -> int:
        """Bytes of activations of one GPU in the heaviest phase, with every layer recomputed or kept."""
        changed = replace(self.job, config=replace(self.config, activation_checkpointing=checkpointing))
        held = _memory(changed, self.ranks, self.heaviest.phase)
        return next(h.bytes for h in held if h.name == ACTIVATIONS)

    @property
    def host(self) -> list[Held]:
        """What one GPU keeps in the memory of its host."""
        job = self.job
        return host_memory(job.shape, objective(job.config), self.ranks, job.adapters) if job.config.offload else []

    @property
    def tokens(self) -> int:
        return sum(p.phase.steps * p.phase.sequences * p.phase.context for p in self.phases)

    @property
    def seconds(self) -> float:
        return sum(p.phase.steps * p.seconds for p in self.phases)

    @property
    def label(self) -> str:
        """The labels of the phases' times."""
        return "; ".join(dict.fromkeys(p.label for p in self.phases))

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.ranks.gpus / 3600

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs' bf16 peak would do in the same time; what is recomputed does not count."""
        flops = sum(p.phase.steps * p.model_flops for p in self.phases)
        return flops / (self.seconds * self.ranks.gpus * self.gpu.bf16)


def usable(gpu: Gpu) -> float:
    """Bytes of a GPU's memory that a plan may fill; the rest is for libraries and for fragments."""
    return USABLE * gpu.memory


def objective(config: TrainConfig) -> Stage:
    """The stage whose costs a run has: adaptation without selection costs as much as pretraining."""
    return "pretrain" if config.stage == "adapt" and not config.selection else config.stage


def plan(job: Job, gpu: Gpu, gpus: int, rates: TrainRates) -> StagePlan:
    """The plan of a job on `gpus` GPUs.

    rates: shares that are given. Where they are `PEAK`, a share that was measured for such a model takes its place.
    UserError for settings that training refuses, and for what does not fit, with what would.
    """
    config = job.config
    ranks = Ranks(gpus, config.context_parallel, config.expert_parallel)
    _check_gpus(job, gpu, ranks)
    if (reason := refusal(config, ranks)) is not None:
        would = (c for c in _divisors(gpus) if refusal(config, replace(ranks, context=c)) is None)
        raise UserError(reason + "".join(f"; --set context_parallel={c} would do" for c in [*would][:1]))
    if (reason := experts_refusal(job.shape, ranks, job.adapters)) is not None:
        raise UserError(reason)
    phases = tuple(_phase(job, gpu, ranks, rates, phase) for phase in config.phases)
    found = StagePlan(job, gpu, ranks, phases)
    if found.heaviest.bytes > usable(gpu):
        raise UserError(_does_not_fit(found))
    return found


def _check_gpus(job: Job, gpu: Gpu, ranks: Ranks) -> None:
    config = job.config
    if gpu.name not in TRAINING:
        raise UserError(f"--gpu {gpu.name}: training runs on CUDA devices; use one of {', '.join(TRAINING)}")
    if config.device == "cpu":
        raise UserError("device is cpu, and a plan is for GPUs; add --set device=auto")
    if not config.phases:
        raise UserError("the run has no phases: give at least one [[phases]] table")
    if ranks.gpus < 1:
        raise UserError(f"--gpus {ranks.gpus}: give at least 1")
    if ranks.gpus > NODE and ranks.gpus % NODE:
        raise UserError(f"--gpus {ranks.gpus}: no whole machines of {NODE}; give {NODE} or less, or a multiple")
    if (config.lora is None) != (job.adapters is None):
        raise ValueError("give the sizes of the adapters of a run by LoRA, and of no other")
    if objective(config) != "pretrain" and not job.shape.sparse:
        raise UserError(f"{config.stage} needs a shape with an indexer; `with_indexer` adds one")


def _divisors(gpus: int) -> list[int]:
    return [c for c in range(1, gpus + 1) if gpus % c == 0]


# What would fit


def _does_not_fit(found: StagePlan) -> str:
    job, gpu, ranks = found.job, found.gpu, found.ranks
    heaviest = found.heaviest
    largest = sorted(heaviest.memory, key=lambda held: held.bytes, reverse=True)[:2]
    parts = " and ".join(f"{held.name} {held.bytes / 1e9:.1f} GB" for held in largest)
    needs = (
        f"the plan does not fit: it takes {heaviest.bytes / 1e9:.1f} GB, above all {parts}, of the "
        f"{usable(gpu) / 1e9:.1f} GB of one {gpu.name} that can be used"
    )
    ways = [*_other_settings(job, gpu, ranks), *_more_gpus(job, gpu, ranks)]
    ways = ways or [f"--gpu {name}" for name in TRAINING if _fits(job, gpu_of(name), ranks)]
    if ways:
        return f"{needs}; what fits: {'; or '.join(ways)}"
    one = max(kind.held(ranks) for kind in layer_parameters(job.shape))
    one_token = (PhaseConfig(1, 1, 1),)
    shorter = replace(job, config=replace(job.config, phases=one_token, context_parallel=1, kl_every=1))
    remedy = "; take shorter sequences" if _holds(shorter, gpu, replace(ranks, context=1)) else ""
    return (
        f"{needs}, and no other settings, {MACHINES} machines or other GPUs do: a layer of {one / 1e9:.1f} billion "
        f"parameters is gathered whole, with the next one{remedy}"
    )


def _fits(job: Job, gpu: Gpu, ranks: Ranks) -> bool:
    divides = refusal(job.config, ranks) is None and experts_refusal(job.shape, ranks, job.adapters) is None
    return divides and _holds(job, gpu, ranks)


def _holds(job: Job, gpu: Gpu, ranks: Ranks) -> bool:
    return all(sum(held.bytes for held in _memory(job, ranks, p)) <= usable(gpu) for p in job.config.phases)


def _changed(
    job: Job, ranks: Ranks, experts: Sequence[int], may_offload: bool = False
) -> Iterator[tuple[Job, Ranks, list[str]]]:
    """The run with fewer tokens on a GPU, and with less kept of them: each with its changes, few of them first.

    experts: numbers of ranks that may divide them; another one than now comes late. may_offload: whether what lasts may
    go to the host's memory; that comes last.
    """
    config = job.config
    recompute = not config.activation_checkpointing and config.stage != "warmup"
    home = (False, True) if may_offload and not config.offload and ranks.gpus > 1 else (False,)
    smaller = any(phase.micro_batch > 1 for phase in config.phases)
    context = [c for c in _divisors(ranks.gpus) if c >= ranks.context]
    choices = product(
        (False, True) if recompute else (False,), (False, True) if smaller else (False,), context, experts, home
    )
    order = sorted(
        choices, key=lambda x: (x[4], x[3] != ranks.experts, x[2] != ranks.context, x[2], x[0] + x[1], x[1], x[3])
    )
    for again, single, c, dividing, away in order:
        changes = ["--set activation_checkpointing=true"] if again else []
        phases = tuple(replace(phase, micro_batch=1) for phase in config.phases) if single else config.phases
        changes += [
            f"--set phases.{i}.micro_batch=1" for i, p in enumerate(config.phases) if single and p.micro_batch > 1
        ]
        changes += [f"--set context_parallel={c}"] if c != ranks.context else []
        changes += [f"--set expert_parallel={dividing}"] if dividing != ranks.experts else []
        changes += ["--set offload=true"] if away else []
        checkpointing, offload = config.activation_checkpointing or again, config.offload or away
        # The config checks its contexts; those that do not divide are refused afterwards.
        changed = replace(
            config, activation_checkpointing=checkpointing, phases=phases, context_parallel=1, offload=offload
        )
        yield replace(job, config=changed), replace(ranks, context=c, experts=dividing), changes


def _other_settings(job: Job, gpu: Gpu, ranks: Ranks) -> Iterator[str]:
    """The settings with which the same GPUs would do, if any: the fewest changes, and the fewest GPUs to a sequence."""
    experts = [x for x in _divisors(ranks.gpus) if x >= ranks.experts]
    for changed, other, changes in _changed(job, ranks, experts, may_offload=True):
        if changes and _fits(changed, gpu, other):
            yield " ".join(changes)
            return


def _more_gpus(job: Job, gpu: Gpu, ranks: Ranks) -> Iterator[str]:
    """The fewest GPUs that would do, with the same settings if they can, or else with others."""
    counts = [n for n in (2, 4, *range(NODE, NODE * MACHINES + 1, NODE)) if n > ranks.gpus and n % ranks.experts == 0]
    for gpus in counts:
        for changed, other, changes in _changed(job, replace(ranks, gpus=gpus), [ranks.experts]):
            if _fits(changed, gpu, other):
                yield " ".join([f"--gpus {gpus}", *changes])
                return


# One phase


def _memory(job: Job, ranks: Ranks, phase: PhaseConfig) -> list[Held]:
    config = job.config
    return memory(
        job.shape,
        objective(config),
        ranks,
        sequences=phase.micro_batch,
        context=phase.context,
        checkpointing=config.activation_checkpointing,
        offload=config.offload,
        adapters=job.adapters,
    )


def _phase(job: Job, gpu: Gpu, ranks: Ranks, rates: TrainRates, phase: PhaseConfig) -> PhasePlan:
    config, shape, adapters = job.config, job.shape, job.adapters
    stage = objective(config)
    known = measured_rates(shape, stage, phase.context, gpu)
    pass_tokens = phase.micro_batch * phase.context // ranks.context  # every rank forms what its adapters add
    model = train_flops_parts(shape, stage, phase.context, adapters, config.kl_every, pass_tokens)
    again = TrainFlops(0, 0)
    if config.activation_checkpointing:
        again = recomputed_flops(shape, stage, phase.context)
        if adapters is not None:
            again = again._replace(products=again.products + adapters.flops(phase.context, pass_tokens)[0])
    if adapters is not None and known.products != PEAK:  # measured while all weights learned
        known = replace(known, products=replace(known.products, label="extrapolated"))

    def part(name: str, flops: float, given: Rate, measured: Rate) -> Part:
        """flops: of one sequence."""
        rate, flops = measured if given == PEAK else given, flops * phase.sequences / ranks.gpus
        return Part(name, flops, 0, flops / (gpu.bf16 * rate.share), "compute", rate.label)

    traffic = tuple(_traffic(job, gpu, ranks, phase))

    def exchange(name: str, *chosen: Traffic) -> Part:
        seconds = sum(t.bytes / (t.bandwidth * rates.network.share) for t in chosen)
        return Part(name, 0, sum(t.bytes for t in chosen), seconds, "interconnect", rates.network.label)

    parts = [
        part("products with weights", model.products + again.products, rates.products, known.products),
        part("attention and indexers", model.keys + again.keys, rates.attention, known.attention),
    ]
    parts += [exchange(t.name, t) for t in traffic if t.name in WAITED_FOR]
    ways = "between GPUs and to the host" if config.offload else "between GPUs"
    beside = exchange(ways, *(t for t in traffic if t.name not in WAITED_FOR))
    held = tuple(_memory(job, ranks, phase))
    return PhasePlan(tuple(parts), beside, phase, held, traffic, phase.sequences * sum(model), config.offload)


def _traffic(job: Job, gpu: Gpu, ranks: Ranks, phase: PhaseConfig) -> Iterator[Traffic]:
    """Traffic of one GPU in a step. A collective over machines uses the network of all their GPUs at once."""
    config, shape = job.config, job.shape
    stage = objective(config)
    weights, learns = stored(shape, stage, job.adapters), trained(shape, stage, job.adapters)
    passes = phase.sequences // (phase.micro_batch * ranks.shards)
    T = phase.micro_batch * phase.context
    again = config.activation_checkpointing and stage != "warmup"

    def bandwidth(gpus: int) -> float:
        return gpu.link if gpus <= NODE else min(gpu.link, NODE * gpu.network)

    if ranks.gpus > 1:
        routed = shape.moe_layers * shape.experts * 3 * shape.hidden * shape.expert_ffn if ranks.experts > 1 else 0
        warmup = stage == "warmup"  # indexers learn alone, and nothing is gathered again to go back
        gathers = 1 if warmup else 2
        once = tables(shape) + exact(shape)  # they stay gathered for the backward pass

        def received(gathered: int, learning: int, gpus: int) -> float:
            """gathered: bytes."""
            return passes * (gathered + WEIGHT * learning) * (gpus - 1) / gpus

        frozen = warmup or job.adapters is not None  # the experts, if anything is
        held = weights - routed
        gathered = GATHERED * (gathers * (held - once) + tables(shape)) + WEIGHT * exact(shape)
        learning = learns if frozen else held
        yield Traffic("layers and gradients", received(gathered, learning, ranks.gpus), bandwidth(ranks.gpus))
        if routed:
            # Those that share an expert are as far apart as others divide them, and of one machine are few.
            held, sharing = routed // ranks.experts, ranks.gpus // ranks.experts
            own = received(GATHERED * gathers * held, 0 if frozen else held, sharing)
            near = max(1, NODE // ranks.experts)
            way = gpu.link if ranks.gpus <= NODE else min(gpu.link, near * gpu.network)
            yield Traffic("experts and gradients", own, way)
        if config.offload:
            # Its own part, which it rounds only then. FSDP adds the gradients of further micro-batches on the host, and
            # so does not go on while they are copied.
            moved = WEIGHT * (passes * (gathers * (weights - once) + once) + learns) / ranks.gpus
            yield Traffic("weights from the host, first gradients to it", moved, gpu.host)
            if passes > 1:
                yield Traffic(ADDED, (passes - 1) * WEIGHT * learns / ranks.gpus, gpu.host)
    if ranks.context > 1:
        # Forward, again if layers are recomputed, and back; a warm-up sends back the gradients of index keys alone.
        entries, index = shape.attention.cached, 0 if stage == "pretrain" else shape.index_dim
        numbers = (1 + again) * (entries + index) + (index if stage == "warmup" else entries + index)
        keys = passes * shape.layers * T * numbers * VALUE * (ranks.context - 1) / ranks.context
        yield Traffic("keys and values, index keys", keys, bandwidth(ranks.context))
    if ranks.experts > 1:
        # Of a token's copies, one for each of its experts, those that leave the GPU, or of several machines its own.
        places = ranks.experts if ranks.experts <= NODE else ranks.experts // NODE
        copies = shape.experts_per_token * (1 - 1 / places) * shape.moe_layers * T / ranks.context
        there_and_back = 2 * (1 if stage == "warmup" else 2 + again)
        tokens = passes * copies * shape.hidden * VALUE * there_and_back
        yield Traffic(TOKENS, tokens, gpu.link if ranks.experts <= NODE else gpu.network)
