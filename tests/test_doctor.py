"""tokensieve doctor: the report is complete, plain data, honest about what is missing, and prints both ways."""

import json

import pytest
import typer
from typer.testing import CliRunner

from tokensieve import doctor, ops


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.report()


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(doctor.doctor)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def test_report_is_plain_data(found: dict) -> None:
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]["threads"] >= found["cpu"]["usable"] >= 1
    assert found["memory"]["total_bytes"] > found["memory"]["available_bytes"] > 0
    assert found["disk"]["free_bytes"] > 0
    assert found["packages"]["torch"]
    assert set(found["bundled"]) == {"base", "sparse"}


def test_report_uses_the_first_able_backend(found: dict) -> None:
    assert set(found["backends"]) == set(ops.backends())
    for op, choices in found["backends"].items():
        able = [c["name"] for c in choices if c["why_not"] is None]
        assert able, f"no backend runs {op}"
        assert found["uses"]["backends"][op] == able[0]
    assert found["uses"]["device"] == (found["devices"][0]["device"] if found["devices"] else "cpu")


def test_a_reason_for_every_vendor_module(found: dict, tmp_path, monkeypatch) -> None:
    assert set(found["vendor"]) == set(doctor.VENDOR_MODULES)
    (tmp_path / "broken_kernels.py").write_text("raise OSError('libcuda.so.1 is missing')")
    (tmp_path / "aborting_kernels.py").write_text("import os\nos.abort()")
    (tmp_path / "good_kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert doctor.vendor_why_not("no_such_kernels") == "not installed"
    assert doctor.vendor_why_not("broken_kernels") == "OSError: libcuda.so.1 is missing"
    assert "exit status" in (doctor.vendor_why_not("aborting_kernels") or "")
    assert doctor.vendor_why_not("good_kernels") is None


def test_json() -> None:
    assert json.loads(run("--json"))["python"]["version"]


def test_table() -> None:
    shown = run()
    for thing in ("Python", "memory", "flash_mla", "model 'base'", "op select_topk", "will be used"):
        assert thing in shown


def test_help_has_an_example() -> None:
    assert "Example" in run("--help")
