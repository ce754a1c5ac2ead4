"""The wheel alone is enough: built from this tree, installed elsewhere, and run from an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOADS = """
import tokensieve
from tokensieve.config import DemoConfig, load_config
model = tokensieve.load("sparse")
config = load_config(DemoConfig, "demo")
print(tokensieve.__file__, model.is_sparse, config.model, sep="\\n")
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder that holds the wheel's contents; the dependencies stay those of this interpreter."""
    target = wheel.parent / "installed"
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *offline, "--target", target, wheel, cwd=wheel.parent)
    return target


def test_whoever_installs_it_can_read_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        unreadable = [f.filename for f in archive.infolist() if (f.external_attr >> 16) & 0o444 != 0o444]
        names = archive.namelist()
    assert not unreadable
    files = [path for path in (ROOT / "tokensieve").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= set(names)  # models, configs and the page as well


@pytest.mark.slow
def test_it_loads_its_models_and_configs(installed: Path, tmp_path: Path) -> None:
    where, sparse, base = run("-c", LOADS, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert Path(where).is_relative_to(installed) and sparse == "True" and base == "base"


@pytest.mark.slow
def test_its_commands_run(installed: Path, tmp_path: Path) -> None:
    shown = run("-m", "tokensieve", "doctor", "--json", cwd=tmp_path, PYTHONPATH=str(installed))
    assert all(json.loads(shown)["bundled"].values())
    assert (installed / "bin" / "tokensieve").is_file()


@pytest.mark.slow
def test_the_whole_demo_runs(installed: Path, tmp_path: Path) -> None:
    """The main job as a user starts it: five to ten minutes on two cores."""
    run("-m", "tokensieve", "demo", "--out", "demo", cwd=tmp_path, PYTHONPATH=str(installed))
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["sparse"]
    assert (tmp_path / "demo" / "report.html").is_file() and (tmp_path / "demo" / "sparse").is_dir()
