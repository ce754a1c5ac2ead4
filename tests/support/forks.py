"""Processes forked from a server that has imported the package once and started no thread."""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest

import tokensieve.engine
import tokensieve.train  # noqa: F401  # for the server, which imports this file


def context() -> ForkServerContext:
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server does not know where its parent finds modules
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return forks
