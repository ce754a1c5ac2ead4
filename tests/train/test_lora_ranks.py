"""LoRA and compiled layers on several ranks: runs that go on with other ranks, and what their checkpoints hold."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokensieve
from tests.support import grouped, models, ranks
from tests.support.training import SMALL, Workplace, workplace
from tests.support.training_runs import ROUNDING, alone, assert_same_content, back_to, run, waiting
from tokensieve.checkpoint import writing
from tokensieve.config import LoraConfig, PhaseConfig
from tokensieve.cost.division import ADAPTED_EXPERTS
from tokensieve.files import MERGED
from tokensieve.train import lora
from tokensieve.train.state import checkpoints

LORA = LoraConfig(rank=3, targets=("q_b_proj", "kv_b_proj", "down_proj", "experts.gate_up_proj"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return workplace(tmp_path_factory.mktemp("lora-ranks"))


def no_room_to_merge(patch: pytest.MonkeyPatch, rank: int) -> None:
    """The merged model finds the disk of rank 1 full."""
    require = writing.require_space

    def refusing(path: Path, size: int) -> None:
        if rank == 1 and MERGED in path.name:
            raise OSError(errno.ENOSPC, "no space left")
        require(path, size)

    patch.setattr(writing, "require_space", refusing)


def random_states(folder: Path) -> torch.Tensor:
    """The states of all ranks' random numbers."""
    (states,) = (t for path in folder.glob("*.safetensors") for n, t in load_file(path).items() if n == "rng|cpu")
    return states


def assert_merged(run: Path, family: str = "sparse", setting: LoraConfig = LORA) -> None:
    """The run's merged model is its base with what the last adapter's file says, as one process merges it."""
    base = tokensieve.load(run.parents[1] / family, torch.float32)
    with lora.adapted(base, setting) as adapter:
        lora.restore_adapter(adapter, checkpoints(run)[-1])
    merged = tokensieve.load(run / MERGED, torch.float32).state_dict()
    assert merged.keys() == base.state_dict().keys()
    for name, tensor in base.state_dict().items():
        assert models.difference(merged[name], tensor) < 1e-6, name  # float32 products on parts of their rows


def test_adapters_go_on_with_other_ranks(two: ranks.Group, here: Workplace) -> None:
    """As a whole model's run does; the adapter and the merged model are those of one process."""
    whole = here.run("adapt", "lora-whole", context_parallel=2, save_every=2, lora=LORA)
    begun = replace(whole, out=whole.out.replace("whole", "cut"))
    expected = run(two, whole).losses
    assert run(two, begun, False, 3, waiting).losses == expected[:3] and not Path(begun.out, MERGED).exists()
    assert run(two, begun, True).losses == expected[2:] and len(expected) == 4
    assert_same_content(Path(begun.out, "step-000004"), Path(whole.out, "step-000004"))
    assert_same_content(Path(begun.out, MERGED), Path(whole.out, MERGED))
    assert not list(Path(begun.out, "step-000004").glob("model*"))
    assert (Path(begun.out, MERGED, "tokenizer.json")).is_file() and not list(Path(begun.out).glob(".*"))
    assert_merged(Path(begun.out))
    back_to(begun.out, 2)
    assert alone(replace(begun, context_parallel=1), resume=True) == pytest.approx(expected[2:], rel=ROUNDING)
    single = replace(whole, out=whole.out.replace("whole", "one"), context_parallel=1)
    assert alone(single) == pytest.approx(expected, rel=ROUNDING)
    assert_merged(Path(single.out))
    back_to(single.out, 2)
    assert run(two, replace(single, context_parallel=2), True).losses == pytest.approx(expected[2:], rel=ROUNDING)
    assert_merged(Path(single.out))


def test_adapters_beside_divided_experts(two: ranks.Group, here: Workplace) -> None:
    """Of the linear layers, while ranks divide the experts, which learn nothing. One process goes on, and back."""
    setting = LoraConfig(rank=3)
    whole = here.run("adapt", "lora-experts", save_every=2, lora=setting)
    divided = replace(whole, expert_parallel=2, context_parallel=2, out=f"{whole.out}-divided")
    expected = alone(whole)
    assert run(two, divided).losses == pytest.approx(expected, rel=ROUNDING)
    assert_merged(Path(divided.out), setting=setting)
    back_to(divided.out, 2)
    assert alone(replace(whole, out=divided.out), resume=True) == pytest.approx(expected[2:], rel=ROUNDING)
    back_to(whole.out, 2)
    assert run(two, replace(divided, out=whole.out), True).losses == pytest.approx(expected[2:], rel=ROUNDING)
    assert_merged(Path(whole.out), setting=setting)


def test_adapters_of_divided_experts_are_refused(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("adapt", "lora-of-experts", lora=LORA, expert_parallel=2)
    assert ADAPTED_EXPERTS in run(two, settings).error


@pytest.mark.slow
def test_dropout_goes_on_to_the_bit(two: ranks.Group, here: Workplace) -> None:
    """Ranks draw different numbers, since they have different tokens."""
    setting = LoraConfig(rank=3, targets=("q_b_proj", "o_proj"), dropout=0.3)
    whole = here.run("adapt", "dropout-whole", save_every=2, lora=setting)
    begun = replace(whole, out=whole.out.replace("whole", "cut"))
    expected = run(two, whole).losses
    run(two, begun, False, 3, waiting)
    assert run(two, begun, True).losses == expected[2:]
    states = random_states(Path(begun.out, "step-000004"))
    assert len(states) == 2 and not torch.equal(states[0], states[1])


def test_a_disk_that_is_full_when_adapters_are_merged(two: ranks.Group, here: Workplace) -> None:
    settings = here.run("adapt", "lora-full", PhaseConfig(1, 48, 4, 2), lora=LORA)
    assert "merged: cannot write the checkpoint" in run(two, settings, False, 0, no_room_to_merge).error
    assert not Path(settings.out, MERGED).exists() and len(checkpoints(Path(settings.out))) == 1
    assert run(two, settings, True).error == ""
    assert_merged(Path(settings.out))


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("stage", "adapters", "experts"),
    [("pretrain", None, 1), ("adapt", None, 1), ("adapt", LORA, 1), ("pretrain", None, 2), ("adapt", None, 2),
     ("adapt", LoraConfig(rank=3), 2)],
)  # fmt: skip
def test_compiled_layers(
    two: ranks.Group, here: Workplace, stage: str, adapters: LoraConfig | None, experts: int
) -> None:
    name = f"eager-{stage}-{adapters is None}-{experts}"
    settings = here.run(stage, name, context_parallel=2, lora=adapters, expert_parallel=experts)
    expected = run(two, settings).losses
    found = run(two, replace(settings, out=settings.out.replace("eager", "compiled"), compile=True)).losses
    assert found == pytest.approx(expected, rel=ROUNDING) and len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sparse", "uneven"])
def test_adapters_of_four_ranks_two_and_one(four: ranks.Group, two: ranks.Group, here: Workplace, family: str) -> None:
    """Those of all linear layers, and of five experts, which no number of ranks divides evenly."""
    setting = LoraConfig(rank=3)
    if family == "uneven":
        setting = LoraConfig(rank=3, targets=("o_proj", "experts.gate_up_proj", "experts.down_proj"))
        model = models.ours(grouped.config("qwen3_moe_dsa", **SMALL | {"num_experts": 5}, tie_word_embeddings=True))
        model.folder = here.root / "tokenizer"
        tokensieve.save(model, here.root / family)
    whole = here.run("adapt", f"lora-{family}", model=str(here.root / family), save_every=2, lora=setting)
    whole = replace(whole, context_parallel=2)
    expected = alone(replace(whole, context_parallel=1, out=f"{whole.out}-one"))
    assert run(four, whole).losses == pytest.approx(expected, rel=ROUNDING)
    assert_merged(Path(whole.out), family, setting)
    back_to(whole.out, 2)
    assert run(two, whole, True).losses == pytest.approx(expected[2:], rel=ROUNDING)
    assert_merged(Path(whole.out), family, setting)
    back_to(whole.out, 2)
    assert run(four, replace(whole, context_parallel=4), True).losses == pytest.approx(expected[2:], rel=ROUNDING)
