"""Commands run in this process, and a tiny home for them: text, a dense and a sparse checkpoint, and configs."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import tokensieve
from tests.support import models
from tokensieve import cli
from tokensieve.data import train_tokenizer

MODULES = "argparse ast inspect textwrap typing random shutil enum pathlib tarfile zipfile".split()
VOCABULARY, POSITIONS = 512, 1600

SMALL = ("--top-k", "24", "--index-heads", "4", "--index-dim", "16")  # an indexer of the tiny model


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Run = Callable[..., Ended]


def runner(capsys: pytest.CaptureFixture) -> Run:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(a) for a in arguments])
        shown = capsys.readouterr()
        return Ended(int(ended.value.code or 0), shown.out, shown.err)

    return run


def refusal(run: Run) -> Callable[..., None]:
    def refused(words: tuple[str, ...], *arguments: object) -> None:
        """The command fails on bad input: status 2, no traceback, and one line, the last, that holds all `words`."""
        ended = run(*arguments)
        assert ended.status == 2, ended
        lines = [line for line in ended.err.splitlines() if "tokensieve: error: " in line]
        assert len(lines) == 1 and ended.err.splitlines()[-1] == lines[0], ended.err
        assert "Traceback" not in ended.err + ended.out
        for word in words:
            assert word in lines[0], lines[0]

    return refused


def make_home(folder: Path) -> Path:
    """text/ (modules), dense/ (a checkpoint with a tokenizer), sparse/ (the same, sparsified), a config per stage."""
    text = folder / "text"
    text.mkdir()
    for name in MODULES:
        shutil.copy(str(__import__(name).__file__), text)
    model = models.ours(
        models.config("v3", vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=POSITIONS)
    )
    model.folder = train_tokenizer((p.read_text() for p in sorted(text.iterdir())), folder / "tokenizer", VOCABULARY)
    tokensieve.save(model, folder / "dense")
    tokensieve.save(tokensieve.sparsify(tokensieve.load(folder / "dense"), 24, 4, 16), folder / "sparse")
    shape = models.SHAPE | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    for stage in ("pretrain", "warmup", "adapt"):
        start = "" if stage == "pretrain" else folder / "sparse"
        lines = [f'stage = "{stage}"', f'model = "{start}"', 'out = ""', "save_every = 1", "track = []"]
        lines += [
            "[data]",
            f'tokenizer = "{folder / "dense"}"',
            f'cache = "{folder / "cache"}"',
            "held_out_share = 0.4",
        ]
        lines += [f'sources = [{{ source = "{text}" }}]']
        lines += ["[[phases]]", "steps = 3", "context = 64", "sequences = 2", "[optimizer]", "lr = 1e-3"]
        if stage == "pretrain":
            lines += ["[shape]", *(f"{k} = {v}" for k, v in shape.items())]
        (folder / f"{stage}.toml").write_text("\n".join(lines) + "\n")
    return folder


def tiny(home: Path, stage: str, out: Path, *more: object) -> tuple[object, ...]:
    """The arguments of a training command with the home's config."""
    return (stage, "--config", home / f"{stage}.toml", "--out", out, *more)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
