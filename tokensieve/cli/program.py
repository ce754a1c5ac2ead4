"""The parts that all commands share: the program, common options, exit statuses, and messages for bad input."""

import errno
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tokensieve.cli.missing import report_missing

if TYPE_CHECKING:
    from rich.console import Console

    from tokensieve.model import DecoderForCausalLM

# Failures of the system, not of the program: no space, no permission, not a folder, a read-only disk.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
DISK_ERRORS |= {errno.EEXIST}

UNBROKEN = 1000  # columns, of tables and lines in a pipe or a file

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


Model = Annotated[
    str,
    typer.Argument(help="Checkpoint folder in Hugging Face format, a GGUF file, or a name (base, sparse, smollm2)."),
]
Config = Annotated[str, typer.Option(metavar="NAME_OR_PATH", help="A .toml file, or a bundled config by name.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the config; may be repeated."),
]
Start = Annotated[str | None, typer.Option("--model", help="Checkpoint to start from; its tokenizer is used.")]
Out = Annotated[str | None, typer.Option(help="Run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run folder.")]


class Command(TyperCommand):
    """A command that refuses whole numbers beyond 64 bits."""

    def invoke(self, ctx: Any) -> Any:
        from tokensieve.config import UserError
        from tokensieve.integers import LARGEST, is_too_large

        for name, value in ctx.params.items():
            if any(map(is_too_large, value if isinstance(value, list | tuple) else [value])):
                option = f"--{name.rstrip('_').replace('_', '-')}"
                raise UserError(f"{option} is beyond {LARGEST}, the largest whole number; give a smaller one")
        return super().invoke(ctx)


class OneProcess(Command):
    """A command that would do the same in every process that torchrun starts, into one folder; it refuses to run so."""

    def invoke(self, ctx: Any) -> Any:
        from tokensieve.config import UserError
        from tokensieve.machine import rank_info

        if (size := rank_info().size) > 1:
            raise UserError(
                f"torchrun started {size} processes, and {self.name} runs in one so far; start it without torchrun"
            )
        return super().invoke(ctx)


def with_keys(
    kind: str, default: str, module: str = "tokensieve.config", runs_in: type[Command] = OneProcess
) -> type[Command]:
    """A command whose help ends with the keys of --set: those of a class in `module`, by name, with the values that a
    bundled config gives them. runs_in: OneProcess, or Command for a command that runs on several ranks.
    """

    class WithKeys(runs_in):  # type: ignore[misc, valid-type]
        def format_help(self, ctx: Any, formatter: Any) -> None:
            from rich.markup import escape

            from tokensieve import config

            values = config.to_dict(config.load_config(getattr(importlib.import_module(module), kind), default))
            explained = f"{module.replace('.', '/')}.py"
            lines = [f"Keys of --set, with the values of config {default} ({explained} explains each):"]
            tables: dict[str, list[str]] = {}
            for key, value in config.flat(values):
                entry = f"{key} (none)" if value is None else f"{key}={json.dumps(value)}"
                tables.setdefault(key.rpartition(".")[0], []).append(entry)
            lines += [escape("  ".join(keys)) for keys in tables.values()]
            self.epilog = "\n\n".join(lines)
            super().format_help(ctx, formatter)

    return WithKeys


SELECTOR = "Selector of keys: indexer (the default), window, sinks, oracle, dense, or module:function for your own."


def checked_selection(name: str | None) -> str | None:
    from tokensieve.config import check_selector

    return None if name is None else check_selector(name)


def _checked_device(name: str) -> str:
    from tokensieve.machine import check_device

    return check_device(name)


Selection = Annotated[str | None, typer.Option(metavar="NAME", help=SELECTOR, callback=checked_selection)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", callback=_checked_device)]


def _version(show: bool) -> None:
    if show:
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
    log = logging.getLogger("tokensieve")
    log.handlers = [_log_handler()]
    log.setLevel(logging.INFO)


def _log_handler() -> logging.Handler:
    """Log lines that fit a terminal; anywhere else each record is one line, however long."""
    from rich.logging import RichHandler

    if not stderr().is_terminal:
        return logging.StreamHandler()
    return RichHandler(console=stderr(), show_path=False, show_time=False, show_level=False)


@contextmanager
def held_log() -> Iterator[None]:
    """Log lines wait until the block ends: none comes between the words that it writes to standard output."""
    log = logging.getLogger("tokensieve")
    shown = log.handlers
    waiting = [MemoryHandler(1000, flushLevel=sys.maxsize, target=handler) for handler in shown]
    log.handlers = [*waiting]
    try:
        yield
    finally:
        log.handlers = shown
        for handler in waiting:
            handler.close()  # which shows what it holds


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits. Bad input and interruptions end in one line; only defects raise."""
    try:
        with report_missing():
            app(arguments)
    except _loaded("tokensieve.config", "UserError") as error:
        _fail(2, *(f"error: {reason}" for reason in error.args), alone=getattr(error, "alone", False))
    except _interruptions() as error:
        _fail(130, f"interrupted: {error}" if str(error) else "interrupted")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        from tokensieve.files import remedy

        what = error.filename or "a file"
        _fail(2, f"error: {what} cannot be written or read ({error.strerror}); {remedy(error)}")


@cache
def stderr() -> "Console":
    """The console for the log and for progress bars. There is one, since two would write into each other's lines."""
    from rich.console import Console

    return Console(stderr=True)


def stdout() -> "Console":
    """A console for standard output. Lines that no terminal shows are not broken: programs read them."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=UNBROKEN)


def _loaded(module: str, name: str) -> tuple[type[BaseException], ...]:
    """An exception of a module, to be caught; none if the module is not loaded, since then nobody has raised it."""
    exception = getattr(sys.modules.get(module), name, None)
    return () if exception is None else (exception,)


def _interruptions() -> tuple[type[BaseException], ...]:
    return KeyboardInterrupt, *_loaded("tokensieve.train", "Interrupted")


def _fail(status: int, *messages: str, alone: bool = False) -> None:
    from tokensieve.machine import rank_info

    if rank_info().rank and not alone:
        # Rank 0 prints; a failing status of another rank could end rank 0 before it has printed.
        status, messages = 0, ()
    for message in messages:
        print(f"tokensieve: {' '.join(message.split())}", file=sys.stderr)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        # gloo's threads still wait for the other ranks, and an ordinary end may abort on them with another status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def overrides(
    set_: list[str] | None, model: str | None = None, out: str | None = None, selection: str | None = None
) -> tuple[str, ...]:
    """The options' changes to the config, in the form of `--set`; a `--set` comes later and wins.

    A JSON string is a TOML string too.
    """
    options = {"model": model, "data.tokenizer": model, "out": out, "selection": selection}
    return (*(f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None), *(set_ or ()))


def check_selection(selection: str | None, name: str, model: "DecoderForCausalLM") -> None:
    """UserError if the named selector needs a k and the model is dense, which has none."""
    from tokensieve.config import UserError
    from tokensieve.model.selection import SELECTORS, is_own, resolve

    if selection is None or model.is_sparse:
        return
    selector = resolve(selection)
    if is_own(selector) and selector is not SELECTORS["dense"]:
        raise UserError(
            f"--selection {selection}: {name} is dense and selects nothing; sparsify it first, or say --selection dense"
        )


def tokenizer_of(name: str, model: "DecoderForCausalLM") -> Any:
    import tokensieve
    from tokensieve.model import check_tokenizer

    tokenizer = tokensieve.load_tokenizer(name)
    check_tokenizer(tokenizer, model.config)
    return tokenizer
