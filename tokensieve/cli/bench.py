"""Commands that measure how fast something runs."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.program import SELECTOR, Command, Device, app, check_selection, stderr, stdout, tokenizer_of

if TYPE_CHECKING:
    from tokensieve.bench import Workload
    from tokensieve.families import ModelConfig
    from tokensieve.model import DecoderForCausalLM

bench = typer.Typer(no_args_is_help=True, help="Measure how fast something runs here.")
app.add_typer(bench, name="bench")


@bench.command(cls=Command)
def serve(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a bundled name (base, sparse).")] = "sparse",
    shape: Annotated[
        str | None,
        typer.Option(
            help="Instead: random weights in a published shape by its model_type: deepseek_v32, qwen3_dsa (Qwen3-8B), "
            "...; of a type without one, in its config class's own sizes."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of --shape's config.json.")
    ] = None,
    requests: Annotated[str, typer.Option(metavar="N,N", help="So many at once, one after the other.")] = "1,8,32",
    prompt: Annotated[str, typer.Option(metavar="N,N", help="Tokens of every prompt.")] = "512",
    new: Annotated[int, typer.Option(min=2, help="Tokens of every answer.")] = 64,
    selection: Annotated[str, typer.Option(metavar="NAME,NAME", help=SELECTOR)] = "indexer",
    top_k: Annotated[str, typer.Option(metavar="N,N", help="Keys that a query selects; the model's own.")] = "",
    experts: Annotated[str, typer.Option(metavar="N,N", help="Routed experts of --shape.")] = "",
    fp8: Annotated[bool, typer.Option("--fp8", help="Weights of --shape in FP8 blocks.")] = False,
    filled: Annotated[
        bool, typer.Option("--filled", help="Fill the cache with noise; run the last token of each prompt only.")
    ] = False,
    last: Annotated[int, typer.Option(min=1, help="With --filled: run so many tokens of each prompt's end.")] = 1,
    chunk: Annotated[int, typer.Option(min=0, help="Tokens of a prompt run at once; 0: the engine's own.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of metrics.json.")] = Path("runs/bench-serve"),
    device: Device = "auto",
) -> None:
    """Measure the engine with many requests at once: tokens a second, and how long each of them waits.

    Example: tokensieve bench serve sparse --requests 1,8 --prompt 512,2048 --selection indexer,dense
    """
    from tokensieve.config import UserError, check_selector
    from tokensieve.files import known_folder, write_json

    who = [check_selector(name) for name in re.split(r",(?![^(]*\))", selection)]  # not at commas between options
    if shape is None and (experts or set_ or fp8):
        raise UserError("--experts, --set and --fp8 are for random weights; give --shape deepseek_v32")
    if last > 1 and not filled:
        raise UserError(f"--last {last}: without --filled whole prompts are run; give --filled too")
    counts = _numbers("--experts", experts) if experts else [None]
    keys = _numbers("--top-k", top_k) if top_k else [None]
    lengths, at_once = _numbers("--prompt", prompt), _numbers("--requests", requests)
    if last > min(lengths):
        raise UserError(f"--last {last}: a prompt has {min(lengths)} tokens; give fewer, or a longer --prompt")
    if shape is None:
        known_folder(model)
    import tokensieve
    from tokensieve.bench import Workload, random_model, serve_load
    from tokensieve.cost import shape_of
    from tokensieve.engine.tensor_parallel import load_rank
    from tokensieve.mesh import join_mesh
    from tokensieve.model.selection import resolve
    from tokensieve.report import environment

    for name in who:
        resolve(name)
    loads = [
        Workload(count, length, new, by, filled, chunk, last=last)
        for length in lengths
        for count in at_once
        for by in who
    ]
    rows: list[dict[str, Any]] = []
    figures = {"run": environment(), "model": shape or model, "rows": rows}
    with join_mesh(device) as mesh:
        stderr().quiet = not mesh.leads
        for count in counts:
            if shape is None:
                served = load_rank(model, mesh)
            else:
                shaped, dtype = _config(shape, set_ or [], count), _dtype(mesh.device)
                served = random_model(shaped, mesh.device, dtype, in_fp8=fp8, ranks=mesh)
            for name in who:
                check_selection(name, shape or model, served)
            tokenizer = tokensieve.load_tokenizer("base") if shape else tokenizer_of(model, served)
            prompts = _prompts(served, tokenizer, loads, real=shape is None)
            for given in keys:
                k = served.top_k if given is None else given
                for load in (replace(load, top_k=k) for load in loads):
                    with stderr().status(f"{load.requests} requests of {load.prompt} tokens, {load.selection}"):
                        result = serve_load(served, tokenizer, load, prompts[load.prompt], mesh)
                    sizes = {"ranks": mesh.size, "top_k": k, "experts": shape_of(served.config).experts}
                    rows.append(asdict(load) | sizes | asdict(result))
                    if mesh.leads:  # at once: the next load may be one too many
                        file = write_json(out / "metrics.json", figures)
            del served
        if not mesh.leads:
            return
    _show(rows)
    typer.echo(f"\nFigures: {file}")


def _numbers(option: str, text: str) -> list[int]:
    from tokensieve.config import UserError
    from tokensieve.integers import read_integer

    try:
        numbers = [read_integer(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{option}: {error}; give whole numbers above 0, for example 1,8,32") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} {text}: give whole numbers above 0, for example 1,8,32")
    return numbers


def _dtype(device: Any) -> Any:
    import torch

    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _config(shape: str, changes: list[str], experts: int | None) -> "ModelConfig":
    from tokensieve.config import UserError
    from tokensieve.families import FAMILIES, published_config
    from tokensieve.integers import read_json

    if shape not in FAMILIES:
        raise UserError(f"--shape {shape} is unknown; use one of {', '.join(FAMILIES)}")
    known, counted = FAMILIES[shape].config(), FAMILIES[shape].experts_field
    if experts is not None and not hasattr(known, counted):
        raise UserError(f"--experts {experts}: a model of type {shape} has no experts; leave it out")
    fields: dict[str, Any] = {} if experts is None else {counted: experts}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not hasattr(known, key):
            raise UserError(
                f"--set {change}: write KEY=VALUE with a key of config.json, for example num_hidden_layers=4"
            )
        try:
            fields[key] = read_json(value)
        except json.JSONDecodeError:
            fields[key] = value
        except ValueError as error:
            raise UserError(f"--set {key}: {error}; give a smaller value") from error
    return published_config(shape, **fields)


def _prompts(
    model: "DecoderForCausalLM", tokenizer: Any, loads: "list[Workload]", real: bool
) -> dict[int, list[tuple[int, ...]]]:
    """Prompts by their length: Python sources that share no beginning, or drawn tokens."""
    from tokensieve.bench import random_prompts
    from tokensieve.data import read_documents
    from tokensieve.model.positions import check_positions

    count, longest = max(load.requests for load in loads), max(load.prompt for load in loads)
    lengths = {load.prompt for load in loads}
    what = f"{longest} prompt tokens and {loads[0].new} new ones are"
    check_positions(model.config.max_position_embeddings, longest + loads[0].new, what, "shorten one")
    if not real:
        return {length: random_prompts(count, length, model.config.vocab_size) for length in lengths}
    ids: list[int] = []
    for document in read_documents("python", "test", limit_bytes=100 * count * longest):
        ids += tokenizer(document.text, add_special_tokens=False).input_ids
        if len(ids) >= count * longest:
            break
    whole = ids * (count * longest // len(ids) + 1)
    return {n: [tuple(whole[i * n : (i + 1) * n]) for i in range(count)] for n in lengths}


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        "requests",
        "prompt",
        "selection",
        "k",
        "tokens/s",
        "first, p50 and p99 s",
        "next, p50 and p99 ms",
        "p99/p50",
        "peak GiB",
    )
    for row in rows:
        table.add_row(
            str(row["requests"]),
            str(row["prompt"]),
            row["selection"],
            str(row["top_k"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['first_p50']:.2f}  {row['first_p99']:.2f}",
            f"{1000 * row['next_p50']:.1f}  {1000 * row['next_p99']:.1f}",
            f"{row['next_p99_over_p50']:.2f}",
            f"{row['memory_bytes'] / 2**30:.1f}",
        )
    stdout().print(table)
