"""`tokensieve deploy`: plan, write a compose file if one is wanted, and print the engine's command or become it."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tokensieve.config import UserError
from tokensieve.deploy.compose import write_compose
from tokensieve.deploy.planning import LABELS, Deployment, plan

log = logging.getLogger("tokensieve")


def deploy(
    engine: str,
    model: str,
    gpus: int = 8,
    hardware: str = "h200",
    context: int | None = None,
    options: Sequence[str] = (),
    compose: Path | None = None,
    run: bool = False,
) -> None:
    """Call `plan`, write the compose file if one is wanted, and print the command, or become the engine if `run`.

    Raises UserError as `plan` does, if the compose file cannot be written, and if the engine is not installed.
    """
    deployment = plan(engine, model, gpus, hardware, context, options)
    log.info("%s: about %s", deployment.folder, deployment.estimate())
    if deployment.parsers:
        log.info("for thoughts and tool calls apart from the text, add: -- %s", shlex.join(deployment.parsers))
    if compose is not None:
        write_compose(deployment, compose)
        log.info("%s: start it with docker compose -f %s up", compose, shlex.quote(str(compose)))
    if run:
        become(deployment)
    print(deployment.line())


def become(deployment: Deployment) -> NoReturn:
    """Replace this process by the engine, so that the engine gets the signals and its exit status is ours.

    Raises UserError if the engine is not installed.
    """
    command = deployment.command()
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on PATH; install {LABELS[deployment.engine]} in the active environment, or write a "
            "container with --compose FILE"
        )
    sys.stdout.flush()
    os.execvp(command[0], command)
