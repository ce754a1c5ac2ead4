"""tokensieve doctor: the report is complete, plain data, honest about what is missing, and prints both ways."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import tokensieve
from tokensieve import doctor, ops
from tokensieve.config import UserError
from tokensieve.machine import choose_device


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
    assert found["packages"]["torch"] and found["tokensieve"] == tokensieve.__version__
    assert set(found["bundled"]) == {"base", "sparse"}


def test_report_uses_the_first_able_backend(found: dict) -> None:
    assert set(found["backends"]) == set(ops.backends())
    for op, choices in found["backends"].items():
        able = [c["name"] for c in choices if c["why_not"] is None]
        assert able, f"no backend runs {op}"
        assert found["uses"]["backends"][op] == able[0]
    assert found["uses"]["device"] == ("cuda" if found["devices"] else "cpu")


def test_it_says_what_commands_take(monkeypatch) -> None:
    """Nothing selects Apple's device, so it is not announced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = doctor.report()
    assert found["uses"]["device"] == choose_device("auto") == "cpu" and not found["devices"]
    for asked, message in (("mps", "use auto, cpu or cuda"), ("cuda:0", "no CUDA device")):
        with pytest.raises(UserError, match=message):
            choose_device(asked)


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
    for thing in ("Python", "memory", "GPU", "sandbox", "torch 2", "flash_mla", "base ", "will be used", "operators"):
        assert thing in shown
    assert len(shown.splitlines()) <= 20


def test_each_operator_is_accounted_for_in_a_few_lines(found: dict) -> None:
    """Which backend runs what, and each reason why not once."""
    able, reason = {"name": "reference", "why_not": None}, "it only has a"
    slow = [{"name": "fast", "why_not": reason}, able]
    made = {
        "backends": {"a": [{"name": "fast", "why_not": None}, able], "b": slow, "c": slow},
        "uses": {"backends": {"a": "fast", "b": "reference", "c": "reference"}},
    }
    assert doctor.operators(found | made) == [
        ("operators", "fast for a; reference for the 2 others"),
        ("", f"not fast for the 2 others: {reason}"),
    ]
    made = {"backends": {"b": slow, "c": slow}, "uses": {"backends": {"b": "reference", "c": "reference"}}}
    assert doctor.operators(found | made)[0] == ("operators", "reference for all operators")


def test_what_is_broken_or_missing_is_said(found: dict) -> None:
    """A package that is not there is one name in a list; one that is there and does not work has a line of its own."""
    vendor = {"flash_mla": "OSError: libcuda.so.1 is missing", "deep_gemm": doctor.NOT_INSTALLED, "tilelang": None}
    device = {"device": "cuda:0", "name": "H200", "capability": "9.0", "total_bytes": 140 << 30, "free_bytes": 9 << 30}
    bundled = {"base": None, "sparse": 1 << 20}
    shown = doctor.rows(found | {"vendor": vendor, "devices": [device], "bundled": bundled})
    assert ("", "flash_mla does not work: OSError: libcuda.so.1 is missing") in shown
    assert ("GPU", "cuda:0: H200, capability 9.0, 9.0 GiB free of 140.0 GiB") in shown
    assert ("models", "base is missing here, sparse 1.0 MiB") in shown
    refused = {"sandbox": {"isolation": None, "why_not": "unshare: Operation not permitted"}}
    assert ("sandbox", "none: unshare: Operation not permitted") in doctor.rows(found | refused)
    text = dict(shown)["packages"]
    assert "tilelang" in text and "deep_gemm" not in text


def test_help_has_an_example() -> None:
    assert "Example" in run("--help")
