"""Commands that end with the process that started them: at the block's end, at a kill, with all that they started."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.processes import gone, until
from tokensieve.tethered import run_tethered, tethered

# Starts one more process, writes both ids, and sleeps.
FAMILY = """
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
PARENT = """
import sys, time
from tokensieve.tethered import tethered
with tethered(sys.argv[1:]):
    time.sleep(600)
"""
SERVED = """
import sys, time
from tokensieve.server_process import server_process
with server_process("sparse", "cpu") as url:
    print(url, flush=True)
    time.sleep(600)
"""


def family(path: Path) -> list[int]:
    until(path.exists)
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_was_started_ends_with_a_killed_parent(number: signal.Signals, tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, sys.executable, "-c", FAMILY, str(ids)])
    started = family(ids)
    parent.send_signal(number)
    parent.wait()
    until(lambda: all(map(gone, started)))


def test_the_end_of_the_block_is_the_end_of_all(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    with tethered([sys.executable, "-c", FAMILY, str(ids)]) as process:
        started = family(ids)
        assert not any(map(gone, started))
    assert process.returncode == 128 + signal.SIGTERM
    until(lambda: all(map(gone, started)))


def test_what_a_command_leaves_ends_with_it(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    code = FAMILY.rsplit("time.sleep", 1)[0]
    assert run_tethered([sys.executable, "-c", code, str(ids)]).returncode == 0
    until(lambda: all(map(gone, family(ids))))


def test_status_and_streams_are_the_commands(tmp_path: Path) -> None:
    code = "import sys; print(input()); sys.stderr.write('said'); sys.exit(7)"
    done = run_tethered([sys.executable, "-c", code], "asked\n", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (7, "asked\n", "said")
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_tethered([sys.executable, "-c", killed]).returncode == 128 + signal.SIGKILL
    done = run_tethered([str(tmp_path / "none")], stderr=subprocess.PIPE)
    assert done.returncode == 127 and done.stderr == f"{tmp_path / 'none'}: No such file or directory\n"


def test_a_server_ends_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", SERVED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline().startswith("http://127.0.0.1:")
    started = [process.pid for process in psutil.Process(parent.pid).children(recursive=True)]
    assert len(started) == 2  # the server, and what stands between
    parent.kill()
    parent.communicate()
    until(lambda: all(map(gone, started)))
