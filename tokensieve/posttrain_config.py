"""Configuration of post-training: one file for the whole pipeline, as frozen dataclasses (see `tokensieve.config`)."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tokensieve.config import LoraConfig, UserError

# What TRL calls settings that have a key of their own here, by which data, rollouts and checkpoints go too.
KEYS = {
    "output_dir": "out", "seed": "seed", "max_steps": "steps", "num_train_epochs": "steps", "learning_rate": "lr",
    "save_strategy": "save_every", "save_steps": "save_every", "use_cpu": "device", "num_generations": "samples",
    "per_device_train_batch_size": "micro_batch", "gradient_accumulation_steps": "the rows or prompts of a step",
    "max_completion_length": "new_tokens",
}  # fmt: skip


def _check_counts(config: Any, table: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f"{table}{name} is {getattr(config, name)}; it must be at least 1")


def _check_rate(lr: float) -> None:
    if not 0 < lr < float("inf"):  # a NaN too
        raise UserError(f"lr is {lr}; give a finite number above 0")


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in KEYS:
            raise UserError(f"options.{name} would contradict {KEYS[name]}; set that instead")
        if name in ("logging_strategy", "logging_steps"):
            raise UserError(f"options.{name}: every step is logged, so that a loss of NaN is seen; leave it out")


def _check_merged(lora: LoraConfig | None) -> None:
    if lora is not None and not lora.merge:
        raise UserError("lora.merge is false; the next stage starts from the merged model, so leave it out")


@dataclass(frozen=True)
class SftConfig:
    """A stretch of supervised fine-tuning by TRL's SFTTrainer."""

    steps: int
    rows: int  # per step, of all modes, which TRL shuffles
    micro_batch: int = 1  # rows per forward and backward; it divides `rows`
    lr: float = 2e-5
    options: dict[str, Any] = field(default_factory=dict)  # further fields of TRL's SFTConfig
    lora: LoraConfig | None = None  # adapters learn instead of the trunk's weights, and are merged at the stage's end

    def __post_init__(self) -> None:
        _check_counts(self, "", "steps", "rows", "micro_batch")
        _check_rate(self.lr)
        _check_options(self.options)
        _check_merged(self.lora)
        if self.rows % self.micro_batch:
            raise UserError(f"micro_batch is {self.micro_batch}; it must divide rows, {self.rows}")


@dataclass(frozen=True)
class GrpoConfig:
    """A stretch of reinforcement learning by TRL's GRPOTrainer with the engine's rollouts."""

    steps: int
    prompts: int  # per step
    samples: int  # answers to each prompt
    micro_batch: int = 1  # answers per forward and backward; it divides prompts * samples
    lr: float = 1e-6
    # Further fields of TRL's GRPOConfig. `bf16` is for this stage alone: other answers on a GPU stay in bfloat16.
    options: dict[str, Any] = field(default_factory=dict)
    lora: LoraConfig | None = None  # as in SftConfig

    def __post_init__(self) -> None:
        _check_counts(self, "", "steps", "prompts", "micro_batch")
        _check_rate(self.lr)
        _check_options(self.options)
        _check_merged(self.lora)
        if self.samples < 2:
            raise UserError(f"samples is {self.samples}; a group of GRPO has at least 2 answers")
        if self.prompts * self.samples % self.micro_batch:
            raise UserError(
                f"micro_batch is {self.micro_batch}; it must divide prompts * samples, {self.prompts * self.samples}"
            )


@dataclass(frozen=True)
class DifficultyConfig:
    """The knob that is set between cold start and reinforcement learning, for each domain and mode."""

    prompts: int  # that are asked at each difficulty
    samples: int  # answers to each prompt
    tries: int = 4  # difficulties that are measured at most, from the domain's usual one on
    low: float = 0.1  # share of the answers that should pass, at least
    high: float = 0.7  # and at most
    fixed: dict[str, int] = field(default_factory=dict)  # by DOMAIN-MODE: not measured, for two runs on the same data

    def __post_init__(self) -> None:
        _check_counts(self, "difficulty.", "prompts", "samples", "tries")
        if not 0 <= self.low <= self.high <= 1:
            raise UserError(f"difficulty.low is {self.low} and high {self.high}; give shares, 0 <= low <= high <= 1")


@dataclass(frozen=True)
class OnPolicyConfig:
    """A stretch of on-policy distillation by TRL's DistillationTrainer, beside the one on the specialists' answers.

    Every prompt's own specialist is its teacher. Each answer is a row of its own, since its teacher is.
    """

    steps: int
    prompts: int  # per step; one answer to each
    lr: float = 1e-6
    model: str = ""  # to start from, "distilled": this run's; empty: the one that the specialists started from
    options: dict[str, Any] = field(default_factory=dict)  # further fields of TRL's DistillationConfig, such as beta
    lora: LoraConfig | None = None  # as in SftConfig

    def __post_init__(self) -> None:
        _check_counts(self, "distill.on_policy.", "steps", "prompts")
        _check_rate(self.lr)
        _check_options(self.options)
        _check_merged(self.lora)


@dataclass(frozen=True)
class DistillConfig:
    """The specialists' answers, and the training of one model on them."""

    prompts: int  # that each specialist is asked in each mode
    samples: int  # answers to each prompt
    keep: int  # answers of each domain and mode, at most
    train: SftConfig
    passing: float = 1.0  # score of an answer that is kept, at least
    fill: Literal["none", "demonstrations"] = "none"  # what takes the place of answers that a domain and mode lacks
    repeat: int = 1  # times that a row is trained on, at most, so that those with fewer rows weigh as much as others
    on_policy: OnPolicyConfig | None = None  # another model to compare with; None: none

    def __post_init__(self) -> None:
        _check_counts(self, "distill.", "prompts", "samples", "keep", "repeat")
        if not 0 < self.passing <= 1:
            raise UserError(f"distill.passing is {self.passing}; it must be a score above 0, and at most 1")


@dataclass(frozen=True)
class MixedConfig:
    """The one stage of reinforcement learning over all domains."""

    train: GrpoConfig
    model: str = ""  # to start from, "on-policy": this run's; empty: the distilled one
    ratios: dict[str, float] = field(default_factory=dict)  # of a domain's prompts; 1 if it is not named

    def __post_init__(self) -> None:
        for name, ratio in self.ratios.items():
            if not 0 <= ratio < float("inf"):
                raise UserError(f"rl.ratios.{name} is {ratio}; give a finite number of at least 0")


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the reward's terms, and where the length penalty begins."""

    outcome: float = 1.0
    rubric: float = 1.0
    language: float = 0.1
    length: float = 0.1
    free: float = 0.5  # share of `new_tokens` from which on an answer is penalised; its limit is all of them

    def __post_init__(self) -> None:
        for each in fields(self):
            if not 0 <= getattr(self, each.name) < float("inf"):
                raise UserError(f"reward.{each.name} is {getattr(self, each.name)}; give a number of at least 0")
        if not self.free < 1:
            raise UserError(f"reward.free is {self.free}; it must be a share below 1")


@dataclass(frozen=True)
class JudgeConfig:
    """The generative reward model of domains with a rubric. Its API key, if it needs one, is in OPENAI_API_KEY."""

    url: str = ""  # of an OpenAI-compatible server, with its /v1; empty: the command starts the judge, and ends it
    model: str = "scripted"  # its name at the url; without one, a model to serve, or scripted: by rules
    budget: int = 10_000  # questions of the whole run
    timeout: float = 60.0  # seconds for the whole of a reply
    agreement: float = 0.0  # Somers' d with the rules, below which a judge is refused; 0: it is measured and told only

    def __post_init__(self) -> None:
        _check_counts(self, "judge.", "budget")
        if not 0 < self.timeout < float("inf"):  # a NaN too
            raise UserError(f"judge.timeout is {self.timeout}; give seconds above 0, and finite")
        if not self.model:
            raise UserError("judge.model is empty; name a model, or leave it out for the scripted judge")
        if self.url and self.model == "scripted":
            raise UserError(
                f"judge.url is {self.url!r}, and judge.model is scripted, as by default, which no server has; "
                "give the judge's name there as judge.model, or no url"
            )
        if not 0 <= self.agreement <= 1:
            raise UserError(f"judge.agreement is {self.agreement}; give Somers' d from 0 to 1")

    @property
    def embedded(self) -> bool:
        """Whether the command serves the judge's model itself."""
        return not self.url and self.model != "scripted"


@dataclass(frozen=True)
class PosttrainConfig:
    """Specialists, distillation, one mixed stage of reinforcement learning, and the figures of every model."""

    model: str  # sparse checkpoint or bundled name that everything starts from
    out: str  # run folder
    tokens: int  # of a prompt, at least; several times k
    new_tokens: int  # of an answer, at most; of all turns of an agent's together
    cold: SftConfig
    difficulty: DifficultyConfig
    specialist: GrpoConfig
    distill: DistillConfig
    rl: MixedConfig
    evaluation: int  # held-out prompts of each domain and mode
    cold_steps: dict[str, int] = field(default_factory=dict)  # by domain: in place of cold.steps
    evaluations: dict[str, int] = field(default_factory=dict)  # by domain: in place of `evaluation`
    result_tokens: int = 1024  # room for the results of an agent's tools in one answer
    domains: tuple[str, ...] = ()  # none: all that there are
    modes: tuple[str, ...] = ("think", "direct")
    languages: tuple[str, ...] = ("en", "zh")  # those of them that a domain has, in turn
    selection: Literal["indexer", "dense"] = "indexer"  # dense: the dense twin, the same without selection
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig = JudgeConfig()
    beside: str = ""  # run folder of the twin, for the report to show both
    at_once: int = 32  # answers that are sampled together
    activation_checkpointing: bool = False  # recompute each layer in the backward pass
    save_every: int = 0  # steps between checkpoints of a stage; 0: none before its end
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda

    def __post_init__(self) -> None:
        _check_counts(self, "", "tokens", "new_tokens", "result_tokens", "evaluation", "at_once")
        if self.save_every < 0:
            raise UserError(f"save_every is {self.save_every}; give 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; give a whole number from 0 to {2**32 - 1}")
        if self.rl.model == "on-policy" and self.distill.on_policy is None:
            raise UserError("rl.model is on-policy, and no such model is made; add a table distill.on_policy")
        for table in ("cold_steps", "evaluations"):
            for name, value in getattr(self, table).items():
                if value < 1:
                    raise UserError(f"{table}.{name} is {value}; it must be at least 1")
        for name, values, known in (("modes", self.modes, ("think", "direct")), ("domains", self.domains, None)):
            if len(set(values)) < len(values) or (known and not (values and set(values) <= set(known))):
                allowed = f"one or both of {', '.join(known)}" if known else "each once"
                raise UserError(f"{name} is {list(values)}; name {allowed}")

    def cold_of(self, domain: str) -> SftConfig:
        """The cold start of a domain."""
        return replace(self.cold, steps=self.cold_steps.get(domain, self.cold.steps))

    def evaluation_of(self, domain: str) -> int:
        """Held-out prompts of a domain in each mode."""
        return self.evaluations.get(domain, self.evaluation)
