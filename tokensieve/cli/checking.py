"""`tokensieve eval --suite serving`: probes of an endpoint, a line each, and what a failure points to."""

import json
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from tokensieve.evals import Endpoint, OnProgress
    from tokensieve.evaluate_config import ServingSizes

FILE = "serving.json"


def check_endpoint(
    url: str | None,
    k: int | None,
    context: int | None,
    folder: Path | None,
    resume: bool,
    sizes: "ServingSizes",
    on_progress: "OnProgress",
) -> None:
    """Probes an endpoint and prints the results. Exits with 1 if something is wrong.

    k, context: of the model; None asks the endpoint. folder: of the results; runs/eval-serving unless given.
    """
    from tokensieve.config import UserError
    from tokensieve.evals import Checker, Endpoint, check_serving, diagnose
    from tokensieve.files import write_json
    from tokensieve.report import environment, serving_line

    if url is None:
        raise UserError("--suite serving checks an endpoint; name it with --url, such as http://127.0.0.1:8000/v1")
    endpoint = Endpoint(url, os.environ.get("OPENAI_API_KEY", "none"), sizes.seconds, sizes.retries)
    served = _served(endpoint, sizes, k, context)
    file = (folder or Path("runs/eval-serving")) / FILE
    asked = {"url": url, **served, "sizes": json.loads(json.dumps(asdict(sizes)))}
    record: dict[str, Any] = {"asked": asked, "probes": [], "run": environment()}
    if resume:
        record["probes"] = _finished(file, asked)
    checker = Checker(endpoint, sizes=sizes, seed=random.getrandbits(48), **served)
    for probe in record["probes"]:
        typer.echo(serving_line(probe))

    def on_result(result: Any) -> None:
        record["probes"].append(result.to_dict())
        write_json(file, record)
        typer.echo(serving_line(result.to_dict()))

    results = check_serving(checker, [*record["probes"]], on_progress, on_result)
    fault = diagnose(results, served["k"])
    record["diagnosis"] = None if fault is None else asdict(fault)
    write_json(file, record)
    measured = sum(result.found is not None for result in results)
    if not measured:
        raise UserError(
            f"nothing could be measured: {served['model']} finds no hidden line even below k, and {url} gives no log "
            "probabilities"
        )
    if fault is not None:
        typer.echo(f"\nProbably: {fault.cause}{f' (as in {fault.known})' if fault.known else ''}")
    else:
        typer.echo(f"\nNothing is wrong in what was measured: {measured} of {len(results)} probes")
    typer.echo(f"Results: {file}")
    if fault is not None:
        raise typer.Exit(1)


def _served(endpoint: "Endpoint", sizes: "ServingSizes", k: int | None, context: int | None) -> dict[str, Any]:
    """The model's id, that of its dense twin, its k and its length: as given, or as the endpoint's list has them."""
    from tokensieve.config import UserError
    from tokensieve.evals.endpoint import served_model

    told = bool(sizes.model) and k is not None and context is not None
    remedy = "" if told else "give --k, --context and --set serving.model=ID"
    model, cards = served_model(endpoint, sizes.model, remedy)
    card, dense = cards[model], sizes.dense or f"{model}:dense"
    k, longest = k or card.get("index_topk"), context or card.get("max_model_len")
    if not isinstance(k, int):
        raise UserError(f"{endpoint.url} does not list how many keys {model} selects; give its index_topk with --k")
    if not isinstance(longest, int):
        raise UserError(f"{endpoint.url} does not list how long a context of {model} may be; give it with --context")
    twin = dense if sizes.dense or dense in cards else ""
    return {"model": model, "dense": twin, "k": k, "longest": longest}


def _finished(file: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The probes of an earlier run of the same check. UserError if there is none."""
    from tokensieve.config import UserError

    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        before, finished = record["asked"], [*record["probes"]]
    except FileNotFoundError as error:
        raise UserError(f"{file} is not there, so nothing can be resumed; leave --resume out") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read; leave --resume out to begin anew") from error
    changed = [name for name in asked if name != "sizes" and before.get(name) != asked[name]]
    waits = {"seconds", "retries"}
    sizes = {**before.get("sizes", {})}
    changed += [f"serving.{n}" for n, value in asked["sizes"].items() if n not in waits and sizes.get(n) != value]
    if changed:
        raise UserError(f"--resume: {', '.join(changed)} differ from those of {file}; repeat the same command")
    return finished
