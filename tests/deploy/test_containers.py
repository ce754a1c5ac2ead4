"""The container files, without Docker: what they copy, install and start exists, and only intended lines differ."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from tokensieve import cli

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "containers").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_there_are_two() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]
    cpu, cuda = (instructions(path) for path in FILES)
    (differing,) = [(a, b) for a, b in zip(cpu, cuda, strict=True) if a != b]
    assert differing[0][1].endswith(" .") and differing[1][1].endswith(' ".[hopper]"')


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_container(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} == {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    (image,) = [rest for name, rest in found if name == "FROM"]
    version = re.fullmatch(r"python:(3\.\d+)-slim", image)
    assert version and f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [source for name, rest in found if name == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in ignored, source
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert {PROJECT["readme"], *PROJECT["license-files"], "constraints.txt", "tokensieve"} <= set(copied)
    runs = " ".join(rest for name, rest in found if name == "RUN")
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch and torch[1] in runs.split()
    for extra in re.findall(r"\.\[(\w+)\]", runs):
        assert extra in PROJECT["optional-dependencies"]
    (entry,) = [re.findall(r'"([^"]+)"', rest) for name, rest in found if name == "ENTRYPOINT"]
    (default,) = [re.findall(r'"([^"]+)"', rest) for name, rest in found if name == "CMD"]
    assert entry == ["tokensieve"] and entry[0] in PROJECT["scripts"]
    shown = re.findall(r"tokensieve:\w+ (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown and {*shown, default[0]} <= set(get_command(cli.app).commands)
    assert found[-1][0] == "CMD" and ("USER", "tokensieve") in found  # not as root
