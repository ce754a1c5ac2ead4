"""The process of a harness: it ends if we are killed, and holds its folder until then."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tokensieve.config import UserError
from tokensieve.evals.paper.asking import run_harness
from tokensieve.evals.paper.harnesses import Unavailable

RUN = """
import sys
from pathlib import Path
from tokensieve.evals.paper.asking import run_harness
wait = "import os, signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(2), os._exit(1)))"
wait += "; print(os.getpid(), flush=True); time.sleep(60)"
run_harness([sys.executable, "-c", wait], Path(sys.argv[1]))
"""


def test_a_harness_whose_run_was_killed_ends_and_keeps_its_folder_until_then(tmp_path: Path) -> None:
    folder = tmp_path / "aime25"
    ours = subprocess.Popen([sys.executable, "-c", RUN, str(folder)])
    log = folder / "harness.log"
    end = time.monotonic() + 60
    while not (log.is_file() and log.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    theirs = int(log.read_text())
    ours.send_signal(signal.SIGKILL)
    ours.wait()
    with pytest.raises(UserError, match="in use by another run; wait for its end"):
        run_harness([sys.executable, "-c", "pass"], folder)
    while time.monotonic() < end:
        try:
            run_harness([sys.executable, "-c", "pass"], folder)
            break
        except UserError:  # it takes its time to end
            time.sleep(0.05)
    assert not psutil.pid_exists(theirs)
    assert not (folder / "lock").exists() and [file.name for file in folder.iterdir()] == ["harness.log"]


def test_the_last_line_is_the_reason(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ValueError: no; see .*harness.log"):
        run_harness([sys.executable, "-c", "raise ValueError('no')"], tmp_path)
    run_harness([sys.executable, "-c", "print(input())"], tmp_path, given="said")
    assert (tmp_path / "harness.log").read_text().endswith("said\n")
