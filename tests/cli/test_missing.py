"""A package that is not installed: one line with the command that installs it, whenever the package is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from tokensieve.cli.missing import report_missing


@pytest.mark.parametrize(
    ("package", "importer", "remedy"),
    [
        ("dacite", "tokensieve.config", "-m pip install 'dacite>="),
        ("typer", "tokensieve.cli.training", "-m pip install 'typer>="),  # before there is a command line
        ("rich", "tokensieve.cli.program", "-m pip install 'rich>="),
        ("shellingham", "typer", "-m pip check names"),  # a dependency of a dependency
    ],
)
def test_one_line(package: str, importer: str, remedy: str) -> None:
    code = f"import sys; sys.modules['{package}'] = None; from tokensieve.cli import main; main(['warmup'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.startswith(f"tokensieve: error: {importer}") and ended.stderr.count("\n") == 1, ended.stderr
    assert f"imports {package}" in ended.stderr and "which is not installed" in ended.stderr and remedy in ended.stderr


def test_post_training_needs_trl(tmp_path: Path) -> None:
    """An extra has it. Nothing is left behind."""
    code = "import sys; sys.modules['trl'] = None; from tokensieve.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "posttrain", "--out", str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert "imports trl" in ended.stderr and "'trl>=" in ended.stderr and not (tmp_path / "run").exists()


def test_an_error_that_hides_the_package(capsys: pytest.CaptureFixture) -> None:
    """transformers raises its own error, without a name, from the one that has it."""
    with pytest.raises(SystemExit) as ended, report_missing():
        try:
            import nowhere_at_all  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error
    assert ended.value.code == 2 and "imports nowhere_at_all" in capsys.readouterr().err


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError), report_missing():
        import tokensieve.nowhere  # noqa: F401
