"""The command line: every command is a typed function, and what it does lies in the package.

A command imports what it needs when it runs, so that `--help` answers at once. Standard output carries results, standard error the log and
the messages. Exit status: 0 done, 2 bad input (one line says what and the remedy), 130 interrupted.
"""

import errno
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tokensieve.model import DecoderForCausalLM

# Of the system, not of the program: no space, no permission, not a folder, a read-only disk.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
DISK_ERRORS |= {errno.EEXIST}
SELECT_FROM = 4  # a sparse model is compared in contexts of at least so many times k tokens

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


class IndexDtype(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"


class SelectBy(StrEnum):
    indexer = "indexer"
    dense = "dense"
    window = "window"


class Until(StrEnum):
    pretrain = "pretrain"
    warmup = "warmup"
    adapt = "adapt"
    evaluate = "evaluate"


Model = Annotated[
    str, typer.Argument(help="Checkpoint folder in Hugging Face format, or a bundled name (base, sparse).")
]
Config = Annotated[str, typer.Option(metavar="NAME_OR_PATH", help="A .toml file, or a bundled config by name.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key; may be repeated.")]
Start = Annotated[str | None, typer.Option("--model", help="Checkpoint to start from; its tokenizer is used.")]
Out = Annotated[str | None, typer.Option(help="Run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def _version(asked: bool) -> None:
    if asked:
        import tokensieve

        typer.echo(f"tokensieve {tokensieve.__version__}")
        raise typer.Exit


@app.callback()
def setup(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Give a language model sparse attention: make a checkpoint sparse, train it, measure it.

    Start with: tokensieve demo
    """
    from rich.logging import RichHandler

    log = logging.getLogger("tokensieve")
    log.handlers = [RichHandler(console=_stderr(), show_path=False, show_time=False, show_level=False)]
    log.setLevel(logging.INFO)


@app.command()
def demo(config: Config = "demo", set_: Set = None, out: Out = None) -> None:
    """Turn the bundled dense model into a sparse one, compare the two, and write a report.

    Example: tokensieve demo --out runs/demo
    """
    from tokensieve import demo as main_job
    from tokensieve.config import DemoConfig, load_config

    main_job.run(load_config(DemoConfig, config, _overrides(set_, out=out)))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False) -> None:
    """Show what this machine has (devices, backends and why not, versions, memory) and what will be used.

    Example: tokensieve doctor --json
    """
    from tokensieve import doctor as examination

    examination.doctor(as_json)


@app.command()
def pretrain(config: Config = "base", set_: Set = None, out: Out = None, resume: Resume = False) -> None:
    """Train a new dense model of the shape that the config gives, as the bundled base was made.

    Example: tokensieve pretrain --config base --set optimizer.lr=2e-3 --out runs/mine
    """
    _train("pretrain", config, _overrides(set_, out=out), resume)


@app.command()
def speedrun(
    config: Config = "speedrun",
    set_: Set = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what the run folder holds.")] = False,
    until: Annotated[Until, typer.Option(help="The last part to do now; --resume does the rest.")] = Until.evaluate,
) -> None:
    """Pretrain a base model, warm its indexers up, adapt it and measure all three, as the bundled ones were made.

    Example: tokensieve speedrun --out runs/speedrun --until pretrain
    """
    from tokensieve import speedrun as whole_road
    from tokensieve.config import SpeedrunConfig, load_config

    whole_road.run(load_config(SpeedrunConfig, config, _overrides(set_, out=out)), resume, until.value)


@app.command()
def sparsify(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not hold one.")],
    top_k: Annotated[int, typer.Option(help="Keys that a query selects.")] = 2048,
    index_heads: Annotated[int, typer.Option(help="Heads of the indexer.")] = 64,
    index_dim: Annotated[int, typer.Option(help="Width of an indexer head.")] = 128,
    index_dtype: Annotated[IndexDtype, typer.Option(help="Arithmetic of the index scores.")] = IndexDtype.bf16,
    seed: Annotated[int, typer.Option(help="Of the new indexer's weights.")] = 0,
) -> None:
    """Add an untrained indexer to a dense checkpoint: the start of warm-up.

    Example: tokensieve sparsify base runs/untrained --top-k 128 --index-heads 8 --index-dim 32
    """
    import tokensieve

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise tokensieve.UserError(f"{out} exists already; name a new folder, or remove it first")
    dense = tokensieve.load(model, dtype=_stored_dtype(model))
    sparse = tokensieve.sparsify(dense, top_k, index_heads, index_dim, index_dtype.value, seed)
    tokensieve.save(sparse, out)
    count = sum(p.numel() for p in sparse.indexer_parameters())
    typer.echo(f"{out}: {count:,} parameters of indexers added, {top_k} keys per query, not trained yet")
    typer.echo(f"Next: tokensieve warmup --model {out}")


@app.command()
def warmup(
    config: Config = "warmup", model: Start = None, set_: Set = None, out: Out = None, resume: Resume = False
) -> None:
    """Dense warm-up, stage 1: the indexers learn where the frozen model looks.

    Example: tokensieve warmup --model runs/untrained --out runs/warmup
    """
    run = _train("warmup", config, _overrides(set_, model, out), resume)
    typer.echo(f"Next: tokensieve adapt --model {_newest(run)}")


@app.command()
def adapt(
    config: Config = "adapt", model: Start = None, set_: Set = None, out: Out = None, resume: Resume = False
) -> None:
    """Sparse training, stage 2: selection is on and everything trains.

    With --set selection=false the dense model trains on the same tokens, to compare with.

    Example: tokensieve adapt --model runs/warmup/step-000200 --out runs/adapt
    """
    run = _train("adapt", config, _overrides(set_, model, out), resume)
    typer.echo(f"Next: tokensieve eval {_newest(run)}")


@app.command("eval")
def evaluate(
    model: Model = "base",
    quick: Annotated[bool, typer.Option("--quick", help="Few and short prompts: a first look.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of metrics.json; runs/eval-NAME unless given.")] = None,
    data: Annotated[str, typer.Option(help="Source of the text; its held-out part is used.")] = "python",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompts.")] = None,
    device: Device = "auto",
) -> None:
    """Measure a model: a dense one's use of its context, a sparse one against its own dense attention.

    Example: tokensieve eval base --quick
    """
    import tokensieve
    from tokensieve.data import read_documents
    from tokensieve.machine import choose_device
    from tokensieve.report import environment
    from tokensieve.train.figures import write_figures

    begin = time.perf_counter()
    loaded = tokensieve.load(model, device=choose_device(device))
    tokenizer = _tokenizer(model, loaded)
    documents = list(read_documents(data, "held_out"))
    metrics = _measure(loaded, tokenizer, documents, quick, context)
    metrics |= {"model": model, "seconds": time.perf_counter() - begin, "run": environment()}
    path = Path(model)
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("step-") else path.name
    folder = out or Path("runs") / f"eval-{name}"
    typer.echo(f"\nFigures: {write_figures(folder / 'metrics.json', metrics)}")


@app.command()
def generate(
    model: Model = "base",
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer in chat format; - reads it.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Talk: messages from standard input.")] = False,
    input_file: Annotated[Path | None, typer.Option(help="Answer all messages in it; blank lines part them.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    selection: Annotated[SelectBy | None, typer.Option(help="Who selects keys; the indexer unless given.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws when the temperature is not 0.")] = 0,
    device: Device = "auto",
) -> None:
    """Write text with a model, token by token, to standard output.

    Example: tokensieve generate base --prompt "def parse_args(argv):" --max-new-tokens 64
    """
    import tokensieve
    from tokensieve.machine import choose_device

    if sum((prompt is not None, chat is not None, interactive, input_file is not None)) != 1:
        raise tokensieve.UserError("give one of --prompt TEXT, --chat TEXT, --interactive and --input-file FILE")
    talk = interactive or input_file is not None
    if talk and selection is SelectBy.window:
        raise tokensieve.UserError("--selection window goes with --prompt and --chat only; use indexer or dense")
    text = input_file.read_text(encoding="utf-8") if input_file else ""
    if "-" in (prompt, chat):
        text = sys.stdin.read()
    loaded = tokensieve.load(model, device=choose_device(device))
    if selection not in (None, SelectBy.dense) and not loaded.is_sparse:
        raise tokensieve.UserError(f"--selection {selection}: {model} is dense and selects nothing; sparsify it first")
    tokenizer = _tokenizer(model, loaded)
    if talk:
        from tokensieve.engine import Sampling

        sampling = Sampling(max_tokens=max_new_tokens, temperature=temperature, seed=seed)
        _talk(
            loaded,
            tokenizer,
            sampling,
            text if input_file else None,
            "dense" if selection is SelectBy.dense else "indexer",
        )
        return
    ids = _prompt_ids(tokenizer, text or prompt or chat or "", as_chat=chat is not None)
    _write(loaded, tokenizer, ids, max_new_tokens, selection, temperature, seed)


def _write(
    model: "DecoderForCausalLM",
    tokenizer: Any,
    ids: list[int],
    tokens: int,
    selection: SelectBy | None,
    temperature: float,
    seed: int,
) -> None:
    import torch
    from transformers import TextStreamer

    import tokensieve

    room = model.config.max_position_embeddings
    if len(ids) + tokens > room:
        raise tokensieve.UserError(
            f"{len(ids)} prompt tokens and {tokens} new ones are past the model's {room} positions; shorten one"
        )
    torch.manual_seed(seed)
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    with torch.inference_mode(), tokensieve.selecting(model, selection.value if selection else "indexer"):
        model.generate(
            torch.tensor([ids], device=model.device),
            max_new_tokens=tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **draw,
            **ends,
        )


def _talk(
    model: "DecoderForCausalLM", tokenizer: Any, sampling: Any, file: str | None, selects: Literal["indexer", "dense"]
) -> None:
    """A conversation, or the answers to a file's messages."""
    from tokensieve.engine import Engine
    from tokensieve.serve import terminal

    prompts = None if file is None else terminal.prompts_in(file)
    engine = Engine(model, tokenizer)
    if prompts is not None:
        for asked, answer in terminal.answer_all(engine, prompts, sampling, selects):
            typer.echo(f"Prompt: {asked}\nCompletion: {answer}\n")
        return
    import readline  # noqa: F401  # with it, input() knows arrow keys and what was typed before

    ask = ">>> " if sys.stdin.isatty() else ""
    terminal.converse(
        engine, sampling, selects, lambda: input(ask), lambda part: typer.echo(part, nl=False), _stderr().print
    )

@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="HF_DIR", help="Checkpoint folder in Hugging Face format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards; with --reverse, for the checkpoint.")],
    n_experts: Annotated[int | None, typer.Option(help="Routed experts; checked against config.json.")] = None,
    model_parallel: Annotated[int | None, typer.Option(min=1, help="Shards, one for each GPU of the demo.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="HF_DIR holds shards: make a checkpoint of them.")] = False,
) -> None:
    """Write a checkpoint as the shards of the official inference demo, or with --reverse go back; every bit stays.

    Example: tokensieve convert base runs/shards --n-experts 16 --model-parallel 2
    """
    from tokensieve import checkpoint
    from tokensieve.config import UserError
    from tokensieve.model import model_path

    with _stderr().status("Reading headers") as status:

        def show(step: str) -> None:
            status.update(f"Writing {step}")

        if reverse:
            checkpoint.join_shards(source, out, model_parallel, n_experts, on_step=show)
            typer.echo(f"{out}: a checkpoint in Hugging Face format")
            return
        if model_parallel is None:
            raise UserError("say with --model-parallel for how many GPUs the shards are, for example 8")
        checkpoint.write_shards(model_path(source), out, model_parallel, n_experts, on_step=show)
    typer.echo(f"{out}: {model_parallel} shards, {checkpoint.rank_file(0, model_parallel)} the first")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits. Raises only what is a defect: bad input and interruptions end in one line."""
    try:
        app(arguments)
    except SystemExit:  # how every command ends; first, so that `--help` does not import what the next line needs
        raise
    except _bad_input() as error:
        _fail(f"error: {error}", 2)
    except _interruptions() as error:
        _fail(f"interrupted: {error}" if str(error) else "interrupted", 130)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check the path and its permissions"
        _fail(f"error: {error.filename or 'a file'} cannot be written or read ({error.strerror}); {remedy}", 2)


@cache
def _stderr() -> "Console":
    """One for the log and for what moves: two would write into each other's lines."""
    from rich.console import Console

    return Console(stderr=True)


def _bad_input() -> type[Exception]:
    from tokensieve.config import UserError

    return UserError


def _interruptions() -> tuple[type[BaseException], ...]:
    from tokensieve.train import Interrupted

    return Interrupted, KeyboardInterrupt


def _fail(message: str, status: int) -> None:
    print(f"tokensieve: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _overrides(set_: list[str] | None, model: str | None = None, out: str | None = None) -> tuple[str, ...]:
    """What the options change in the config, as `--set` would; a `--set` comes later and wins. JSON strings are TOML strings."""
    given = {"model": model, "data.tokenizer": model, "out": out}
    return (*(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None), *(set_ or ()))


def _train(stage: str, name: str, overrides: tuple[str, ...], resume: bool) -> Path:
    """Runs a stage, writes its metrics.json, and returns the run folder."""
    from tokensieve import train
    from tokensieve.config import TrainConfig, UserError, load_config
    from tokensieve.train.figures import summary, write_figures

    config = load_config(TrainConfig, name, overrides)
    if config.stage != stage:
        raise UserError(f"config {name} is for stage {config.stage}: run it with tokensieve {config.stage}")
    if not config.model and not config.shape:
        raise UserError(f"config {name} names no model to start from; say it with --model FOLDER")
    if not config.data.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=config.model))
    begin = time.perf_counter()
    train.run(config, resume=resume)
    write_figures(Path(config.out) / "metrics.json", summary(config) | {"seconds": time.perf_counter() - begin})
    typer.echo(f"{_newest(Path(config.out))}: the trained model")
    return Path(config.out)


def _newest(run: Path) -> Path:
    from tokensieve.train.state import checkpoints

    return checkpoints(run)[-1]


def _measure(
    model: "DecoderForCausalLM", tokenizer: Any, documents: list, quick: bool, context: int | None
) -> dict[str, Any]:
    """A sparse model's arms, or what a dense one has to show, in the usual contexts or in the one asked for; printed."""
    from rich.console import Console

    from tokensieve import evals
    from tokensieve.report import show, show_criteria

    sizes, console = evals.QUICK if quick else evals.FULL, Console()
    status = _stderr().status("Needles, text, completions and answers")
    if model.is_sparse:
        context = context or max(sizes.contexts[0], SELECT_FROM * model.top_k)
        texts, needle_contexts = (2, 1) if quick else (16, 8)
        with status:
            figures = evals.judge_sparse(
                model,
                tokenizer,
                documents,
                context,
                texts,
                needle_contexts,
                on_step=lambda what: status.update(f"Measuring: {what}"),
            )
        show(console, figures)
        return figures
    if context is not None:
        sizes = replace(sizes, contexts=(context,), long=context, short=min(sizes.short, context // 4))
    with status:
        figures = evals.acceptance(model, tokenizer, documents, sizes)
    show_criteria(console, evals.acceptance_criteria(figures))
    return figures


def _prompt_ids(tokenizer: Any, text: str, as_chat: bool) -> list[int]:
    from tokensieve.config import UserError

    if as_chat:
        if tokenizer.chat_template is None:
            raise UserError(
                "--chat: the model's tokenizer has no chat template; use --prompt, or add chat_template.jinja"
            )
        return list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        )
    first = tokenizer.bos_token_id
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    ids = ids if first is None or ids[:1] == [first] else [first, *ids]
    if not ids:
        raise UserError("--prompt is empty and the tokenizer has no first token; give some text")
    return ids


def _tokenizer(name: str, model: "DecoderForCausalLM") -> Any:
    import tokensieve
    from tokensieve.model import check_tokenizer

    tokenizer = tokensieve.load_tokenizer(name)
    check_tokenizer(tokenizer, model.config)
    return tokenizer


def _stored_dtype(name: str) -> "torch.dtype | None":
    """The dtype that config.json states, so that a checkpoint keeps its size; None leaves it to the loader."""
    import torch

    from tokensieve import checkpoint
    from tokensieve.model import model_path

    raw = checkpoint.read_config(model_path(name))
    stated = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(stated)


__all__ = ["app", "main"]
