"""Processes that several modules train on: started once for a module."""

from collections.abc import Iterator

import pytest

from tests.support import ranks


@pytest.fixture(scope="module")
def two() -> Iterator[ranks.Group]:
    with ranks.started(2) as group:
        yield group


@pytest.fixture(scope="module")
def four() -> Iterator[ranks.Group]:
    with ranks.started(4) as group:
        yield group
