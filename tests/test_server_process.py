"""Our server as a process: why it could not start, in one line."""

import pytest

from tokensieve.server_process import NotServed, server_process


def test_a_server_that_does_not_start() -> None:
    with pytest.raises(NotServed, match="^model 'nowhere': no such folder"), server_process("nowhere"):
        pass
