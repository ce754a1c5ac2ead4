"""The command that plans a training run on many GPUs: memory, time, dollars, and the command that starts it."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.pricing import PRICE, TOP_K, config_of, finite, is_published
from tokensieve.cli.program import OneProcess, Set, app, overrides, stdout
from tokensieve.files import MERGED

if TYPE_CHECKING:
    from tokensieve.config import TrainConfig
    from tokensieve.cost import Adapters, Shape

FOLDER, WARMED_UP = "FOLDER", "WARMED_UP"  # in the place of a model whose weights are not here
UNTRAINED = "runs/untrained"


@app.command(cls=OneProcess)
def plan(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="Stages in their order: .toml files, or bundled configs.")
    ],
    gpus: Annotated[int, typer.Option(help="How many, together.")] = 8,
    gpu: Annotated[str, typer.Option(help="H200, H100, H800 or B200.")] = "H200",
    model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint folder, a config.json, or a published shape by name (a model_type without one stands "
            "for its config class's own sizes); the config's own model if not given."
        ),
    ] = None,
    price: Annotated[float, typer.Option(min=0, callback=finite, help="Dollars a GPU hour.")] = PRICE,
    top_k: Annotated[int, typer.Option(min=1, help="Keys that a dense model will select.")] = TOP_K,
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="NAME=SHARE", help="A share of the peak: products, attention or network."),
    ] = None,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON in place of the tables.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("runs/plan"),
) -> None:
    """Show whether a training run fits on GPUs, how long it takes, what it costs, and the command that starts it.

    Nothing is loaded: a model's config.json is enough, and a published shape needs none. If a plan does not fit, the
    error names settings that would. Each figure is labelled: counted, estimated, measured, or roofline.

    Example: tokensieve plan moonlight-16b-a3b-adapt --model moonlight-16b-a3b --gpus 8 --gpu H200
    """
    from tokensieve.config import TrainConfig, UserError, load_config

    _check_changes(set_, several=len(configs) > 1)
    written = [load_config(TrainConfig, name, tuple(set_ or ())) for name in configs]
    stages = [load_config(TrainConfig, configs[0], overrides(set_, model)), *written[1:]]
    _check_folders(configs, stages)
    if not stages[0].model and not _makes(stages[0]):
        raise UserError(f"{configs[0]} names no model; give one with --model, a folder or a published shape")
    from tokensieve.cost import gpu_of, with_indexer
    from tokensieve.cost.plan import Job, objective
    from tokensieve.cost.plan import plan as plan_of
    from tokensieve.cost.rates import given_rates
    from tokensieve.cost.train_rates import TrainRates
    from tokensieve.files import write_json
    from tokensieve.report import NamedPlan, plan_figures, show_plan

    chosen, rates = gpu_of(gpu), given_rates(TrainRates(), rate or [])
    plans: list[NamedPlan] = []
    before = None
    for name, file, config in zip(configs, written, stages, strict=True):
        try:
            start = _start(config, before)
            lacks = not start.shape.sparse and objective(config) != "pretrain"
            shape = with_indexer(start.shape, top_k) if lacks else start.shape
            found = plan_of(Job(config, shape, _adapters(config, start.config)), chosen, gpus, rates)
        except UserError as error:
            everywhere = len(configs) > 1 and "--set" in str(error)  # in the remedy
            alone = f" (--set changes every stage: to change this one alone, plan {name} by itself)"
            raise UserError(f"{name}: {error}{alone if everywhere else ''}") from error
        commands = _commands(name, file, config, gpus, set_, start, shape if lacks else None)
        plans.append(NamedPlan(name, stages[0].model or "a new model", found, commands))
        last = f"step-{sum(phase.steps for phase in config.phases):06d}" if config.lora is None else MERGED
        before = Start(f"{config.out}/{last}", shape, start.positions, start.config)
    figures = plan_figures(plans, price)
    write_json(out / "plan.json", figures)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    show_plan(stdout(), plans, price)
    typer.echo(f"\nFigures: {out}")


@dataclass(frozen=True)
class Start:
    """The model that a stage begins with. name: as its command names it; empty for one that the stage makes.

    config: of the model, without indexers that are still to be added.
    """

    name: str
    shape: "Shape"
    positions: int
    config: Any


def _check_changes(set_: list[str] | None, several: bool) -> None:
    """UserError for a --set of what the commands name themselves, and for one that only a single stage can have."""
    from tokensieve.config import UserError

    keys = [change.partition("=")[0].strip() for change in set_ or ()]
    if "model" in keys:
        raise UserError(
            "--set model: name the first stage's with --model; a later one begins with what the one before leaves"
        )
    if several and "out" in keys:
        raise UserError("--set out: all stages would write to one folder; leave it out, or plan each stage by itself")


def _check_folders(names: list[str], stages: "list[TrainConfig]") -> None:
    """UserError if two stages write to one folder, or if one that another follows names none."""
    from tokensieve.config import UserError

    used: dict[str, str] = {}
    for name, config in zip(names, stages, strict=True):
        if not config.out and len(stages) > 1:
            raise UserError(f"{name} names no folder that the next stage could begin from; give it an `out`")
        if config.out in used:
            raise UserError(f"{used[config.out]} and {name} both write to {config.out}; give each an `out` of its own")
        used[config.out] = name


def _makes(config: "TrainConfig") -> bool:
    """Whether a stage makes a new model."""
    return config.stage == "pretrain" and not config.model and bool(config.shape)


def _start(config: "TrainConfig", before: Start | None) -> Start:
    """The model of a stage, with the positions that the stage gives it.

    It is what the stage before leaves, or for the first stage the one that the config names or describes.
    """
    from tokensieve.config import UserError
    from tokensieve.cost import shape_of
    from tokensieve.cost.plan import objective
    from tokensieve.families import model_config

    makes = _makes(config)
    if before is not None:
        if makes:
            raise UserError("it makes a new model, and so can only be the first stage")
        if not before.shape.sparse and config.stage == "adapt" and objective(config) == "adapt":
            raise UserError("it selects keys, and the stage before leaves a model without indexers; warm up in between")
        start = before
    else:
        found: Any = model_config({"model_type": "deepseek_v3"} | config.shape) if makes else config_of(config.model)[0]
        start = Start(_weights(config.model), shape_of(found), found.max_position_embeddings, found)
    if config.stage == "pretrain":
        if not makes:
            _check_extension(config)
        start = replace(start, positions=config.shape.get("max_position_embeddings", start.positions))
    longest = max((phase.context for phase in config.phases), default=0)
    if longest > start.positions:
        raise UserError(f"phases.context {longest} is past the model's {start.positions} positions; shorten it")
    return start


def _adapters(config: "TrainConfig", model_config: Any) -> "Adapters | None":
    """The sizes of the adapters that learn in a stage; None if the weights do."""
    if config.lora is None:
        return None
    from tokensieve.train.lora import adapted, adapters_of
    from tokensieve.train.parallelize import empty_model

    model = empty_model(model_config)
    with adapted(model, config.lora, indexers=False):
        return adapters_of(model)


def _check_extension(config: "TrainConfig") -> None:
    """UserError if a run that goes on with a model changes more of its shape than positions, as in training."""
    from tokensieve.config import UserError
    from tokensieve.train.pretrain import POSITIONS

    if others := sorted(set(config.shape) - {*POSITIONS}):
        raise UserError(f"its shape has {others[0]}; a model that is there can change {' and '.join(POSITIONS)} alone")


def _weights(model: str) -> str:
    """What a command names the model by; FOLDER for a shape or a config.json, whose weights are elsewhere."""
    weightless = is_published(model) or (model.endswith(".json") and Path(model).is_file())
    return FOLDER if weightless else model


def _commands(
    name: str,
    file: "TrainConfig",
    config: "TrainConfig",
    gpus: int,
    set_: list[str] | None,
    start: Start,
    new: "Shape | None",
) -> tuple[str, ...]:
    """The commands that start a stage. file: its config without --model. new: the shape with indexers that are still to
    be added.
    """
    from tokensieve.cost.gpus import NODE

    model = start.name
    before: tuple[str, ...] = ()
    if new is not None and config.stage == "warmup":
        sizes = f"--top-k {new.top_k} --index-heads {new.index_heads} --index-dim {new.index_dim}"
        before = (f"tokensieve sparsify {shlex.quote(model)} {UNTRAINED} {sizes} --init attention",)
        model = UNTRAINED
    elif new is not None:
        model = WARMED_UP
    launcher = "tokensieve"
    if gpus > NODE:
        meeting = "--rdzv-backend c10d --rdzv-endpoint HOST:29500"
        launcher = f"torchrun --nnodes {gpus // NODE} --nproc-per-node {NODE} {meeting} -m tokensieve"
    elif gpus > 1:
        launcher = f"torchrun --nproc-per-node {gpus} -m tokensieve"
    given = ["--model", model] if config.stage != "pretrain" else _continued(file, model)
    changes = [part for change in set_ or () for part in ("--set", change)]
    return (*before, f"{launcher} {shlex.join([config.stage, '--config', name, *given, *changes])}")


def _continued(file: "TrainConfig", model: str) -> list[str]:
    """The options that let `pretrain`, which has no --model, go on with a model; none if its config says so itself."""
    named = {"model": file.model} | ({"data.tokenizer": file.data.tokenizer} if file.data.tokenizer else {})
    changed = [f"{key}={json.dumps(model)}" for key, value in named.items() if model and value != model]
    return [part for change in changed for part in ("--set", change)]
