"""The command that plans a training run on many GPUs: memory, time, dollars, and the command that starts it."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.pricing import PRICE, TOP_K, config_of, published
from tokensieve.cli.program import OneProcess, Set, app, overrides, stdout

if TYPE_CHECKING:
    from tokensieve.config import TrainConfig
    from tokensieve.cost import Shape

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
        typer.Option(help="A checkpoint folder, a config.json, or a published shape by name; the config's own if not."),
    ] = None,
    price: Annotated[float, typer.Option(min=0, help="Dollars a GPU hour.")] = PRICE,
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

    stages = [load_config(TrainConfig, name, overrides(set_, model)) for name in configs]
    for name, config in zip(configs, stages, strict=True):
        if not config.model and not config.shape:
            raise UserError(f"config {name} names no model; give one with --model, a folder or a published shape")
    from tokensieve.cost import gpu_of
    from tokensieve.cost.plan import plan as plan_of
    from tokensieve.cost.rates import given_rates
    from tokensieve.cost.train_rates import TrainRates
    from tokensieve.files import write_json
    from tokensieve.report import NamedPlan, plan_figures, show_plan

    chosen, rates = gpu_of(gpu), given_rates(TrainRates(), rate or [])
    plans: list[NamedPlan] = []
    start = None  # what the stage before leaves
    for name, config in zip(configs, stages, strict=True):
        shape, dense = _shape(config, top_k)
        try:
            found = plan_of(config, shape, chosen, gpus, rates)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        commands = _commands(name, config, gpus, set_, start, shape if dense else None)
        plans.append(NamedPlan(name, config.model or "a new model", found, commands))
        start = f"{config.out}/step-{sum(phase.steps for phase in config.phases):06d}"
    figures = plan_figures(plans, price)
    write_json(out / "plan.json", figures)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    show_plan(stdout(), plans, price)
    typer.echo(f"\nFigures: {out}")


def _shape(config: "TrainConfig", top_k: int) -> tuple["Shape", bool]:
    """The shape of the model that a config trains, and whether the indexers in it are still to be added."""
    from tokensieve.config import UserError
    from tokensieve.cost import shape_of, with_indexer
    from tokensieve.cost.plan import objective
    from tokensieve.families import model_config

    found: Any = model_config({"model_type": "deepseek_v3"} | config.shape) if not config.model else None
    if found is None:
        found, _ = config_of(config.model)
    positions = config.shape.get("max_position_embeddings", found.max_position_embeddings)
    longest = max((phase.context for phase in config.phases), default=0)
    if longest > positions:
        raise UserError(f"phases.context {longest} is past the model's {positions} positions; shorten it")
    shape = shape_of(found)
    dense = not shape.sparse and objective(config) != "pretrain"
    return (with_indexer(shape, top_k), True) if dense else (shape, False)


def _commands(
    name: str, config: "TrainConfig", gpus: int, set_: list[str] | None, start: str | None, new: "Shape | None"
) -> tuple[str, ...]:
    """The commands that start a stage. start: the checkpoint that the stage before leaves; None: this is the first.

    new: the shape with indexers that are still to be added.
    """
    from tokensieve.cost.gpus import NODE
    from tokensieve.families import FAMILIES

    weightless = config.model in FAMILIES or published(config.model) or config.model.endswith(".json")
    model = FOLDER if weightless else config.model
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
    given = [] if config.stage == "pretrain" and not config.model else ["--model", start or model]
    changes = [part for change in set_ or () for part in ("--set", change)]
    return (*before, f"{launcher} {shlex.join([config.stage, '--config', name, *given, *changes])}")
