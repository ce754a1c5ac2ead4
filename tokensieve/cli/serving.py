"""Commands that serve a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tokensieve.cli.program import Model, app

Engine = StrEnum("Engine", ["vllm", "sglang"])
Hardware = StrEnum("Hardware", {"h200": "h200", "mi350": "mi350", "npu_a2": "npu-a2", "npu_a3": "npu-a3"})


@app.command()
def deploy(
    engine: Annotated[Engine, typer.Argument(help="vllm or sglang.")],
    model: Model,
    options: Annotated[list[str] | None, typer.Argument(help="After --: handed to the engine as they are.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of one machine to spread the model over.")] = 8,
    hardware: Annotated[Hardware, typer.Option(help="What they are.")] = Hardware.h200,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of the longest sequence; the model's own.")] = None,
    compose: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a compose file as well.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Start the engine instead of printing its command.")] = False,
) -> None:
    """Check a checkpoint against what vLLM or SGLang read, and print the command that serves it.

    Example: tokensieve deploy sglang runs/adapt/step-000200 --gpus 8 --compose compose.yaml
    """
    from tokensieve.serve import deploy as deployment

    deployment.deploy(engine.value, model, gpus, hardware.value, context, options or (), compose, run)
