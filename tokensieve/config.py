"""Every configuration of a run, as frozen dataclasses read from TOML.

Every key that a run's file may hold is a field below. A missing key takes the default that stands here, an unknown
one is an error, and `--set a.b=value` changes one. (A model's config is its family's: `tokensieve.families`.)
"""

import dataclasses
import importlib.resources
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import dacite

from tokensieve.integers import LARGEST, is_too_large

T = TypeVar("T")
DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?")


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the remedy.

    The command line prints it and exits with status 2.

    Several arguments are several reasons, a line each. alone: this process has met it, and others of the job have not.
    """

    alone = False

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


SELECTOR_NAMES = ("indexer", "window", "sinks", "oracle", "dense")  # the names of tokensieve.model.selection's own


def check_selector(name: str) -> str:
    """The name of a selector as given, without importing it. UserError unless in SELECTOR_NAMES or module:function."""
    module, _, function = name.partition(":")
    if name not in SELECTOR_NAMES and not (module and function):
        raise UserError(
            f"selection {name!r} is unknown; use one of {', '.join(SELECTOR_NAMES)}, or module:function for your own"
        )
    if name not in SELECTOR_NAMES and not _is_there(module.partition(".")[0]):
        raise UserError(f"selection {name}: there is no module {module}; is it on PYTHONPATH?")
    return name


def _is_there(module: str) -> bool:
    """Whether a top-level module is loaded or could be, without importing it."""
    return module in sys.modules or (module != "" and importlib.util.find_spec(module) is not None)


KL_BLOCK = 32  # neighbouring queries that have their KL together in adaptation: kernels read tiles of them
GENERATED = ("retrieval", "chat")  # sources that are made from the text of others


@dataclass(frozen=True)
class SourceConfig:
    source: str  # "python", "retrieval", "chat", a folder, a file, a glob or hf:NAME; of rows also SOURCE#FIELD
    weight: float = 1.0  # share of the sequences, relative to the other sources


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = (SourceConfig("python"),)
    tokenizer: str = "base"  # folder of a tokenizer, a GGUF file, or the name of a model
    cache: str = ""  # folder of the tokenized text; empty: the user's cache folder
    held_out_share: float = 0.02  # share of modules kept for evaluation
    limit_bytes: int | None = None  # of text read from each source
    answer_weight: float = 1.0  # weight in the loss of answers that only the context can tell (the needles' values)


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 7.3e-6  # peak, per step of AdamW
    lr_end: float = 0.0  # as a share of the peak, approached at the last step
    warmup_steps: int = 0  # linear from 0 to the peak
    weight_decay: float = 0.0  # per step, times lr; matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest gradient norm of the trunk
    indexer_lr: float | None = None  # peak for the indexers; None: the same as lr
    indexer_clip: float = 1.0  # largest gradient norm of all indexers together

    def __post_init__(self) -> None:
        for name in ("lr", "indexer_lr", "clip", "indexer_clip"):  # a negative clip would turn gradients round
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):  # a NaN too
                raise UserError(f"optimizer.{name} is {value}; give a finite number of at least 0")


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of a run with one sequence length."""

    steps: int
    context: int  # tokens per sequence
    sequences: int  # per step
    micro_batch: int = 1  # sequences per forward and backward
    yarn: bool = True  # pretrain: False trains before context extension, with the plain frequencies
    lr_scale: float = 1.0  # times the schedule
    lr_scale_end: float | None = None  # at the phase's last step, linear in between; None: as lr_scale


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that learn in place of the trunk's weights W: W + alpha / rank * B A.

    Source: arXiv 2106.09685.
    """

    rank: int = 16
    alpha: int | None = None  # None: twice the rank
    dropout: float = 0.0  # of an adapter's input; 0 if kv_b_proj or experts are among the targets
    targets: str | tuple[str, ...] = "all-linear"  # of the trunk; or names of layers, of experts' tensors too
    merge: bool = True  # at the end of the run, write the model with its adapter merged into OUT/merged

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be at least 0 and less than 1")


@dataclass(frozen=True)
class BudgetConfig:
    """A number of keys for each layer, `index_topk` in the mean, learned from attention on the run's own sequences.

    The model's config keeps them as `index_topk_by_layer`.
    """

    sequences: int = 4  # of the last phase, the first ones; their documents of more than k tokens are read
    queries: int = 128  # measured in each layer of each document
    most: int = 4  # a layer gets at most so many times index_topk

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("queries", 1), ("most", 2)):
            if getattr(self, name) < least:
                raise UserError(f"budget.{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class TrainConfig:
    stage: Literal["pretrain", "warmup", "adapt"]
    model: str  # checkpoint or bundled name to start from; empty: pretrain begins with a new one, of a [shape]
    out: str  # run folder
    phases: tuple[PhaseConfig, ...]
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    shape: dict[str, Any] = field(default_factory=dict)  # pretrain: fields of the new model's config; with `model`,
    # its positions if they change: max_position_embeddings, rope_parameters
    selection: bool | str = (
        True  # adapt: by the indexer; False or "dense": none, the dense model on the same tokens; or a selector's name
    )
    lora: LoraConfig | None = None  # adapt: adapters learn instead of the trunk's weights; None: the weights themselves
    # Give each layer a k of its own: warmup after its last step, adapt before its first; None: k stays as it is.
    budget: BudgetConfig | None = None
    # Take the KL at every so many queries, at others in the next step; in adapt at blocks of 32.
    kl_every: int = 1
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    backend: Literal["auto", "reference"] = "auto"  # of the ops; reference: plain PyTorch throughout
    compile: bool = False  # torch.compile whole layers where no indexer learns, the feed-forward part otherwise
    # Ranks that share the tokens of a sequence, a divisor of torchrun's processes; the others read other sequences.
    context_parallel: int = 1
    # Ranks that divide the routed experts of every layer, a divisor of torchrun's processes and of the experts.
    expert_parallel: int = 1
    activation_checkpointing: bool = False  # recompute each layer in the backward pass
    # On several GPUs, keep their parts of parameters, gradients and moments in the host's memory. AdamW runs there too.
    offload: bool = False
    balance_rate: float = 1e-3  # pretrain: step of the router's correction bias towards even load
    save_every: int = 0  # steps between checkpoints; 0: only at the end and on Ctrl-C
    keep: int = 2  # checkpoints kept
    log_every: int = 1  # steps
    workers: int = 0  # processes that prepare data; 0: the training process does
    track: tuple[str, ...] = ("tensorboard",)  # also "wandb"

    def __post_init__(self) -> None:
        if not isinstance(self.selection, bool | str):
            raise UserError(
                f"selection takes a name, and got {self.selection!r}; write your own function as module:function, or "
                "run inside a tokensieve.selecting block"
            )
        if isinstance(self.selection, str) and self.selection != "dense" and self.stage != "adapt":
            raise UserError(
                f"selection is {self.selection}, and {self.stage} attends to every key; leave it out, it is for adapt"
            )
        for name, least in (("seed", 0), ("save_every", 0), ("context_parallel", 1), ("expert_parallel", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.kl_every < 1 or (self.kl_every > 1 and self.stage == "pretrain"):
            raise UserError(f"kl_every is {self.kl_every} in {self.stage}; it is at least 1, and 1 in pretrain")
        if self.offload and self.device == "cpu":
            raise UserError("offload is true and device is cpu, whose memory is the host's; leave one of the two out")
        ranks = self.context_parallel
        multiple = self.kl_queries * (2 * ranks if ranks > 1 else 1)
        if any(phase.context % multiple for phase in self.phases):
            given = [f"{key} is {n}" for key, n in (("kl_every", self.kl_every), ("context_parallel", ranks)) if n > 1]
            raise UserError(
                f"{' and '.join(given)}; in {self.stage} every phases.context must be a multiple of {multiple}"
            )
        if self.lora is not None and self.stage != "adapt":
            raise UserError(f"lora is a setting of adapt, and the stage is {self.stage}; leave it out")
        if self.budget is not None and (self.stage == "pretrain" or self.lora is not None or self.selection is False):
            where = self.stage if self.stage == "pretrain" else "adapt by lora" if self.lora else "the dense model"
            raise UserError(f"budget shares keys out among a model's indexers, not in {where}; leave it out")
        if self.selection == "dense":
            object.__setattr__(self, "selection", False)

    @property
    def kl_queries(self) -> int:
        """Neighbouring queries of which some have a KL in a step and the others have not; 1 if all have."""
        return 1 if self.kl_every == 1 else self.kl_every * (1 if self.stage == "warmup" else KL_BLOCK)


@dataclass(frozen=True)
class AcceptanceSizes:
    """How much a base model is asked. Without completions or answers these parts are left out."""

    contexts: tuple[int, ...]  # tokens of the needle contexts
    needles: tuple[int, ...]  # in a context
    prompts_per_decile: int
    long: int  # tokens, for the loss with much context
    short: int  # tokens, for the loss of the same tokens with little
    sequences: int  # long sequences whose ends are scored
    completions: int  # held-out functions
    answers: int  # chat prompts
    new_tokens: int  # at most, in an answer or a completion


@dataclass(frozen=True)
class ParitySizes:
    """How much a sparse model is asked, beside the dense one, in each of the contexts."""

    contexts: tuple[int, ...]  # tokens of a prompt, all more than k
    texts: int  # held-out sequences whose perplexity is measured
    needle_contexts: int  # each holds 16 needles, every one asked for
    ppl_after: int = 0  # tokens that perplexity leaves out, if more than k: as many in every evaluation of a sweep of k
    times_k: int = 0  # a context is lengthened to at least so many times the model's k tokens; 0: none is
    recall_sequences: int = 2  # held-out sequences in which the indexer's recall is measured
    recall_queries: int = 128  # queries measured in each layer of each of these sequences

    def lengths(self, top_k: int) -> tuple[int, ...]:
        """The contexts for a model that selects `top_k` keys."""
        return tuple(max(context, self.times_k * top_k) for context in self.contexts)


LONG_TASKS = (
    "single",
    "multikey",
    "multivalue",
    "multiquery",
    "variables",
    "common_words",
    "cross_document",
    "repository",
)


@dataclass(frozen=True)
class LongSizes:
    """How much `tokensieve eval --suite long` asks, and how hard it is: RULER's kinds of tasks, and perplexity."""

    contexts: tuple[int, ...] = (4096, 8192)  # tokens of a prompt with its answer
    tasks: tuple[str, ...] = LONG_TASKS
    prompts: int = 64  # questions of each task in each context
    other_prompts: int | None = None  # for arms on which nothing is decided: as many of these; None: all
    top_k: tuple[int, ...] = ()  # keys that the sparse arms select; none: as many as the model's config says; in a demo
    # further ones, for the indexer alone
    haystack: Literal["documents", "filler", "pairs"] = "documents"  # around what is hidden
    key: Literal["words", "numbers", "uuids"] = "words"  # of needles
    value: Literal["words", "numbers", "uuids"] = "numbers"  # of needles
    keys: int = 16  # multikey, multiquery and repository: hidden in a context
    asked: int = 4  # multikey, multiquery and repository: questions of one context, at most
    values: int = 4  # multivalue: of the key
    together: int = 4  # multiquery: keys that one question asks for
    chains: int = 4  # variables and cross_document: in a context, each asked for
    hops: int = 2  # variables: assignments after the first
    common: int = 5  # common_words: asked for
    often: int = 30  # common_words: times that each of these comes
    rarely: int = 3  # common_words: times that each of the others comes
    texts: int = 8  # held-out sequences of the longest context whose perplexity is measured; 0: none
    buckets: int = 16  # stretches of a sequence


@dataclass(frozen=True)
class ShortSizes:
    """How much `tokensieve eval --suite short` asks, all of it in prompts of less than 512 tokens."""

    prompts: int = 200  # questions of each task
    texts: int = 32  # held-out sequences whose perplexity is measured
    tokens: int = 512  # of a sequence


@dataclass(frozen=True)
class OwnSizes:
    """What is measured of a model unless a suite is named, and at the end of a speedrun."""

    base: AcceptanceSizes  # of a dense model
    sparse: ParitySizes


@dataclass(frozen=True)
class DemoConfig:
    """The main job: dense -> sparse, with every arm measured on the same prompts."""

    model: str
    out: str
    context: int  # tokens, of training sequences and evaluation prompts
    top_k: int  # selected keys per query
    index_heads: int  # of every layer's indexer
    index_dim: int  # width of an index head
    warmup: TrainConfig
    adapt: TrainConfig
    needle_contexts: int  # each holds 16 needles, every one asked for; 0: none, for a model not trained on them
    ppl_sequences: int  # texts of `context` tokens on which dense, sparse and oracle are compared
    decode_contexts: tuple[int, ...]  # tokens of context when a token and a chunk are timed
    other_prompts: int | None = None  # texts and needle contexts of arms on which nothing is decided; None: all
    index_init: Literal["random", "attention"] = "random"  # what the indexers begin from; a control stays random
    texts: str = "bundled"  # to evaluate on: those of the package, or a source of data; its held-out part if it trains
    heat_lengths: tuple[int, ...] = ()  # tokens, rows of the needle heat map
    recall_steps: tuple[int, ...] = (10, 50, 200, 500)  # training steps after which recall is measured, beside the last
    recall_sequences: int = 2  # held-out sequences in which recall is measured
    recall_queries: int = 128  # queries measured in each layer of each of these sequences
    long: LongSizes | None = None  # RULER's kinds of tasks, beside the needles; None: none
    short: ShortSizes | None = None  # prompts far below k; None: none
    seed: int = 0


@dataclass(frozen=True)
class SpeedrunConfig:
    """Pretrain, warm-up, adaptation and evaluation in one resumable command.

    What the three runs start from, where they are kept, and their tokenizer (pretraining's) are the speedrun's own.
    """

    out: str
    top_k: int  # selected keys per query
    index_heads: int  # of every layer's indexer
    index_dim: int  # width of an index head
    pretrain: TrainConfig
    warmup: TrainConfig
    adapt: TrainConfig
    evaluate: OwnSizes


def config_path(name: str) -> Path:
    """A file as given, or a bundled config by its bare name."""
    if Path(name).is_file():
        return Path(name)
    bundled = Path(str(importlib.resources.files("tokensieve") / "configs" / f"{name}.toml"))
    if bundled.is_file():
        return bundled
    known = ", ".join(sorted(p.stem for p in bundled.parent.glob("*.toml")))
    raise UserError(f"config {name!r}: no such file, and not a bundled one ({known}); give a path to a .toml file")


def load_config(kind: type[T], name: str, overrides: tuple[str, ...] = ()) -> T:
    """The run configuration `kind` from a TOML file, changed by `a.b=value` overrides.

    Values are in TOML syntax, or decimals such as `.5` and `1.`; bare words are strings.
    """
    path = config_path(name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"config {path}: not valid TOML ({error}); correct the file") from error
    except OSError as error:
        raise UserError(
            f"config {path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    for override in overrides:
        set_value(raw, override)
    return from_dict(kind, raw, str(path))


def set_value(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {override[:80]}: write it as key=value, for example --set optimizer.lr=1e-4")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = float(text) if DECIMAL.fullmatch(text.strip()) else text
    *tables, last = key.strip().split(".")
    node: Any = raw
    for table in tables:
        node = node[int(table)] if _is_entry(node, table) else _table(node, table, override)
    if _is_entry(node, last):
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"--set {override[:80]}: this does not name a setting; see the config file for its keys")


def _is_entry(node: Any, number: str) -> bool:
    return isinstance(node, list) and number in map(str, range(len(node)))


def _table(node: Any, key: str, override: str) -> Any:
    if not isinstance(node, dict):
        raise UserError(f"--set {override[:80]}: {key[:40]} does not name a table; see the config file for its keys")
    return node.setdefault(key, {})


def _number(value: Any) -> Any:
    """A whole number as a float. WrongTypeError, to which dacite adds the key, for true and false."""
    if isinstance(value, bool):
        raise dacite.WrongTypeError(float, value)
    return float(value) if isinstance(value, int) else value


def from_dict(kind: type[T], raw: dict[str, Any], where: str) -> T:
    for key, value in flat(raw):
        if any(map(is_too_large, value if isinstance(value, list | tuple) else [value])):
            raise UserError(f"config {where}: {key} is beyond {LARGEST}, the largest whole number; correct the value")
    try:
        types = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number}, check_types=True)
        return dacite.from_dict(kind, raw, types)
    except dacite.UnexpectedDataError as error:
        names = ", ".join(sorted(error.keys))
        raise UserError(
            f"config {where}: unknown key {names}; known keys are the fields of {kind.__name__} in "
            f"{kind.__module__.replace('.', '/')}.py"
        ) from error
    except (dacite.DaciteError, ValueError, TypeError) as error:
        raise UserError(f"config {where}: {' '.join(str(error).split())[:500]}; correct the value") from error


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in a config's tables, each key as `--set` takes it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    tables = [(f"{key}.{name}" if key else str(name), entry) for name, entry in entries]
    if isinstance(value, dict) or any(isinstance(entry, dict) for _, entry in tables):
        for name, entry in tables:
            yield from flat(entry, name)
    else:
        yield key, value
