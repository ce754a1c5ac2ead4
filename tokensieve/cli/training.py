"""Commands that train: the demo, the three stages, and the speedrun through all of them."""

import json
import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import (
    SELECTOR,
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


class Until(StrEnum):
    pretrain = "pretrain"
    warmup = "warmup"
    adapt = "adapt"
    evaluate = "evaluate"


@app.command(cls=with_keys("DemoConfig", "demo"))
def demo(config: Config = "demo", set_: Set = None, out: Out = None) -> None:
    """Turn the bundled dense model into a sparse one, compare the two, and write a report.

    Example: tokensieve demo --out runs/demo
    """
    from tokensieve.config import DemoConfig, load_config
    from tokensieve.files import known_folder, locked

    settings = load_config(DemoConfig, config, overrides(set_, out=out))
    known_folder(settings.model)
    from tokensieve import demo as main_job

    with locked(settings.out):
        main_job.run(settings, stdout())


@app.command(cls=with_keys("TrainConfig", "base"))
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


@app.command(cls=with_keys("TrainConfig", "warmup"))
def warmup(
    config: Config = "warmup", model: Start = None, set_: Set = None, out: Out = None, resume: Resume = False
) -> None:
    """Dense warm-up, stage 1: the indexers learn where the frozen model looks.

    Example: tokensieve warmup --model runs/untrained --out runs/warmup
    """
    run = _train("warmup", config, overrides(set_, model, out), resume)
    typer.echo(f"Next: tokensieve adapt --model {_newest(run)}")


@app.command(cls=with_keys("TrainConfig", "adapt"))
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

    With --selection dense (or --set selection=false) the dense model trains on the same tokens, for comparison.

    Example: tokensieve adapt --model runs/warmup/step-000200 --out runs/adapt
    """
    run = _train("adapt", config, overrides(set_, model, out, selection), resume)
    trained = json.loads((run / "config.json").read_text(encoding="utf-8"))["selection"]
    # A checkpoint holds no selector: `eval` measures the indexer unless it is told.
    arm = f" --arm trained={trained}" if isinstance(trained, str) else ""
    typer.echo(f"Next: tokensieve eval {_newest(run)}{arm}")


def _train(stage: str, name: str, overrides: tuple[str, ...], resume: bool) -> Path:
    """Runs a stage, writes its metrics.json, and returns the run folder."""
    from tokensieve.config import TrainConfig, UserError, check_selector, load_config
    from tokensieve.files import check_source, known_folder, write_json
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
    from tokensieve.train.figures import summary

    begin = time.perf_counter()
    train.run(config, resume=resume)
    write_json(Path(config.out) / "metrics.json", summary(config) | {"seconds": time.perf_counter() - begin})
    newest = _newest(Path(config.out))
    write_card(newest, newest, replace=True)  # now with the figures of the run
    typer.echo(f"{newest}: the trained model")
    return Path(config.out)


def _newest(run: Path) -> Path:
    from tokensieve.train.state import checkpoints

    return checkpoints(run)[-1]
