"""`tokensieve eval --suite paper`: the paper's benchmarks on a model or an endpoint, and two models side by side."""

import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from tokensieve.cli.program import stderr, stdout

FILE, TABLE = "metrics.json", "table.md"
LISTING = 60.0  # seconds for the list of models, at most: it says whether the endpoint is up
URL = re.compile(r"https?://")


def run_paper(model: str, config: str, set_: tuple[str, ...], folder: Path | None, resume: bool, device: str) -> None:
    """Asks the benchmarks and prints the table.

    model: what --suite paper takes, an endpoint with its /v1 or a model, which is then served for as long as it takes.
    config: name or path of a `PaperConfig`.
    """
    from rich.markup import escape

    from tokensieve.config import UserError, load_config
    from tokensieve.evals import Endpoint
    from tokensieve.evals.paper import BY_KEY, judge_paper
    from tokensieve.files import known_folder
    from tokensieve.paper_config import PaperConfig
    from tokensieve.report import show_paper_suite, write_paper_suite
    from tokensieve.server_process import NotServed, server_process

    settings = load_config(PaperConfig, config, set_)
    key, judge_key = (os.environ.get(name) or "none" for name in ("OPENAI_API_KEY", "JUDGE_API_KEY"))
    name, served = model.rstrip("/"), bool(URL.match(model))
    if served and device != "auto":
        raise UserError(f"--device is of a model that is served here, and {name} is an endpoint; leave it out")
    if not served:
        known_folder(model)
        key = "none"
    folder = folder or Path("runs") / f"eval-{run_name(settings.model or name)}-paper"
    with ExitStack() as stack, stderr().status("Measuring") as status:

        def announce(line: str) -> None:
            status.update(escape(line))
            stderr().print(line, markup=False, highlight=False, soft_wrap=True)

        try:
            url = name if served else stack.enter_context(server_process(model, device))
        except NotServed as error:
            raise UserError(f"{model} cannot be served: {error}") from error
        endpoint = Endpoint(url, key, min(settings.seconds, LISTING), settings.retries, setting="seconds")
        figures = judge_paper(endpoint, name, settings, folder, resume, announce, key, judge_key)
    show_paper_suite(stdout(), run_name(settings.model or name), figures)
    table = write_paper_suite(folder / TABLE, run_name(settings.model or name), figures)
    typer.echo(f"\nFigures: {folder / FILE}, table: {table}")
    if BY_KEY.keys().isdisjoint(figures):
        raise UserError("nothing could be measured; each reason stands above, and --resume goes on once it is gone")


def compare_paper(a: str, b: str) -> None:
    """Prints two models side by side: folders of finished runs, or the models of such."""
    from tokensieve.evals.paper import compare_models
    from tokensieve.report import show_comparison

    show_comparison(stdout(), (a, b), *compare_models(_record(a), _record(b)))


def run_name(model: str) -> str:
    """The name of a folder for the runs of a model, which is a folder itself or an endpoint.

    A step's has that of its run before it.
    """
    if URL.match(model):
        return re.sub(r"[^\w.-]+", "-", URL.sub("", model).strip("/")).strip("-")
    path = Path(model)
    return f"{path.parent.name}-{path.name}" if path.name.startswith("step-") else path.name


def _record(name: str) -> dict[str, Any]:
    """The figures of a run. UserError if there are none."""
    from tokensieve.config import UserError

    places = [Path(name) / FILE, Path("runs") / f"eval-{run_name(name)}-paper" / FILE]
    for place in places:
        if place.is_file():
            try:
                found = json.loads(place.read_text(encoding="utf-8"))
                if isinstance(found["lacking"], dict):
                    return found
            except (OSError, ValueError, KeyError, TypeError):
                pass
            raise UserError(f"{place} is not that of a run of --suite paper; name another folder")
    raise UserError(f"--compare {name}: no {places[0]} and no {places[1]}; first: tokensieve eval {name} --suite paper")
