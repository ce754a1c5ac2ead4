"""Hostile programs in the sandbox: none gets out, and no harm is done; as root and as nobody, by both isolations."""

import base64
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hostile, sandbox_users
from tests.support.hostile_greed import GREEDY
from tests.support.hostile_reach import REACHING

WORKER = Path(sandbox_users.__file__).with_name("sandbox_worker.py")
BUBBLEWRAP = pytest.mark.bubblewrap
# Root never runs under bubblewrap, and an ordinary user cannot become another one.
WAYS = (
    [
        pytest.param((False, "namespaces"), id="root-namespaces"),
        pytest.param((True, "namespaces"), id="nobody-namespaces"),
        pytest.param((True, "bubblewrap"), id="nobody-bubblewrap", marks=BUBBLEWRAP),
    ]
    if os.geteuid() == 0
    else [
        pytest.param((False, "namespaces"), id="user-namespaces"),
        pytest.param((False, "bubblewrap"), id="user-bubblewrap", marks=BUBBLEWRAP),
    ]
)


@pytest.fixture(scope="module", params=WAYS)
def attacked(request: pytest.FixtureRequest) -> Iterator[dict]:
    as_nobody, isolation = request.param
    folder = Path(tempfile.mkdtemp(prefix="tokensieve-victim-"))  # pytest's own folders are closed to others
    folder.chmod(0o755)
    if as_nobody:
        os.chown(folder, sandbox_users.NOBODY, sandbox_users.NOBODY)
    asked = {
        "folder": str(folder),
        "isolation": isolation,
        "secret": secrets.token_hex(16),
        "mark": f"mark-{secrets.token_hex(8)}",
    }
    try:
        done = sandbox_users.run(WORKER, json.dumps(asked), as_nobody=as_nobody, timeout=300)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
    finally:
        shutil.rmtree(folder)
    assert answer["isolation"] == isolation
    assert (answer["user"] == sandbox_users.NOBODY) == as_nobody or os.geteuid() != 0
    yield answer | {"secret": asked["secret"]}


@pytest.mark.parametrize("program", [*REACHING, *GREEDY], ids=lambda program: program.name.replace(" ", "-"))
def test_it_holds(attacked: dict, program: hostile.Hostile) -> None:
    found = attacked["outcomes"][program.name]
    out, err = base64.b64decode(found["out"]), base64.b64decode(found["err"])
    shown = (out[-3000:] + err[-1000:]).decode(errors="replace")
    assert b"BROKEN" not in out, shown
    assert attacked["secret"].encode() not in out + err
    assert found["ended"] in program.ended.split(" or "), shown
    assert found["alive"] == []
    assert max(len(out), len(err)) <= hostile.OUTPUT_BYTES
    if found["ended"] in ("exit", "signal"):
        assert b"held" in out and b"Traceback" not in err, shown  # it has tried
    if found["ended"] == "output":
        assert max(len(out), len(err)) == hostile.OUTPUT_BYTES


def test_the_host_is_unharmed(attacked: dict) -> None:
    assert attacked["harm"] == []


def test_verdicts_are_not_forged(attacked: dict) -> None:
    """What a program says, writes or sends decides nothing: its status and its output are those of what it did."""
    claim = attacked["outcomes"]["claims to have passed"]
    assert (claim["ended"], claim["status"]) == ("exit", 3)
    forged = attacked["outcomes"]["writes a report of its own"]
    assert b"held " in base64.b64decode(forged["out"]) and forged["status"] == 0
    assert base64.b64decode(attacked["outcomes"]["closes its streams"]["out"]) == b"held"
    garbage = base64.b64decode(attacked["outcomes"]["writes garbage"]["out"])
    assert garbage == b"held" + bytes(range(256)) * 8
