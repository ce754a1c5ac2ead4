"""Commands that train: the demo, the three stages, and the speedrun through all of them."""

import json
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokensieve.cli.program import (
    SELECTOR,
    Command,
    Config,
    Out,
    Resume,
    Set,
    Start,
    app,
    checked_selection,
    overrides,
    stdout,
    with_keys,
)

if TYPE_CHECKING:
    from tokensieve.config import TrainConfig


class Until(StrEnum):
    pretrain = "pretrain"
    warmup = "warmup"
    adapt = "adapt"
    evaluate = "evaluate"


@app.command(cls=with_keys("DemoConfig", "demo"))
def demo(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="A .toml file, or a bundled config by name; demo unless given, or with --model demo-model.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The dense model: a folder, a GGUF file, or a name (base, smollm2).")
    ] = None,
    set_: Set = None,
    out: Out = None,
) -> None:
    """Turn the bundled dense model, or your own, into a sparse one, compare the two, and write a report.

    Example: tokensieve demo --out runs/demo
    """
    from tokensieve.config import DemoConfig, load_config
    from tokensieve.files import known_folder, locked

    name = config or ("demo" if model in (None, "base") else "demo-model")
    changes = [*([] if model is None else [f"model={json.dumps(model)}"]), *(set_ or [])]
    settings = load_config(DemoConfig, name, overrides(changes, out=out))
    known_folder(settings.model)
    from tokensieve import demo as main_job

    with locked(settings.out):
        main_job.run(settings, stdout())


@app.command(cls=with_keys("TrainConfig", "base", runs_in=Command))
def pretrain(config: Config = "base", set_: Set = None, out: Out = None, resume: Resume = False) -> None:
    """Train a new dense model, with the shape in the config, as the bundled base was made.

    Example: tokensieve pretrain --config base --set optimizer.lr=2e-3 --out runs/mine
    """
    _train("pretrain", config, overrides(set_, out=out), resume)


@app.command(cls=with_keys("SpeedrunConfig", "speedrun"))
def speedrun(
    config: Config = "speedrun",
    set_: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what the run folder holds.")] = False,
    until: Annotated[Until, typer.Option(help="Last part to run now; --resume runs the rest.")] = Until.evaluate,
) -> None:
    """Pretrain a base model, warm its indexers up, adapt it and measure all three, as the bundled ones were made.

    Example: tokensieve speedrun --out runs/speedrun --until pretrain
    """
    from tokensieve.config import SpeedrunConfig, load_config
    from tokensieve.files import locked

    settings = load_config(SpeedrunConfig, config, overrides(set_, out=out))
    from tokensieve import speedrun as all_stages

    with locked(settings.out):
        all_stages.run(settings, resume, until.value, stdout())


@app.command(cls=with_keys("TrainConfig", "warmup", runs_in=Command))
def warmup(
    config: Config = "warmup", model: Start = None, set_: Set = None, out: Out = None, resume: Resume = False
) -> None:
    """Dense warm-up, stage 1: the indexers learn where the frozen model looks.

    Example: tokensieve warmup --model runs/untrained --out runs/warmup
    """
    _, trained = _train("warmup", config, overrides(set_, model, out), resume)
    typer.echo(f"Next: tokensieve adapt --model {trained}")


@app.command(cls=with_keys("TrainConfig", "adapt", runs_in=Command))
def adapt(
    config: Config = "adapt",
    model: Start = None,
    set_: Set = None,
    out: Out = None,
    selection: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{SELECTOR} dense: the dense model trains, no indexer does.",
            callback=checked_selection,
        ),
    ] = None,
    resume: Resume = False,
) -> None:
    """Sparse training, stage 2: selection is on and everything trains.

    With --set lora.rank=16 adapters train in place of the trunk's weights, and the indexers as ever. With --selection
    dense (or --set selection=false) the dense model trains on the same tokens, for comparison.

    Example: tokensieve adapt --model runs/warmup/step-000200 --out runs/adapt
    """
    settings, trained = _train("adapt", config, overrides(set_, model, out, selection), resume)
    if settings.lora is not None and not settings.lora.merge:
        typer.echo("Next, to merge it into the model: the same command with --resume --set lora.merge=true")
        return
    # A checkpoint holds no selector: `eval` measures the indexer unless it is told.
    arm = f" --arm trained={settings.selection}" if isinstance(settings.selection, str) else ""
    typer.echo(f"Next: tokensieve eval {trained}{arm}")


def _train(stage: str, name: str, overrides: tuple[str, ...], resume: bool) -> tuple["TrainConfig", Path]:
    """Runs a stage and writes its metrics.json. Returns its config, and the folder of the model that it trained.

    Rank 0 alone returns; the command ends on the others.
    """
    from tokensieve.config import TrainConfig, UserError, check_selector, load_config
    from tokensieve.files import MERGED, check_source, known_folder, write_json
    from tokensieve.machine import check_device

    config = load_config(TrainConfig, name, overrides)
    if config.stage != stage:
        raise UserError(f"config {name} is for stage {config.stage}: run it with tokensieve {config.stage}")
    if not config.model and not config.shape:
        raise UserError(f"config {name} names no model to start from; give one with --model FOLDER")
    if not config.data.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=config.model))
    for folder in {config.model, config.data.tokenizer} - {""}:
        known_folder(folder)
    for entry in config.data.sources:
        check_source(entry.source)
    check_device(config.device)
    if isinstance(config.selection, str):
        check_selector(config.selection)
    from tokensieve import train
    from tokensieve.checkpoint import write_card
    from tokensieve.mesh import join_mesh
    from tokensieve.train.figures import summary
    from tokensieve.train.state import checkpoints

    begin = time.perf_counter()
    with join_mesh(config.device) as mesh:
        train.run(config, resume=resume, mesh=mesh)
    if not mesh.leads:
        raise typer.Exit
    write_json(Path(config.out) / "metrics.json", summary(config) | {"seconds": time.perf_counter() - begin})
    last = checkpoints(Path(config.out))[-1]
    if config.lora is not None and not config.lora.merge:
        typer.echo(f"{last}: the trained adapter")
        return config, last
    trained = last if config.lora is None else Path(config.out) / MERGED
    write_card(trained, trained, replace=True, trained=last)  # now with the figures of the run
    typer.echo(f"{trained}: the trained model")
    return config, trained
