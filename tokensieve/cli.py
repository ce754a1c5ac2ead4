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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from tokensieve.config import TrainConfig
    from tokensieve.evals import AcceptanceSizes
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


Model = Annotated[str, typer.Argument(help="Checkpoint folder in Hugging Face format, or a bundled name (base).")]
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
    from rich.console import Console
    from rich.logging import RichHandler

    log = logging.getLogger("tokensieve")
    log.handlers = [RichHandler(console=Console(stderr=True), show_path=False, show_time=False, show_level=False)]
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
    from tokensieve import evals
    from tokensieve.data import read_documents
    from tokensieve.report import environment

    begin = time.perf_counter()
    loaded = tokensieve.load(model, device=_device(device))
    tokenizer = _tokenizer(model, loaded)
    documents = list(read_documents(data, "held_out"))
    if loaded.is_sparse:
        metrics = _parity(loaded, tokenizer, documents, quick, context)
    else:
        metrics = _acceptance(loaded, tokenizer, documents, evals.QUICK if quick else evals.FULL, context)
    metrics |= {"model": model, "seconds": time.perf_counter() - begin, "run": environment()}
    path = Path(model)
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("step-") else path.name
    folder = out or Path("runs") / f"eval-{name}"
    typer.echo(f"\nFigures: {_write_json(folder / 'metrics.json', metrics)}")


@app.command()
def generate(
    model: Model = "base",
    prompt: Annotated[str | None, typer.Option(help="Text to continue; - reads standard input.")] = None,
    chat: Annotated[str | None, typer.Option(help="A message to answer in chat format; - reads it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    selection: Annotated[SelectBy | None, typer.Option(help="Who selects keys; the indexer unless given.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws when the temperature is not 0.")] = 0,
    device: Device = "auto",
) -> None:
    """Write text with a model, token by token, to standard output.

    Example: tokensieve generate base --prompt "def parse_args(argv):" --max-new-tokens 64
    """
    import torch
    from transformers import TextStreamer

    import tokensieve

    if (prompt is None) == (chat is None):
        raise tokensieve.UserError("give either --prompt TEXT or --chat TEXT")
    text = sys.stdin.read() if "-" in (prompt, chat) else prompt or chat or ""
    loaded = tokensieve.load(model, device=_device(device))
    if selection not in (None, SelectBy.dense) and not loaded.is_sparse:
        raise tokensieve.UserError(f"--selection {selection}: {model} is dense and selects nothing; sparsify it first")
    tokenizer = _tokenizer(model, loaded)
    ids = _prompt_ids(tokenizer, text, as_chat=chat is not None)
    room = loaded.config.max_position_embeddings
    if len(ids) + max_new_tokens > room:
        raise tokensieve.UserError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones are past the model's {room} positions; shorten one"
        )
    torch.manual_seed(seed)
    draw = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id}
    with torch.inference_mode(), tokensieve.selecting(loaded, selection.value if selection else "indexer"):
        loaded.generate(
            torch.tensor([ids], device=loaded.device),
            max_new_tokens=max_new_tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **draw,
            **ends,
        )


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

    config = load_config(TrainConfig, name, overrides)
    if config.stage != stage:
        raise UserError(f"config {name} is for stage {config.stage}: run it with tokensieve {config.stage}")
    if not config.model and not config.shape:
        raise UserError(f"config {name} names no model to start from; say it with --model FOLDER")
    if not config.data.tokenizer:
        config = replace(config, data=replace(config.data, tokenizer=config.model))
    begin = time.perf_counter()
    train.run(config, resume=resume)
    _write_json(Path(config.out) / "metrics.json", _training_metrics(config, time.perf_counter() - begin))
    typer.echo(f"{_newest(Path(config.out))}: the trained model")
    return Path(config.out)


def _training_metrics(config: "TrainConfig", seconds: float) -> dict[str, Any]:
    """{"stage", "steps", "tokens", "seconds" of this command, and of each loss "first" and "last" of the whole run}."""
    from tokensieve import train

    rows = train.history(config.out)
    losses: dict[str, Any] = {
        k: {"first": rows[0][k], "last": rows[-1][k]} for k in ("loss", "lm", "kl") if rows and k in rows[-1]
    }
    steps = sum(p.steps for p in config.phases)
    tokens = sum(p.steps * p.sequences * p.context for p in config.phases)
    return {"stage": config.stage, "steps": steps, "tokens": tokens, "seconds": seconds, **losses}


def _newest(run: Path) -> Path:
    from tokensieve.train.state import checkpoints

    return checkpoints(run)[-1]


def _acceptance(
    model: "DecoderForCausalLM", tokenizer: Any, documents: list, sizes: "AcceptanceSizes", context: int | None
) -> dict[str, Any]:
    """What a base model has to show, in the contexts of `sizes` or in one that was asked for."""
    from rich.console import Console

    from tokensieve import evals

    if context is not None:
        sizes = replace(sizes, contexts=(context,), long=context, short=min(sizes.short, context // 4))
    _check_room(model, max(*sizes.contexts, sizes.long))
    console = Console()
    with Console(stderr=True).status("Needles, text, completions and answers"):
        figures = evals.acceptance(model, tokenizer, documents, sizes)
    criteria = evals.acceptance_criteria(figures)
    for c in criteria:
        verdict = "[green]holds[/green]" if c.holds else "[red]fails[/red]"
        console.print(f"{verdict}  {c.name}: {c.value:.3f} ({c.relation} {c.bound:.2f})", highlight=False)
    return figures | {"criteria": {c.name: c.holds for c in criteria}}


def _check_room(model: "DecoderForCausalLM", context: int) -> None:
    from tokensieve.config import UserError

    room = model.config.max_position_embeddings
    if context > room:
        raise UserError(
            f"prompts of {context} tokens are past the model's {room} positions; shorten them with --context"
        )


def _parity(
    model: "DecoderForCausalLM", tokenizer: Any, documents: list, quick: bool, context: int | None
) -> dict[str, Any]:
    """The arms of one sparse model on the same prompts; all prompts are longer than k."""
    from rich.console import Console

    from tokensieve import cost, evals
    from tokensieve.config import UserError
    from tokensieve.report import show
    from tokensieve.tasks import PlainEncoder, retrieval

    k = model.top_k
    context = context or max((evals.QUICK if quick else evals.FULL).contexts[0], SELECT_FROM * k)
    _check_room(model, context)
    if context <= k:
        raise UserError(f"prompts of {context} tokens are not longer than k = {k}: nothing is selected; see --context")
    encode = PlainEncoder(tokenizer)
    texts = evals.text_sequences(encode, documents, context, 2 if quick else 16)
    needles = retrieval.needle_contexts(encode, documents, context, count=1 if quick else 8)
    with Console(stderr=True).status("") as status:
        scores = evals.compare(evals.arms_of(model), texts, needles, k, lambda arm: status.update(f"Arm {arm}"))
        status.update("Recall")
        recall = evals.recall(model, texts[:2], queries=128)
    figures = {"recall": {"last": recall.overall}, "kv_read_fraction": cost.kv_read_fraction(context, k)}
    metrics = {**evals.metrics_of(scores), **figures, "top_k": k, "context": context}
    show(Console(), metrics)
    return metrics


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


def _device(name: str) -> str:
    import torch

    from tokensieve.config import UserError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device here; see tokensieve doctor")
    return name


def _stored_dtype(name: str) -> "torch.dtype | None":
    """The dtype that config.json states, so that a checkpoint keeps its size; None leaves it to the loader."""
    import torch

    from tokensieve import checkpoint
    from tokensieve.model import model_path

    raw = checkpoint.read_config(model_path(name))
    stated = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(stated)


def _write_json(path: Path, figures: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


__all__ = ["app", "main"]
