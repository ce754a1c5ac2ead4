"""The folder of a run belongs to one run: at a time, from its first file on, and byte by byte."""

import errno
import json
import logging
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import forks
from tests.support.training import Workplace, workplace
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.files import LOCK
from tokensieve.train import history, loop, run
from tokensieve.train.schedule import extends
from tokensieve.train.state import checkpoints


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("folder"))


def train(settings: TrainConfig, reached: Any, go: Any) -> None:
    """Stops in the first step."""

    def wait(_: int, __: dict[str, float]) -> None:
        reached.set()
        go.wait()

    run(settings, on_step=wait, progress=False)


def test_two_runs_at_once(here: Workplace) -> None:
    """The second one is refused; a run that is killed holds nothing."""
    settings = here.run("warmup", "two", PhaseConfig(2, 48, 2))
    reached, go = forks.context().Event(), forks.context().Event()
    first = forks.context().Process(target=train, args=(settings, reached, go), daemon=True)
    first.start()
    assert reached.wait(60)
    with pytest.raises(UserError, match="two is in use by another run; wait for its end, or name another folder"):
        run(settings, resume=True, progress=False)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    run(settings, resume=True, progress=False)
    assert [row["step"] for row in history(settings.out)] == [1, 2] and not (Path(settings.out) / LOCK).exists()


def test_a_model_that_is_rounded_is_not_trained(here: Workplace) -> None:
    settings = here.run("warmup", "rounded", PhaseConfig(1, 48, 2))
    made = tokensieve.load(here.root / "sparse", torch.bfloat16)
    with pytest.raises(UserError, match=r"^model\.embed_tokens\.weight is bfloat16, .* with dtype=torch\.float32$"):
        run(settings, made, progress=False)
    assert not Path(settings.out).exists()


def test_a_run_that_began_while_this_one_was_loading(here: Workplace) -> None:
    settings = here.run("warmup", "meanwhile", PhaseConfig(1, 48, 2))
    slow = loop.Run(settings, resume=True)
    run(settings, progress=False)
    with pytest.raises(UserError, match="another run has trained there meanwhile"), slow.prepared():
        pass
    assert len(history(settings.out)) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("config.json", "metrics.jsonl"), r"holds a run already \(without a checkpoint so far\); add --resume"),
        (("metrics.jsonl",), r"holds a run already \(without a checkpoint so far\)"),
        (("config.json",), "holds a config.json already, which a run would replace; name another folder"),
    ],
)
def test_what_has_no_checkpoint_yet_is_not_written_over(names: tuple[str, ...], words: str, here: Workplace) -> None:
    settings = here.run("warmup", f"early-{len(words)}", PhaseConfig(1, 48, 2))
    out = Path(settings.out)
    out.mkdir(parents=True)
    for name in names:
        (out / name).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=words):
        run(settings, progress=False)
    if "config.json" in names:  # and it is not this run's
        with pytest.raises(UserError, match="config or data differ .* name another folder"):
            run(settings, resume=True, progress=False)
    assert {path.name: path.read_text() for path in out.iterdir()} == dict.fromkeys(names, '{"step": 1}\n')


def test_flipped_bytes_are_noticed(here: Workplace) -> None:
    settings = here.run("warmup", "flipped", PhaseConfig(2, 48, 2), save_every=1)
    run(settings, progress=False)
    path = checkpoints(Path(settings.out))[-1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(byte ^ 1 for byte in content[-64:])
    path.write_bytes(content)
    with pytest.raises(UserError, match="step-000002/model.safetensors: is damaged.* remove .*step-000002 to resume"):
        run(settings, resume=True, progress=False)


def test_a_read_only_folder_is_not_a_full_disk(here: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    settings = here.run("warmup", "read-only", PhaseConfig(1, 48, 2))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"read-only cannot be written \(Read-only file system\); check the path and"):
        run(settings, progress=False)


def test_a_finished_run_goes_on_for_more_steps(here: Workplace, caplog: pytest.LogCaptureFixture) -> None:
    short = here.run("warmup", "longer", PhaseConfig(2, 48, 2), PhaseConfig(1, 96, 2), save_every=1)
    run(short, progress=False)
    rows = history(short.out)
    longer = replace(short, phases=(short.phases[0], replace(short.phases[1], steps=2), PhaseConfig(1, 48, 2)))
    with caplog.at_level(logging.INFO, "tokensieve"):
        run(longer, resume=True, progress=False)
    assert "extended from 3 to 5 steps; from step 4 on" in caplog.text
    assert history(short.out)[:3] == rows and [row["step"] for row in history(short.out)] == [1, 2, 3, 4, 5]
    assert json.loads((Path(short.out) / "config.json").read_text())["phases"][1]["steps"] == 2
    for other in (short, replace(longer, phases=(PhaseConfig(9, 48, 2), *longer.phases[1:]))):
        with pytest.raises(UserError, match="in the run that is there"):
            run(other, resume=True, progress=False)


def test_what_extends_a_run() -> None:
    a, b = PhaseConfig(2, 48, 2), PhaseConfig(3, 96, 2)
    assert extends((a, b), (a,)) and extends((replace(a, steps=5), b), (a,)) and extends((a,), (a,))
    for phases in ((b, a), (), (replace(a, steps=1),), (replace(a, context=96),)):
        assert not extends(phases, (a,))
    assert not extends((replace(a, steps=5), b), (a, b)) and not extends((a,), ())
