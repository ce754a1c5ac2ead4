"""Commands on checkpoints: look at the machine, make a model sparse, measure it, convert it."""

import logging
import time
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokensieve.cli.measuring import MEASURED, Progress, measure_suite
from tokensieve.cli.paper import run_name
from tokensieve.cli.program import (
    Command,
    Config,
    Device,
    Model,
    OneProcess,
    Set,
    app,
    stderr,
    stdout,
    tokenizer_of,
    with_keys,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tokensieve.evaluate_config import EvaluateConfig
    from tokensieve.model import DecoderForCausalLM

log = logging.getLogger("tokensieve")
HELD_OUT_SHARE = 0.02  # of a source, unless it is said otherwise


class IndexDtype(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"


class Init(StrEnum):
    random = "random"
    attention = "attention"


class Suite(StrEnum):
    own = "own"
    long = "long"
    short = "short"
    parity = "parity"
    serving = "serving"
    paper = "paper"


@app.command(cls=Command)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False) -> None:
    """Show what this machine has (devices, backends and why not, versions, memory) and what will be used.

    Example: tokensieve doctor --json
    """
    from tokensieve import doctor as examination

    examination.doctor(as_json, stdout())


@app.command(cls=OneProcess)
def sparsify(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the new checkpoint; must not hold one.")],
    top_k: Annotated[
        str, typer.Option(metavar="N or N,N,...", help="Keys that a query selects: in all layers, or in each.")
    ] = "2048",
    index_heads: Annotated[int, typer.Option(help="Heads of the indexer.")] = 64,
    index_dim: Annotated[int, typer.Option(help="Width of an indexer head.")] = 128,
    index_dtype: Annotated[IndexDtype, typer.Option(help="Arithmetic of the index scores.")] = IndexDtype.bf16,
    seed: Annotated[int, typer.Option(help="Of the new indexer's weights.")] = 0,
    share_every: Annotated[
        int, typer.Option(min=1, help="Layers that share an indexer, which the first of them has; 1: each has its own.")
    ] = 1,
    init: Annotated[
        Init, typer.Option(help="Begin from random weights, or from each layer's own queries and keys.")
    ] = Init.random,
    init_data: Annotated[
        str | None,
        typer.Option(
            help="With --init attention: source of the text that the model reads for it, 8192 tokens; python unless "
            "given. 'random' are random tokens."
        ),
    ] = None,
) -> None:
    """Add an untrained indexer to a dense checkpoint: the start of warm-up.

    Example: tokensieve sparsify base runs/untrained --top-k 128 --index-heads 8 --index-dim 32 --init attention
    """
    from tokensieve.config import UserError
    from tokensieve.files import check_free, check_source, known_folder

    keys = _keys(top_k)
    known_folder(model)
    check_free(out)
    if init_data is not None and init != Init.attention:
        raise UserError("--init-data is text for --init attention; give both, or leave it out")
    source = init_data or "python"
    reads_text = init == Init.attention and source != "random"
    if reads_text:
        check_source(source)
    import tokensieve

    dense = tokensieve.load(model, dtype=_stored_dtype(model))
    calibration = _calibration(source, model, dense) if reads_text else None
    sparse = tokensieve.sparsify(
        dense,
        keys,
        index_heads,
        index_dim,
        index_dtype.value,
        seed,
        share_every,
        init.value,
        calibration,
    )
    tokensieve.save(sparse, out)
    count = sum(p.numel() for p in sparse.indexer_parameters())
    typer.echo(f"{out}: {count:,} parameters of indexers added, {top_k} keys per query, not trained yet")
    _say_what_its_tokenizer_lacks(out, sparse)
    typer.echo(f"Next: tokensieve warmup --model {out}")


def _keys(given: str) -> int | list[int]:
    """`--top-k` of sparsify: one number, or one for each layer."""
    from tokensieve.config import UserError
    from tokensieve.integers import read_integer

    try:
        keys = [read_integer(n) for n in given.split(",")]
    except ValueError as error:
        raise UserError(
            f"--top-k: {error}; write a number of keys, or one for each layer, as in 256,128,64,64"
        ) from error
    return keys[0] if len(keys) == 1 else keys


def _calibration(source: str, name: str, model: "DecoderForCausalLM") -> "Tensor":
    """Token ids (2, S) of a source's training text."""
    from tokensieve.config import UserError
    from tokensieve.data import read_documents, sample_rows
    from tokensieve.data.sample import CALIBRATION_BYTES
    from tokensieve.model import index_init

    try:
        tokenizer = tokenizer_of(name, model)
    except UserError as error:
        raise UserError(f"{error}; or read no text: --init-data random") from error
    longest = min(index_init.TOKENS, model.config.max_position_embeddings)
    documents = read_documents(source, "train", limit_bytes=CALIBRATION_BYTES)
    return sample_rows(tokenizer, documents, index_init.ROWS, longest)


def _say_what_its_tokenizer_lacks(folder: Path, model: "DecoderForCausalLM") -> None:
    """A log line about data that later commands will refuse."""
    from tokensieve.config import UserError
    from tokensieve.tasks import encoder

    try:
        encode = encoder(tokenizer_of(str(folder), model))
    except UserError as error:
        log.warning("%s: training and generate need a tokenizer here: %s", folder, error)
        return
    if encode.no_chat:
        log.warning("%s: plain text works, chat data and --chat do not: %s", folder, encode.no_chat)


@app.command("eval", cls=with_keys("EvaluateConfig", "evaluate", "tokensieve.evaluate_config"))
def evaluate(
    model: Model = "base",
    quick: Annotated[bool, typer.Option("--quick", help="Few and short prompts: a first look.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of metrics.json; runs/eval-NAME, or runs/eval-NAME-SUITE, unless given.")
    ] = None,
    data: Annotated[str, typer.Option(help="Source of the text; its held-out part is used.")] = "python",
    held_out_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of --data that is held out; 1 takes all of it.")
    ] = HELD_OUT_SHARE,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of the prompts.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME=SELECTION",
            help="Of a sparse model: one more arm. SELECTION is indexer, window, sinks, oracle, dense or "
            "module:function, a function that selects; may be repeated.",
        ),
    ] = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="own: what is said above. long: RULER's kinds of tasks and perplexity by position. short: small tasks "
            "with choices and the perplexity of short texts. parity: dense against sparse attention for several k. "
            "serving: whether an endpoint selects keys rightly. paper: the 14 benchmarks of the paper's Table 1; MODEL "
            "may be the URL of an endpoint, with its /v1."
        ),
    ] = Suite.own,
    before: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --suite short or parity: the model before its adaptation."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="With --suite serving: the OpenAI-compatible endpoint, with its /v1.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, help="With --suite serving: keys that a query selects, if it does not say."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --suite long, parity, serving or paper: go on with a stopped run.")
    ] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="With --suite paper: set two models side by side that were measured before."),
    ] = None,
    config: Config = "evaluate",
    set_: Set = None,
    device: Device = "auto",
) -> None:
    """Measure a model: a dense one's use of its context, a sparse one against its own dense attention.

    A sparse model is measured as it is (sparse), attending to every key (dense), to the last k (window) and to the k
    that attention itself weighs most (oracle). --arm puts further selections beside these. --suite asks something else:
    its sizes are the keys long.*, short.*, parity.* or serving.*. --suite serving probes an endpoint of any engine,
    needs no MODEL, and ends with status 1 if something is wrong. The keys of --suite paper are those of config `paper`.

    Example: tokensieve eval base --quick
    """
    from tokensieve.config import UserError, load_config
    from tokensieve.evaluate_config import EvaluateConfig
    from tokensieve.files import check_source, known_folder, write_json, written

    begin = time.perf_counter()
    if quick and config != "evaluate":
        raise UserError("--quick is --config evaluate-quick; give one of the two")
    texts = data != "python" or held_out_share != HELD_OUT_SHARE
    if suite == Suite.paper:
        if arm or context is not None or before is not None or url is not None or k is not None:
            raise UserError("--suite paper takes no --arm, --context, --before, --url or --k; MODEL may be a URL")
        if texts:
            raise UserError("--suite paper takes no --data or --held-out-share; --set data=FOLDER has its problems")
        from tokensieve.cli.paper import compare_paper, run_paper

        own = ("paper-quick" if quick else "paper") if config == "evaluate" else config
        if compare is not None:
            changed = model != "base", config != "evaluate", device != "auto"
            if any((*changed, quick, set_, out, resume)):
                raise UserError(
                    "--compare reads two runs that are there; it takes no MODEL, --quick, --config, --set, --out, "
                    "--resume or --device"
                )
            compare_paper(*compare)
        else:
            run_paper(model, own, tuple(set_ or ()), out, resume, device)
        return
    if compare is not None:
        raise UserError("--compare is for --suite paper; add it, or leave it out")
    sizes = load_config(EvaluateConfig, "evaluate-quick" if quick else config, tuple(set_ or ()))
    selections = _selections(arm or [])
    if suite == Suite.serving:
        if model != "base" or selections or before is not None:
            raise UserError("--suite serving takes no MODEL, --arm or --before; --set serving.model=ID names the model")
        if texts or device != "auto":
            raise UserError("--suite serving takes no --data, --held-out-share or --device; it asks --url alone")
        from tokensieve.cli.checking import check_endpoint

        with Progress() as on_progress:
            check_endpoint(url, k, context, out, resume, sizes.serving, on_progress)
        return
    if url is not None or k is not None:
        raise UserError("--url and --k are for --suite serving; add it, or leave them out")
    if resume and suite not in (Suite.long, Suite.parity):
        raise UserError("--resume goes on with --suite long, parity, serving or paper; add one, or leave it out")
    if before is not None and suite not in (Suite.short, Suite.parity):
        raise UserError("--before is compared with in --suite short and parity; give one of them, or leave it out")
    if suite == Suite.short and (selections or context is not None):
        raise UserError("--suite short takes no --arm and no --context; its texts have short.tokens tokens")
    if suite == Suite.parity and selections:
        raise UserError("--suite parity takes no --arm; name further selectors in --suite long, or without a suite")
    known_folder(model)
    if before is not None:
        known_folder(before)
    check_source(data)
    import tokensieve
    from tokensieve import evals
    from tokensieve.data import read_documents
    from tokensieve.machine import choose_device
    from tokensieve.model import check_tokenizer
    from tokensieve.model.files import model_path
    from tokensieve.model.selection import resolve
    from tokensieve.report import environment

    for selection in selections.values():
        resolve(selection)  # before the model is read
    loaded = tokensieve.load(model, device=choose_device(device))
    if selections and not loaded.is_sparse:
        raise UserError(f"--arm: {model} is dense and selects nothing; sparsify it first")
    tokenizer = tokenizer_of(model, loaded)
    documents = list(read_documents(data, "test", held_out_share))
    name = run_name(model)
    folder = out or Path("runs") / (f"eval-{name}" if suite == Suite.own else f"eval-{name}-{suite}")
    if suite == Suite.own:
        metrics = _measure(loaded, tokenizer, documents, sizes, context, selections)
    else:
        other = tokensieve.load(before, device=choose_device(device)) if before is not None else None
        if other is not None:
            check_tokenizer(tokenizer, other.config)
        asked = {"model": model} | ({"before": before} if before is not None else {})
        models = {key: [name, written(model_path(name))] for key, name in asked.items()}
        what: dict[str, Any] = models | {"data": data, "held_out_share": held_out_share}
        if suite in (Suite.long, Suite.parity):
            what |= {"context": context, "arms": selections, "long": asdict(sizes.long)}
            what |= {"parity": asdict(sizes.parity)} if suite == Suite.parity else {}
            finished = evals.Finished.of(folder / MEASURED, what, resume)
        else:
            finished = evals.Finished()
        figures = measure_suite(suite.value, loaded, other, tokenizer, documents, sizes, context, selections, finished)
        metrics = {suite.value: figures}
    metrics |= {"model": model, "seconds": time.perf_counter() - begin, "run": environment()}
    file = write_json(folder / "metrics.json", metrics)
    if suite != Suite.own:
        finished.end()
    _print_figures(loaded, metrics, suite)
    typer.echo(f"\nFigures: {file}")


@app.command(cls=OneProcess)
def convert(
    source: Annotated[str, typer.Argument(metavar="HF_DIR", help="Checkpoint folder in Hugging Face format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the shards; with --reverse, for the checkpoint.")],
    n_experts: Annotated[int | None, typer.Option(help="Routed experts; checked against config.json.")] = None,
    model_parallel: Annotated[int | None, typer.Option(min=1, help="Shards, one for each GPU of the demo.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="HF_DIR holds shards: make a checkpoint of them.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Write the checkpoint in FP8 blocks instead.")] = False,
) -> None:
    """Write a checkpoint as the shards of the official inference demo, or with --reverse go back; every bit stays.

    With --fp8 write it as a checkpoint in FP8 blocks, as DeepSeek publishes them, and show what the rounding lost.

    Example: tokensieve convert base runs/shards --n-experts 16 --model-parallel 2
    """
    from tokensieve.config import UserError
    from tokensieve.files import known_folder

    if fp8:
        if reverse or model_parallel is not None or n_experts is not None:
            raise UserError("--fp8 writes a checkpoint, not shards; leave --reverse, --model-parallel, --n-experts out")
        known_folder(source)
        from tokensieve.cli.fp8 import convert_to_fp8

        convert_to_fp8(source, out)
        return
    if not reverse:
        known_folder(source)
        if model_parallel is None:
            raise UserError("say with --model-parallel for how many GPUs the shards are, for example 8")
    from tokensieve import checkpoint
    from tokensieve.model import model_path

    with stderr().status("Reading headers") as status:

        def show(step: str) -> None:
            status.update(f"Writing {step}")

        if reverse or model_parallel is None:
            checkpoint.join_shards(source, out, model_parallel, n_experts, on_step=show)
            typer.echo(f"{out}: a checkpoint in Hugging Face format")
            return
        checkpoint.write_shards(model_path(source), out, model_parallel, n_experts, on_step=show)
    typer.echo(f"{out}: {model_parallel} shards, {checkpoint.rank_file(0, model_parallel)} the first")


def _selections(arms: list[str]) -> dict[str, str]:
    from tokensieve.config import UserError, check_selector

    selections: dict[str, str] = {}
    for arm in arms:
        name, equals, selection = arm.partition("=")
        if not (equals and name.strip() and selection.strip()):
            raise UserError(f"--arm {arm}: write it as NAME=SELECTION, for example --arm mine=package.module:select")
        if name.strip() in selections:
            raise UserError(f"--arm {arm}: there is an arm {name.strip()} already; give each its own name")
        selections[name.strip()] = check_selector(selection.strip())
    return selections


def _measure(
    model: "DecoderForCausalLM",
    tokenizer: Any,
    documents: list,
    sizes: "EvaluateConfig",
    context: int | None,
    selections: dict[str, str],
) -> dict[str, Any]:
    """A sparse model's arms or a dense one's use of its context, in the config's contexts or the one given."""
    from tokensieve import evals
    from tokensieve.config import UserError

    if model.is_sparse:
        lengths = sizes.sparse.lengths(model.top_k) if context is None else (context,)
        if len(lengths) != 1:
            raise UserError("eval compares in one context; set sparse.contexts to one, or give --context")
        with Progress() as on_progress:
            return evals.judge_sparse(
                model,
                tokenizer,
                documents,
                lengths[0],
                sizes.sparse,
                selections=selections,
                on_progress=on_progress,
            )
    base = sizes.base
    if context is not None:
        base = replace(base, contexts=(context,), long=context, short=min(base.short, context // 4))
    with Progress() as on_progress:
        return evals.acceptance(model, tokenizer, documents, base, on_progress)


def _print_figures(model: "DecoderForCausalLM", metrics: dict[str, Any], suite: Suite) -> None:
    from tokensieve import evals
    from tokensieve.report import show, show_criteria, show_suite

    if suite != Suite.own:
        show_suite(stdout(), suite.value, metrics[suite.value])
    elif model.is_sparse:
        show(stdout(), metrics)
    else:
        show_criteria(stdout(), evals.acceptance_criteria(metrics))


def _stored_dtype(name: str) -> "torch.dtype | None":
    """The dtype that config.json states, so that a checkpoint keeps its size; None leaves it to the loader."""
    import torch

    from tokensieve import checkpoint
    from tokensieve.model import model_path

    raw = checkpoint.read_config(model_path(name))
    stated = str(raw.get("dtype") or raw.get("torch_dtype") or "").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(stated)
