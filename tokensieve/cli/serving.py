"""Commands that serve a model."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import Command, Device, Model, OneProcess, Selection, app, check_selection

API_KEY = "TOKENSIEVE_API_KEY"
Engine = StrEnum("Engine", ["vllm", "sglang"])
Hardware = StrEnum(
    "Hardware",
    {"h200": "h200", "b200": "b200", "mi300": "mi300", "mi350": "mi350", "npu_a2": "npu-a2", "npu_a3": "npu-a3"},
)


@app.command(cls=OneProcess)
def deploy(
    engine: Annotated[Engine, typer.Argument(help="vllm or sglang.")],
    model: Model,
    options: Annotated[list[str] | None, typer.Argument(help="After --: passed to the engine unchanged.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of one machine to split the model over.")] = 8,
    hardware: Annotated[Hardware, typer.Option(help="Kind of the devices.")] = Hardware.h200,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence, in tokens; by default the model's.")
    ] = None,
    compose: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write a compose file.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Start the engine instead of printing its command.")] = False,
) -> None:
    """Check a checkpoint against what vLLM or SGLang read, and print the command that serves it.

    Example: tokensieve deploy sglang runs/adapt/step-000200 --gpus 8 --compose compose.yaml
    """
    from tokensieve.files import known_folder

    known_folder(model)
    from tokensieve.deploy import deploy as deploy_checkpoint

    deploy_checkpoint(engine.value, model, gpus, hardware.value, context, options or (), compose, run)


@app.command(cls=Command)
def serve(
    model: Model = "sparse",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar=API_KEY, help="Require this key; may be repeated.")
    ] = None,
    pages: Annotated[int, typer.Option(min=0, help="Pages of the cache, 64 tokens each; 0: by free memory.")] = 0,
    running: Annotated[int, typer.Option(min=1, help="Answers that are made at once.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=0, help="Longest answer in tokens; 0: as long as fits.")] = 0,
    selection: Selection = None,
    mirror: Annotated[float, typer.Option(help="Share of the answers to compare with the other attention.")] = 0.0,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Serve MODEL:dense beside a sparse model.")] = True,
    playground: Annotated[
        bool, typer.Option("--playground/--no-playground", help="Serve the page, /lens and /documents beside the API.")
    ] = True,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages of this origin ask, as https://example.com; may be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Answer to this host name, besides localhost, addresses and --host; may be repeated."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Answer HTTP requests in OpenAI's format, many at once, until a signal ends it.

    Example: tokensieve serve sparse --port 8000
    """
    from tokensieve.config import UserError
    from tokensieve.files import known_folder
    from tokensieve.serve.command import serve as run

    if not api_key and API_KEY in os.environ:  # a missing secret must not open the server to everyone
        raise UserError(f"{API_KEY} is set and empty; unset it, or give a key")
    known_folder(model)
    settings = {
        "dense": dense,
        "selection": selection or "indexer",
        "mirror": mirror,
        "keys": tuple(api_key or ()),
        "max_tokens": max_tokens,
        "playground": playground,
        "allow_origins": tuple(allow_origin or ()),
        "allow_hosts": tuple(allow_host or ()),
    }
    engine = {"pages": pages, "running": running}
    run(
        model,
        host,
        port,
        device,
        engine,
        settings,
        lambda loaded: check_selection(selection, model, loaded),
        typer.echo,
    )
