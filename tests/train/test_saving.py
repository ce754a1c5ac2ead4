"""Checkpoints of several ranks: who writes and reads what, when one counts, and runs that go on with other ranks."""

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import grouped, models, ranks
from tests.support.training import SMALL, Workplace, workplace
from tests.support.training_runs import (
    ROUNDING,
    Ended,
    alone,
    assert_same_content,
    back_to,
    content,
    run,
    trained,
    waiting,
)
from tokensieve import checkpoint
from tokensieve.checkpoint import writing
from tokensieve.config import PhaseConfig, TrainConfig
from tokensieve.families import model_config
from tokensieve.files import locked
from tokensieve.train import loop, parallelize, saving
from tokensieve.train.state import checkpoints

# in a rank's process


def other_seed(settings: TrainConfig) -> Ended:
    return trained(replace(settings, seed=ranks.HERE[0].rank))


def other_text(settings: TrainConfig, folder: Path) -> Ended:
    """A run on a relative path, which leads elsewhere on each rank."""
    source = replace(settings.data.sources[0], source="text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / f"of-rank-{ranks.HERE[0].rank}")
        return trained(replace(settings, data=replace(settings.data, sources=(source,))))


def other_code(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(loop, "code_digest", lambda: f"of rank {rank}")


def slow_disk(patch: pytest.MonkeyPatch, rank: int, until: int = 4) -> Callable[[int], None] | None:
    """Rank 1 writes its files of the checkpoint of step 2 after its step `until`."""
    if rank != 1:
        return None
    real, left = writing.save_file, [False]

    def save_file(*given: Any, **more: Any) -> None:
        while not left[0]:
            time.sleep(0.01)
        real(*given, **more)

    def after(done: int) -> None:
        if done == until:
            left[0] = True
            time.sleep(1)  # more than the files take

    patch.setattr(writing, "save_file", save_file)
    return after


def full_disk(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The second checkpoint finds the disk of rank 1 full."""
    waiting(patch, rank)
    real = writing.save_file

    def save_file(tensors: Any, path: Path, **more: Any) -> None:
        if rank == 1 and "step-000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **more)

    patch.setattr(writing, "save_file", save_file)


def threads_left(settings: TrainConfig) -> int:
    """Threads of this rank that outlive a run that is given up while it writes."""
    before = threading.active_count()

    def slow_files(patch: pytest.MonkeyPatch, rank: int) -> None:
        real = writing.save_file
        patch.setattr(writing, "save_file", lambda *given, **more: (time.sleep(0.1), real(*given, **more)))

    ended = trained(settings, False, 3, slow_files)
    assert ended.found[2] == [".step-000002.saving"]
    return threading.active_count() - before


def files_of_rank(settings: TrainConfig) -> list[str]:
    """The files that this rank writes."""
    written: list[str] = []

    def recording(patch: pytest.MonkeyPatch, rank: int) -> None:
        real = checkpoint.sync
        patch.setattr(checkpoint, "sync", lambda path: (written.append(path.name), real(path)))

    assert not trained(settings, prepare=recording).error
    return written


def gathered_by_rank(settings: TrainConfig) -> list[tuple[int, ...]]:
    """Shapes of what this rank gathers of the experts for a checkpoint, their moments included."""
    shapes: list[tuple[int, ...]] = []

    def recording(patch: pytest.MonkeyPatch, rank: int) -> None:
        for name in ("blocks", "whole"):
            real = getattr(saving, name)

            def gather(tensor: torch.Tensor, real: Any = real) -> Any:
                found = real(tensor)
                blocks = [found] if isinstance(found, torch.Tensor) else list(found)
                shapes.extend(tuple(block.shape) for block in blocks if block.dim() == 3)
                return found if isinstance(found, torch.Tensor) else iter(blocks)

            patch.setattr(saving, name, gather)

    assert not trained(settings, prepare=recording).error
    return shapes


def read_by_rank(folder: Path, expert_parallel: int) -> tuple[int, int, dict[str, Any]]:
    """Values that this rank reads of a checkpoint, the most that it holds at once, and its gathered tensors."""
    made, sizes, mesh = parallelize.empty_model(model_config(checkpoint.read_config(folder))), [], ranks.HERE[0]
    phases = (PhaseConfig(1, 48, 4, 1),)
    settings = TrainConfig("adapt", "", "", phases, device="cpu", expert_parallel=expert_parallel)
    division = parallelize.divide(settings, mesh)
    parallelize.shard(made, division)
    real = checkpoint.load_tensors

    def recording(*given: Any, **more: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in real(*given, **more):
            sizes.append(tensor.numel())
            yield name, tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load_tensors", recording)
        parallelize.read_parts(made, folder, division)
    return sum(sizes), max(sizes), {n: parallelize.whole(t).numpy() for n, t in made.state_dict().items()}


# here


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("saving"))


@pytest.mark.parametrize("stage", ["warmup", pytest.param("adapt", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_losses(two: ranks.Group, here: Workplace, stage: str) -> None:
    """To the bit on as many ranks, and within rounding on one, and on two after one."""
    whole = here.run(stage, f"{stage}-whole", context_parallel=2, save_every=2)
    begun = replace(whole, out=whole.out.replace("whole", "cut"))
    expected = run(two, whole).losses
    assert run(two, begun, False, 3, waiting).losses == expected[:3]  # the third step comes after the checkpoint
    assert run(two, begun, True).losses == expected[2:] and len(expected) == 4
    assert_same_content(Path(begun.out, "step-000004"), Path(whole.out, "step-000004"))
    rows = [json.loads(line) for line in Path(begun.out, "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == expected
    back_to(begun.out, 2)
    assert alone(replace(begun, context_parallel=1), resume=True) == pytest.approx(expected[2:], rel=ROUNDING)
    single = replace(whole, out=whole.out.replace("whole", "one"), context_parallel=1)
    assert alone(single) == pytest.approx(expected, rel=ROUNDING)
    back_to(single.out, 2)
    assert run(two, replace(single, context_parallel=2), True).losses == pytest.approx(expected[2:], rel=ROUNDING)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_the_ranks_share_the_files(two: ranks.Group, here: Workplace, expert_parallel: int) -> None:
    """Each writes about half, and together they are a checkpoint in Hugging Face format."""
    phase = PhaseConfig(1, 48, 4, 2)
    settings = here.run("adapt", f"files-{expert_parallel}", phase, expert_parallel=expert_parallel)
    parts = two.ask(files_of_rank, settings)
    (last,) = checkpoints(Path(settings.out))
    names = {path.name for path in last.glob("*.safetensors")}
    assert sorted([*parts[0], *parts[1]]) == sorted(names) and min(map(len, parts)) >= len(names) // 2 > 3
    state = json.loads((last / "state.json").read_text())
    assert list(state["checksums"]) == sorted(names) and all(state["checksums"].values())
    loaded = tokensieve.load(last).state_dict()
    index = json.loads((last / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {name for name in names if name.startswith("model")} and loaded
    assert (last / "tokenizer.json").is_file() and not list(Path(settings.out).glob(".*"))


def test_experts_are_gathered_a_rank_s_at_a_time(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("adapt", "blocks", PhaseConfig(1, 48, 4, 2), expert_parallel=2)
    for shapes in two.ask(gathered_by_rank, settings):
        assert len(shapes) == 2 * 2 * 3 and all(shape[0] == 4 for shape in shapes)  # two tensors; weights and moments


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_no_rank_reads_what_it_does_not_keep(two: ranks.Group, here: Workplace, expert_parallel: int) -> None:
    folder = here.root / "sparse"
    whole = tokensieve.load(folder).state_dict()
    total, largest = sum(t.numel() for t in whole.values()), max(t.numel() for t in whole.values())
    for read, most, tensors in two.ask(read_by_rank, folder, expert_parallel):
        assert read < 0.52 * total and most <= largest // 2  # biases that are not divided come whole
        assert tensors.keys() == whole.keys()
        assert all((tensors[name] == whole[name].numpy()).all() for name in whole)


def test_two_ranks_extend_a_model(two: ranks.Group, here: Workplace) -> None:
    """Its tensors are read in parts, its positions are those of the shape."""
    settings = here.run("pretrain", "extended", PhaseConfig(2, 48, 4, 2), model=str(here.root / "dense"))
    settings = replace(settings, shape={"max_position_embeddings": 512})
    assert run(two, settings).losses == pytest.approx(alone(replace(settings, out=f"{settings.out}-one")), rel=ROUNDING)
    assert tokensieve.load(Path(settings.out, "step-000002")).config.max_position_embeddings == 512


def test_a_checkpoint_counts_once_all_ranks_have_written(two: ranks.Group, here: Workplace) -> None:
    """Until then training goes on, and a run that is given up has none."""
    settings = here.run("warmup", "beside", PhaseConfig(6, 48, 4, 2), save_every=2, context_parallel=2, keep=9)
    one_save = replace(settings, save_every=2, phases=(PhaseConfig(6, 48, 4, 2),))
    assert run(two, one_save, False, 3, partial(slow_disk, until=3)).error == ""
    out = Path(settings.out)
    assert [path.name for path in out.glob("*step-*")] == [".step-000002.saving"] and not checkpoints(out)
    answers = two.ask(trained, one_save, True, 0, slow_disk)
    assert answers[0].found[0] == []  # what the first run left is gone
    assert answers[0].found[2] == answers[0].found[3] == [".step-000002.saving"]
    assert [path.name for path in checkpoints(out)] == ["step-000002", "step-000004", "step-000006"]
    assert not list(out.glob(".step*"))


def test_nothing_is_written_after_a_run(two: ranks.Group, here: Workplace) -> None:
    """Its folder is free then, and another run may make one of the same name."""
    settings = here.run("warmup", "given-up", context_parallel=2, save_every=2)
    assert two.ask(threads_left, settings) == [0, 0]
    assert run(two, settings, True).error == ""


def test_a_disk_that_is_full_for_one_rank(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("warmup", "full", context_parallel=2, save_every=2)
    ended = run(two, settings, False, 0, full_disk)
    assert "step-000004: cannot write the checkpoint" in ended.error and "the disk is full; free space" in ended.error
    out = Path(settings.out)
    assert [path.name for path in out.glob("*step-*")] == ["step-000002"]
    assert run(two, settings, True).losses == ended.losses[2:]


# ---- bad input


def test_two_runs_in_one_folder(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("warmup", "twice", context_parallel=2)
    with locked(settings.out):
        assert "is in use by another run" in run(two, settings).error


def test_ranks_that_differ(two: ranks.Group, here: Workplace, tmp_path: Path) -> None:
    settings = here.run("warmup", "others")
    for rank in range(2):
        text = tmp_path / f"of-rank-{rank}" / "text"
        text.mkdir(parents=True)
        (text / "a.py").write_text("x = 1\n" * (2000 + rank))
    for what, question in (
        ("config", lambda: two.ask(other_seed, settings)),
        ("data", lambda: two.ask(other_text, settings, tmp_path)),
        ("code", lambda: two.ask(trained, settings, False, 0, other_code)),
    ):
        errors = {answer.error for answer in question()}
        assert errors == {f"the ranks differ in their {what}; start all of them with the same"}
    assert not Path(settings.out).exists()


# ---- more ranks


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "adapt"])
def test_divided_experts_and_whole_ones(four: ranks.Group, two: ranks.Group, here: Workplace, stage: str) -> None:
    """A run of four ranks, whose experts are divided by two and sharded over two, goes on in every other way, and the
    other way round.
    """
    phase, name = PhaseConfig(4, 48, 4, 1), f"experts-{stage}"
    whole = here.run(stage, name, phase, context_parallel=2, expert_parallel=2, save_every=2)
    one = replace(whole, out=f"{whole.out}-one", context_parallel=1, expert_parallel=1)
    expected = alone(one)
    losses = run(four, whole).losses
    assert losses == pytest.approx(expected, rel=ROUNDING)
    again = content(Path(whole.out, "step-000004"))
    back_to(whole.out, 2)
    assert run(four, whole, True).losses == losses[2:]
    new = content(Path(whole.out, "step-000004"))
    assert again.keys() == new.keys() and all(torch.equal(again[name], new[name]) for name in again)
    for group, sharing, dividing in ((four, 1, 4), (four, 4, 1), (two, 1, 2), (two, 2, 1)):
        back_to(whole.out, 2)
        changed = replace(whole, context_parallel=sharing, expert_parallel=dividing)
        assert run(group, changed, True).losses == pytest.approx(expected[2:], rel=ROUNDING)
    back_to(whole.out, 2)
    assert alone(replace(whole, context_parallel=1, expert_parallel=1), True) == pytest.approx(
        expected[2:], rel=ROUNDING
    )
    back_to(one.out, 2)
    assert run(four, replace(whole, out=one.out), True).losses == pytest.approx(expected[2:], rel=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm", "qwen3_moe_dsa"])
def test_four_ranks_two_and_one(four: ranks.Group, two: ranks.Group, here: Workplace, family: str) -> None:
    """A tied head, layers that share an indexer, and five experts, which four ranks do not divide evenly."""
    folder = here.root / family
    if family == "glm":
        made = models.config(
            "glm", **SMALL | {"index_topk": 16, "num_hidden_layers": 3}, indexer_types=["full", "shared", "full"]
        )
    else:
        made = grouped.config(family, **SMALL | {"num_experts": 5}, tie_word_embeddings=True)
    model = models.ours(made)
    model.folder = here.root / "tokenizer"
    tokensieve.save(model, folder)
    whole = here.run("adapt", family, model=str(folder), context_parallel=2, save_every=2)
    expected = alone(replace(whole, context_parallel=1, out=f"{whole.out}-one"))
    assert run(four, whole).losses == pytest.approx(expected, rel=ROUNDING)
    for group, sharing in ((four, 2), (four, 4), (two, 1), (two, 2)):
        back_to(whole.out, 2)
        losses = run(group, replace(whole, context_parallel=sharing), True).losses
        assert losses == pytest.approx(expected[2:], rel=ROUNDING) and len(losses) == 2
        if (group, sharing) == (four, 2):
            again = content(Path(whole.out, "step-000004"))
            back_to(whole.out, 2)
            assert run(four, whole, True).losses == losses
            assert all(torch.equal(t, again[n]) for n, t in content(Path(whole.out, "step-000004")).items())
    back_to(whole.out, 2)
    assert alone(replace(whole, context_parallel=1), resume=True) == pytest.approx(expected[2:], rel=ROUNDING)


@pytest.mark.slow
def test_fp8_blocks_are_read_in_parts(two: ranks.Group, here: Workplace, tmp_path: Path) -> None:
    tokensieve.save(tokensieve.load(here.root / "sparse"), tmp_path / "fp8", fp8=True)
    whole = tokensieve.load(tmp_path / "fp8", torch.float32).state_dict()
    for _, _, tensors in two.ask(read_by_rank, tmp_path / "fp8", 1):
        assert all((tensors[name] == whole[name].numpy()).all() for name in whole)
