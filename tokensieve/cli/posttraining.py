"""Commands that post-train: single parts of the pipeline, and all of it."""

import importlib.resources
import json
from typing import Annotated

import typer

from tokensieve.cli.program import Out, Resume, Set, app, overrides, stdout, with_keys

CONFIG = "tiny"
WITH_KEYS = with_keys("PosttrainConfig", f"posttrain-{CONFIG}", "tokensieve.posttrain_config")

Config = Annotated[
    str, typer.Option(metavar="NAME_OR_PATH", help="A .toml file, or a bundled config by name: NAME of posttrain-NAME.")
]
Start = Annotated[str | None, typer.Option("--model", help="Sparse checkpoint that all parts start from.")]
Dense = Annotated[bool, typer.Option("--dense", help="The dense twin: the same without selection, for comparison.")]


@app.command(cls=WITH_KEYS)
def specialist(
    domain: Annotated[str, typer.Option(help="mathematics, logic, ..., a FILE of rows, or module:object.")],
    config: Config = CONFIG,
    model: Start = None,
    set_: Set = None,
    out: Out = None,
    dense: Dense = False,
    resume: Resume = False,
) -> None:
    """Train the specialist of one domain: a cold start on demonstrations, then GRPO.

    Between the two it looks for the difficulty at which some answers pass, but not all.

    Example: tokensieve specialist --domain logic --out runs/posttrain
    """
    _run(config, model, set_, out, dense, resume, f"specialist-{domain}")


@app.command(cls=WITH_KEYS)
def distill(
    config: Config = CONFIG,
    model: Start = None,
    set_: Set = None,
    out: Out = None,
    dense: Dense = False,
    resume: Resume = False,
) -> None:
    """Train one model on the answers of all specialists in the run folder: those that the verifier passes.

    Example: tokensieve distill --out runs/posttrain
    """
    _run(config, model, set_, out, dense, resume, "distilled")


@app.command(cls=WITH_KEYS)
def rl(
    config: Config = CONFIG,
    model: Start = None,
    set_: Set = None,
    out: Out = None,
    dense: Dense = False,
    resume: Resume = False,
) -> None:
    """One stage of GRPO over all domains, from the distilled model in the run folder.

    Another one to start from: --set rl.model=FOLDER, or --set rl.model=on-policy for that model of the run.

    Example: tokensieve rl --out runs/posttrain
    """
    _run(config, model, set_, out, dense, resume, "final")


@app.command(cls=WITH_KEYS)
def posttrain(
    config: Config = CONFIG,
    model: Start = None,
    set_: Set = None,
    out: Out = None,
    dense: Dense = False,
    resume: Resume = False,
) -> None:
    """Run the whole pipeline: every specialist, distillation, the mixed stage, and the figures of all models.

    Example: tokensieve posttrain --config tiny --out runs/posttrain
    """
    _run(config, model, set_, out, dense, resume, None)


def _run(
    name: str,
    model: str | None,
    set_: list[str] | None,
    out: str | None,
    dense: bool,
    resume: bool,
    only: str | None,
) -> None:
    from tokensieve.config import UserError, load_config
    from tokensieve.files import known_folder, locked
    from tokensieve.machine import check_device
    from tokensieve.posttrain_config import PosttrainConfig
    from tokensieve.tasks.problems import domain

    start = [] if model is None else [f"model={json.dumps(model)}"]
    changes = overrides([*start, *(set_ or [])], out=out, selection="dense" if dense else None)
    settings = load_config(PosttrainConfig, _bundled(name), changes)
    known_folder(settings.model)
    if settings.judge.embedded:
        try:
            known_folder(settings.judge.model)
        except UserError as error:
            raise UserError(f"judge.model: {error}; or give judge.url, of a server that has it") from error
    check_device(settings.device)
    for asked in (*settings.domains, *([only.removeprefix("specialist-")] if only and "-" in only else [])):
        domain(asked)
    import trl  # noqa: F401  an extra: before anything takes long, the command names it if it is missing

    from tokensieve import pipeline

    with locked(settings.out):
        pipeline.run(settings, resume, only, stdout())


def _bundled(name: str) -> str:
    """The bundled posttrain-NAME if there is one; else the name as given."""
    path = importlib.resources.files("tokensieve") / "configs" / f"posttrain-{name}.toml"
    return f"posttrain-{name}" if path.is_file() else name
