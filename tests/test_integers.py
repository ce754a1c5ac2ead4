"""Whole numbers that nothing can hold: one clear line, wherever a user's number is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.support import commands
from tokensieve import cli
from tokensieve.cli.program import Command
from tokensieve.config import TrainConfig, UserError, load_config
from tokensieve.families import model_config
from tokensieve.files import known_folder
from tokensieve.integers import LARGEST, is_too_large, read_integer, read_json

LONG, LONGER = "1" + "0" * 399, "1" + "0" * 5000  # more than a float holds; more than Python reads
BEYOND = f"beyond {LARGEST}, the largest whole number"


def test_numbers_up_to_64_bits() -> None:
    assert [read_integer(text) for text in ("0", " +7", "-12", "0" * 500 + "3", str(LARGEST))] == [
        0,
        7,
        -12,
        3,
        LARGEST,
    ]
    for text in (LONG, LONGER, f"-{LONG}", str(LARGEST + 1)):
        with pytest.raises(ValueError, match=r"a whole number of \d+ digits, and the largest is"):
            read_integer(text)
    for text in ("", "1.0", "1_000", "²", "x"):
        with pytest.raises(ValueError, match="is no whole number"):
            read_integer(text)
    assert read_json('{"a": [1, 2.5, true]}') == {"a": [1, 2.5, True]}
    for text in (f'{{"a": [{LONG}]}}', LONGER, "[" * 100_000):
        with pytest.raises(ValueError, match="whole number|nested"):
            read_json(text)
    assert not is_too_large(float("inf")) and is_too_large(-LARGEST - 2)


@pytest.mark.parametrize("number", [LONG, LONGER])
@pytest.mark.parametrize("key", ["seed", "data.limit_bytes", "phases.0.steps", "optimizer.lr"])
def test_configs(number: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^config .*; correct the value") as refused:
        load_config(TrainConfig, "warmup", (f"{key}={number}",))
    assert len(str(refused.value)) < 700
    if number == LONG:
        assert f"{key} is {BEYOND}" in str(refused.value)
    written = tmp_path / "config.toml"
    table, _, last = key.rpartition(".")
    written.write_text(f"[[{table[:-2]}]]\n{last} = {number}\n" if table.endswith(".0") else f"{key} = {number}\n")
    with pytest.raises(UserError, match=f"^config {written}: "):
        load_config(TrainConfig, str(written))


@pytest.mark.parametrize("entry", [LONG, LONGER, "²", "7"])
def test_entries_of_a_list(entry: str) -> None:
    with pytest.raises(UserError, match="^--set phases.*a table|^--set phases.*name a setting") as refused:
        load_config(TrainConfig, "warmup", (f"phases.{entry}.steps=1",))
    assert len(str(refused.value)) < 250


def sizes() -> Iterator[tuple[str, Any]]:
    folder = known_folder("sparse")
    assert folder is not None
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    yield from ((key, raw) for key, value in raw.items() if type(value) in (int, float))


def test_model_configs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refused, path = commands.refusal(commands.runner(capsys)), tmp_path / "config.json"
    for key, raw in sizes():
        with pytest.raises(UserError, match=f"config.json: {key} is beyond"):
            model_config(raw | {key: int(LONG)})
        for number in (LONG, LONGER) if key == "vocab_size" else (LONG,):
            path.write_text(json.dumps(raw | {key: "HERE"}).replace('"HERE"', number))
            refused((str(path), "whole number of", "largest is"), "cost", path)
    for key, says in (("num_hidden_layers", "beyond 65536"), ("num_experts_per_tok", "experts")):
        path.write_text(json.dumps(raw | {key: 2**62}))
        refused((f"config.json: {key}", says), "cost", path)
    path.write_text(json.dumps(raw | {"hidden_size": float("inf")}))
    refused(("config.json: ", "hidden_size", "correct"), "cost", path)


@pytest.mark.parametrize("number", [LONG, LONGER])
@pytest.mark.parametrize(
    "command",
    [
        "cost --positions 8,HERE",
        "cost --two-level HEREx8",
        "cost --gpus HERE",
        "cost --top-k HERE",
        "plan base --gpus HERE",
        "share sparse OUT --layers 0,HERE",
        "share sparse OUT --keep HERE",
        "sparsify base OUT --top-k 8,HERE",
        "sparsify base OUT --index-heads HERE",
        "bench serve --requests 1,HERE",
        "bench serve --shape deepseek_v32 --set num_hidden_layers=HERE",
        "generate base --prompt a --max-new-tokens HERE",
        "generate base --prompt a --seed HERE",
        "deploy vllm sparse --gpus HERE",
        "eval sparse --set seed=HERE",
    ],
)
def test_options(command: str, number: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [part.replace("HERE", number).replace("OUT", str(tmp_path / "out")) for part in command.split()]
    ended = commands.runner(capsys)(*arguments)
    assert ended.status == 2 and "Traceback" not in ended.err
    if number == LONG:
        (said,) = [line for line in ended.err.splitlines() if "error: " in line]
        assert len(said) < 300, said


def test_every_command_looks_at_its_numbers() -> None:
    program: Any = typer.main.get_command(cli.app)
    found = [*program.commands.values(), *program.commands["bench"].commands.values()]
    assert [one.name for one in found if not isinstance(one, Command)] == ["bench"]
