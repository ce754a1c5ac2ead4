"""Our server as a process: why it could not start, in one line and in a log, and what it is started with."""

import sys
from pathlib import Path

import pytest

from tokensieve.server_process import NotServed, server_process


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(NotServed, match="^model 'nowhere': no such folder"), server_process("nowhere", log=log):
        pass
    assert "model 'nowhere': no such folder" in log.read_text()


def test_it_gets_the_options_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in the environment is that of another server, which the user starts."""
    fake = tmp_path / "python"
    code = "import os, sys; print(sys.argv[4:], os.environ.get('TOKENSIEVE_API_KEY'), file=sys.stderr)"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("TOKENSIEVE_API_KEY", "secret")
    with pytest.raises(NotServed) as raised, server_process("m", "cpu", str(fake), ("--pages", "9")):
        pass
    given = ["m", "--port", "0", "--device", "cpu", "--no-playground", "--pages", "9"]
    assert str(raised.value) == f"{given} None"


def test_a_server_that_is_killed_says_so(tmp_path: Path) -> None:
    """As the system kills one that needs more memory than there is. What it wrote before is not the reason."""
    fake = tmp_path / "python"
    code = "import os, sys; print('reading weights', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)"
    fake.write_text(f"#!{sys.executable}\n{code}\n")
    fake.chmod(0o755)
    with pytest.raises(NotServed, match="killed the server, most likely for want of memory"):
        with server_process("m", "cpu", str(fake)):
            pass
