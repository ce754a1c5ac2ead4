"""The command that prices a model: FLOPs, bytes, seconds and dollars of a token, and price lists on traffic."""

import importlib.resources
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.program import OneProcess, app, stdout

if TYPE_CHECKING:
    from tokensieve.cost import Serving, Shape, TwoLevel
    from tokensieve.cost.prices import PriceList, Request

MODEL, GPU, PRICE, TOP_K = "deepseek_v32", "H800", 2.0, 2048
SHORTEST, LONGEST = 1024, 131072  # positions that are shown unless others are given


def finite(price: float | None) -> float | None:
    """The value of --price. UserError for an infinite one."""
    from tokensieve.config import UserError

    if price is not None and math.isinf(price):
        raise UserError("--price is infinite; give dollars a GPU hour")
    return price


@app.command(cls=OneProcess)
def cost(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A checkpoint folder, a config.json, a bundled name, or a published shape ({MODEL}; a model_type "
            "without one stands for its config class's own sizes)."
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help=f"H800, H100, H200, B200 or MI350; {GPU} unless given.")] = None,
    price: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help=f"Dollars a GPU hour; {PRICE:g} unless given."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="That experts are divided over; the fewest that hold the model unless given.")
    ] = None,
    tensor: Annotated[int | None, typer.Option(help="That the attention of one sequence is divided over.")] = None,
    positions: Annotated[str | None, typer.Option(metavar="N,N", help="Token positions.")] = None,
    weights: Annotated[str | None, typer.Option(help="fp8 (the default) or bf16.")] = None,
    cache: Annotated[str | None, typer.Option(help="Of what attention reads; fp8 under MLA, else bf16.")] = None,
    index: Annotated[str | None, typer.Option(help="Of index scores and keys: fp8 or bf16.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help=f"Selected keys; the model's own, or {TOP_K} for a dense one.")
    ] = None,
    share_every: Annotated[
        int | None, typer.Option(min=1, help="Layers that share one indexer; as the model has it unless given.")
    ] = None,
    two_level: Annotated[
        str | None, typer.Option(metavar="BLOCKSxKEYS", help="Selection in two levels, such as 64x128.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences that decode together; as many as fit.")] = None,
    mean_context: Annotated[
        int | None, typer.Option(help="Tokens of the other sequences of a batch; as many as the token's own has.")
    ] = None,
    draft: Annotated[int | None, typer.Option(help="Tokens drafted for each decode step; none unless given.")] = None,
    acceptance: Annotated[float | None, typer.Option(help="Probability that a drafted token is right.")] = None,
    rate: Annotated[
        list[str] | None, typer.Option("--rate", metavar="NAME=SHARE", help="A share of the peak, such as memory=0.8.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Figure 3 of the DeepSeek-V3.2-Exp report; it takes no model or deployment.")
    ] = False,
    prices: Annotated[
        str | None, typer.Option(metavar="FILE", help="Price lists of an API: a .toml file, or prices (DeepSeek's).")
    ] = None,
    traffic: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Requests: a usage object of OpenAI's API on each line.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the figures; runs/cost or runs/cost-paper.")] = None,
) -> None:
    """Show what a token costs at each position, dense and sparse: FLOPs, bytes, seconds and dollars per million.

    Shares of a GPU's peak are those that were measured, and 1 (a roofline) for what was not; each figure is labelled.
    With --prices and --traffic: what the price lists earn or lose on your requests.

    Example: tokensieve cost deepseek_v32 --gpu H200 --price 2.5 --positions 8192,131072
    """
    from tokensieve.config import UserError, load_config
    from tokensieve.cost.prices import PricesConfig, read_traffic

    if (prices is None) != (traffic is None):
        raise UserError("--prices and --traffic go together: price lists, and the requests that they are paid for")
    lists = load_config(PricesConfig, prices).lists if prices else ()
    requests = read_traffic(traffic) if traffic else []
    options = {
        "gpu": gpu,
        "price": price,
        "gpus": gpus,
        "tensor": tensor,
        "positions": positions,
        "weights": weights,
        "cache": cache,
        "index": index,
        "top-k": top_k,
        "share-every": share_every,
        "two-level": two_level,
        "batch": batch,
        "mean-context": mean_context,
        "draft": draft,
        "acceptance": acceptance,
        "rate": rate,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if not paper:
        _own(model or MODEL, given, lists, requests, out or Path("runs/cost"))
    elif model is None and not given:
        _paper(lists, requests, out or Path("runs/cost-paper"))
    else:
        named = ", ".join([*(["MODEL"] if model else []), *(f"--{name}" for name in given)])
        raise UserError(f"--paper has its own model and deployment; leave out {named}")


def _paper(lists: "Sequence[PriceList]", requests: "Sequence[Request]", out: Path) -> None:
    from tokensieve.cost import paper
    from tokensieve.report import show_paper, write_paper

    show_paper(stdout(), write_paper(out))
    _show_balances(lists, requests, lambda name, p: paper.paper_cost(name, p).usd_per_million(paper.PRICE), out)
    typer.echo(f"\nFigures: {out}")


def _own(
    model: str, given: dict[str, Any], lists: "Sequence[PriceList]", requests: "Sequence[Request]", out: Path
) -> None:
    from tokensieve import cost
    from tokensieve.config import UserError
    from tokensieve.cost.prices import mean_context
    from tokensieve.cost.serving import smallest
    from tokensieve.report import show_costs, write_costs

    config, index = config_of(model)
    longest = config.max_position_embeddings
    shown = _positions(given.get("positions"), longest)
    sparse = _sparse(cost.shape_of(config), given)
    shapes = {"dense": cost.without_indexer(sparse), "sparse": sparse}
    furthest = max([*shown, *(r.prompt + r.output for r in requests)])
    if furthest > longest:
        raise UserError(f"a request of {furthest} tokens is longer than the model's {longest} positions; leave it out")
    if requests:
        given.setdefault("mean-context", mean_context(requests))
    latent = sparse.attention.gathered != sparse.attention.masked
    given.setdefault("cache", "fp8" if latent else "bf16")
    given.setdefault("index", index or ("fp8" if latent else "bf16"))
    serving = _serving(given)
    if (levels := serving.two_level) is not None and levels.blocks * levels.width < (sparse.top_k or 0):
        chosen = levels.blocks * levels.width
        raise UserError(f"--two-level: the chosen blocks hold {chosen} keys, and k is {sparse.top_k}; take more blocks")
    if "gpus" not in given and "tensor" not in given:
        serving = smallest([*shapes.values()], serving, furthest + 1)
    rates = cost.given_rates(cost.known_rates(serving, sparse), given.get("rate", []))
    price = given.get("price", PRICE)

    def token(name: str, position: int) -> cost.TokenCost:
        phase, attention = name.split("_")
        function = cost.prefill_cost if phase == "prefill" else cost.decode_cost
        return function(shapes[attention], serving, rates, position)

    costs = [token(f"{phase}_{name}", p) for phase in ("prefill", "decode") for name in shapes for p in shown]
    write_costs(out, model, serving, rates, price, costs)
    show_costs(stdout(), model, serving, price, costs)
    _show_balances(lists, requests, lambda name, p: token(name, p).usd_per_million(price), out)
    typer.echo(f"\nFigures: {out}")


def _show_balances(
    lists: "Sequence[PriceList]", requests: "Sequence[Request]", usd: Callable[[str, int], float], out: Path
) -> None:
    """Writes and prints what each price list earns on the traffic. usd: dollars per million tokens of a curve."""
    from tokensieve.cost.prices import compare
    from tokensieve.files import write_json
    from tokensieve.report import show_balances

    if lists:
        found = compare(lists, requests, usd)
        write_json(out / "prices.json", found)
        show_balances(stdout(), found)


def config_of(model: str) -> tuple[Any, str | None]:
    """The config of a model's folder, of a config.json, or of a published shape by its name; and the format of index
    scores if it is stated. A path that exists comes before a name. A model_type without a published shape stands for
    its config class's own sizes.
    """
    from tokensieve.checkpoint import read_config
    from tokensieve.config import UserError
    from tokensieve.families import FAMILIES, model_config, published_config
    from tokensieve.files import bundled_models, known_folder
    from tokensieve.integers import read_json

    if is_published(model) and model in FAMILIES:
        return published_config(model), None
    path = _shapes()[model] if is_published(model) else Path(model)
    if path.suffix == ".json" and path.is_file():
        try:
            raw = read_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); give a model's config.json") from error
        if not isinstance(raw, dict):
            raise UserError(f"{path}: not an object; give a model's config.json")
    elif path.exists() or model in bundled_models():
        folder = known_folder(model)
        assert folder is not None
        raw = read_config(folder)
    else:
        shapes = ", ".join([MODEL, *sorted(_shapes())])
        raise UserError(
            f"model {model!r}: no such folder or config.json, not a bundled model ({', '.join(bundled_models())}) and "
            f"not a published shape ({shapes}, or a model_type); nothing is fetched for a price"
        )
    return model_config(raw), raw.get("index_dtype")


def is_published(model: str) -> bool:
    """Whether `model` names a published shape, whose weights are not here: no path has that name."""
    from tokensieve.families import FAMILIES

    return (model in FAMILIES or model in _shapes()) and not Path(model).exists()


def _shapes() -> dict[str, Path]:
    """The config.json of each published shape that the package brings, by its name, such as moonlight-16b-a3b."""
    folder = Path(str(importlib.resources.files("tokensieve") / "configs"))
    return {path.stem: path for path in folder.glob("*.json")}


def _sparse(shape: "Shape", given: dict[str, Any]) -> "Shape":
    """The shape with an indexer: the model's own, or the one that it would have, with the changes that options name."""
    from dataclasses import replace

    from tokensieve.cost import with_indexer

    shape = with_indexer(shape, given.get("top-k", shape.top_k or TOP_K))
    every = given.get("share-every")
    return shape if every is None else replace(shape, index_layers=-(-shape.layers // every))


def _serving(given: dict[str, Any]) -> "Serving":
    from tokensieve.config import UserError
    from tokensieve.cost import Serving, gpu_of

    if "acceptance" in given and not given.get("draft"):
        raise UserError("--acceptance is that of drafted tokens; say how many with --draft")
    names = ("tensor", "weights", "cache", "index", "batch", "draft", "acceptance")
    more = {name: given[name] for name in names if name in given}
    return Serving(
        gpu_of(given.get("gpu", GPU)),
        gpus=given.get("gpus", given.get("tensor", 1)),
        mean_context=given.get("mean-context"),
        two_level=_two_level(given.get("two-level")),
        **more,
    )


def _two_level(text: str | None) -> "TwoLevel | None":
    from tokensieve.config import UserError
    from tokensieve.cost import TwoLevel
    from tokensieve.integers import read_integer

    if text is None:
        return None
    try:
        return TwoLevel(*map(read_integer, text.split("x", 1)))
    except (ValueError, TypeError) as error:  # TypeError: there is no x
        raise UserError(f"--two-level {text[:40]}: write BLOCKSxKEYS, for example 64x128") from error


def _positions(text: str | None, longest: int) -> list[int]:
    """The positions that are shown: those given, or the powers of two that the model has."""
    from tokensieve.config import UserError
    from tokensieve.integers import read_integer

    if text is None:
        return [p for p in (SHORTEST << i for i in range(20)) if p <= min(longest, LONGEST)] or [longest]
    try:
        positions = sorted({read_integer(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"--positions: {error}; write token positions with commas, for example 8192,131072") from error
    if positions[0] < 0:
        raise UserError(f"--positions {positions[0]}: positions count from 0; give whole numbers of 0 or more")
    if positions[-1] > longest:
        raise UserError(f"--positions {positions[-1]}: the model has {longest} positions; give at most as many")
    return positions
