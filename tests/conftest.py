"""What holds for every test: threads, no network, the log, and what is skipped on a machine that lacks something."""

import logging
import os
import shutil
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which torch may do first
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network fails instead of waiting
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts a job in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)


pytest.register_assert_rewrite("tests.support.browser")  # a test file imports it before it is known as a plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "a test that needs a browser, a C++ compiler or bubblewrap fails on a machine without; else it is skipped"
    parser.addoption("--complete", action="store_true", help=text)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need what this machine lacks: here, not in their fixtures, so that the summary says it once."""
    reason = None
    if "chromium" in item.fixturenames:
        from tests.support import browser

        reason = browser.why_not()
    elif "compiler" in item.fixturenames and not shutil.which(os.environ.get("CXX", "g++")):
        reason = "no C++ compiler, which torch.compile needs: apt-get install g++"
    elif item.get_closest_marker("bubblewrap") and not shutil.which("bwrap"):  # the same tests run by namespaces
        reason = "no bubblewrap, which the sandbox prefers if it is there: apt-get install bubblewrap"
    if reason:
        (pytest.fail if item.config.getoption("complete") else pytest.skip)(reason)


@pytest.fixture
def compiler() -> None:
    """For tests of what torch.compile builds for a CPU."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.fixture(autouse=True)
def _log_as_before():
    """A command sets up the log of its process, which here is everybody's."""
    log = logging.getLogger("tokensieve")
    before = log.handlers, log.level
    yield
    log.handlers, log.level = before


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process."""
    from tests.support import commands

    monkeypatch.setenv("COLUMNS", "200")
    return commands.runner(capsys)
