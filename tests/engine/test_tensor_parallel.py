"""One model on several ranks: the same logits, the same keys, the same answers, and each rank holds its part."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tokensieve
from tests.model.test_fp8 import in_blocks
from tests.support import ranks
from tests.support.models import config, ours, tokens
from tests.support.ranks import Group
from tokensieve import checkpoint
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.engine.distributed import request_of
from tokensieve.engine.tensor_parallel import MeshHeads, load_rank
from tokensieve.mesh import Mesh

KINDS: dict[str, Any] = {
    "dense": config("v3"),
    "dense v2 without a latent": config("v2", q_lora_rank=None, n_shared_experts=2),
    "sparse": config("v32"),
    "sparse without a latent": config("v32", q_lora_rank=None),
    "sparse fp8": config("v32", index_dtype="fp8"),
    "tied": config("v32", tie_word_embeddings=True),
    "no shared expert": config("v3", n_shared_experts=0),
    "layers share a selection": config("glm", index_topk_pattern="FSS"),
}
# Sums over ranks have another order: float32 rounds each by 2^-24 of about 5, a few dozen times one after the other.
TOLERANCE = 3e-5
SMALL = EngineConfig(pages=64, running=16, chunk=64, chunks=2)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    with ranks.started(request.param) as made:
        yield made


def asked() -> list[Request]:
    """Prompts below and above k = 24 tokens and one chunk of 64, all at once: in decode more rows than one share. Every
    other draws.
    """
    draw = random.Random(0)
    prompts = [tuple(draw.choices(range(16, 96), k=length)) for length in (1, 5, 64, 65, 130, 40, 30, 28, 33)]
    return [
        Request(
            str(i),
            prompt,
            Sampling(max_tokens=4, ignore_eos=True, temperature=float(i % 2), top_p=0.9, seed=i, logprobs=2),
            "dense" if i == 4 else "indexer",
            trace=i == 7,
        )
        for i, prompt in enumerate(prompts)
    ]


def by_request(said: list[Any]) -> dict[str, Any]:
    """Everything said of a request except numbers that round: its tokens, texts, end, and what its trace shows."""
    found: dict[str, Any] = {"errors": [x for x in said if isinstance(x, str)]}
    for output in (x for x in said if not isinstance(x, str)):
        looks = [(layer.layer, layer.selected) for layer in output.trace]
        found.setdefault(output.id, []).append((output.tokens, output.text, output.finish, output.error, looks))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_have_the_logits_of_the_whole(group: Group, kind: str) -> None:
    whole, ids = ours(KINDS[kind], seed=1), tokens(2, 90)
    with torch.no_grad():
        expected = whole(ids, return_selection=True)
    answers = group.ask(ranks.logits, KINDS[kind])
    for answer in answers:
        assert np.array_equal(answer["logits"], answers[0]["logits"])  # gathered, so bit for bit
        assert np.abs(answer["logits"] - expected.logits.numpy()).max() < TOLERANCE
        assert np.abs(answer["next"] - expected.logits[0, -1].numpy()).max() < TOLERANCE
        for got, known in zip(answer["selection"], expected.selection, strict=True):
            assert (got is None) == (known is None) and (known is None or np.array_equal(got, known.numpy()))
        for name, held in whole.state_dict().items():
            axis = 0 if ".mlp.experts." in name else checkpoint.shard_axis(name)
            shape = [size // group.count if i == axis else size for i, size in enumerate(held.shape)]
            assert list(answer["shapes"][name]) == shape, name


def test_the_ranks_answer_as_one(group: Group) -> None:
    """Also if chunks of several prompts share a pass, as on GPUs."""
    for kind, settings in (("sparse", SMALL), ("dense", SMALL), ("sparse", replace(SMALL, chunks=8, pass_tokens=200))):
        alone = Engine(ours(KINDS[kind], seed=1), tokensieve.load_tokenizer("base"), settings)
        expected = by_request(ranks.everything(alone, asked()))
        said, *followers = group.ask(ranks.answers, KINDS[kind], asked(), settings)
        assert followers == [None] * (group.count - 1)
        assert by_request(said) == expected and "empty" in expected["errors"][0]


@pytest.mark.slow  # on four ranks a sum has an order, on two any is the same
@pytest.mark.parametrize("group", [4], indirect=True)
def test_an_answer_does_not_depend_on_what_runs_beside(group: Group) -> None:
    """To the bit, as on one rank: sums over more than two ranks must have the same order for every batch."""
    crowd = asked()
    said = [group.ask(ranks.answers, KINDS["sparse"], some, SMALL)[0] for some in (crowd, [crowd[0], crowd[5]])]
    beside, alone = ([o.logprobs for o in outputs if getattr(o, "id", "") == "5"][-4:] for outputs in said)
    assert alone == beside and all(alone)


def test_a_cache_smaller_than_the_demand(group: Group) -> None:
    """Requests wait, and give their pages back: on all ranks the same ones, or nobody would ever end."""
    said = group.ask(ranks.answers, KINDS["dense"], asked(), replace(SMALL, pages=7))[0]
    ends = {output.id: output.finish for output in said if not isinstance(output, str) and output.finish}
    assert ends == {request.id: "abort" if request.id == "0" else "length" for request in asked()}


def test_keys_are_handed_over(group: Group) -> None:
    """The ranks' indexers differ, as ranks that round differently do, only more: all attend to the same keys in spite
    of it.
    """
    read = group.ask(ranks.read_keys, KINDS["sparse"], asked(), SMALL, True)
    assert len(read[0]) > 20 and all(of_rank == read[0] for of_rank in read)
    if group.count == 2:  # so it would be without
        alone = group.ask(ranks.read_keys, KINDS["sparse"], asked(), SMALL, False)
        assert alone[0] != alone[1]


def test_a_control_that_looks_at_all_heads(group: Group) -> None:
    with torch.no_grad(), tokensieve.selecting(whole := ours(KINDS["sparse"], seed=1), "oracle"):
        expected = whole(tokens(1, 60), return_selection=True).selection
    for selection in group.ask(ranks.oracle_selection, KINDS["sparse"]):
        assert all(np.array_equal(got, known.numpy()) for got, known in zip(selection, expected, strict=True))


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shares_of_the_queries(count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number: all shares have one size, and together they are every query once, in order."""
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(Mesh, "all_gather", lambda self, x: shares.append(x) or shares)
    for queries in (1, 2, 3, 4, 5, 8, 9, 31, 64, 70, 512):
        shares.clear()
        every = torch.arange(queries)
        for rank in range(count):
            heads = MeshHeads(Mesh(rank, count, torch.device(device)))
            together = heads.select(queries, lambda rows, every=every: every if rows is None else every[rows])
        assert torch.equal(together, every) and len({len(share) for share in shares}) == 1
        grain = 1 if device == "cuda" else 4
        assert len(shares[0]) < queries / count + grain


def test_requests_travel_as_they_are() -> None:
    samplings = [
        Sampling(
            max_tokens=9,
            temperature=0.3,
            top_k=4,
            top_p=0.7,
            min_p=0.1,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias=((3, 1.5),),
            seed=(1 << 64) - 1,
            stop=("a", "\n"),
            ignore_eos=True,
            logprobs=3,
            schema={"type": "object"},
        ),
        Sampling(grammar="start: 'x'"),
        Sampling(min_tokens=2, prompt_logprobs=1, detokenize=False),
    ]
    requests = [Request("ä", (1, 2, 3), sampling, "dense", True, True) for sampling in samplings]
    default = Request("", ())
    for name, value in (vars(default) | vars(default.sampling)).items():  # a new field belongs into this test
        assert any(value != (vars(r) | vars(r.sampling))[name] for r in requests), name
    for request in requests:
        assert request_of(json.loads(json.dumps(asdict(request)))) == request


# folders


def test_shards_and_plain_folders(group: Group, tmp_path: Path) -> None:
    model = ours(KINDS["sparse"], seed=2)
    tokensieve.save(model, tmp_path / "hf")
    with torch.no_grad():
        expected = model(tokens(2, 60)).logits.numpy()
    other = 6 - group.count
    for count in (group.count, other):
        checkpoint.write_shards(tmp_path / "hf", tmp_path / f"{count}", count)
    for folder in (tmp_path / "hf", tmp_path / str(group.count)):
        for logits, error in group.ask(ranks.from_folder, folder):
            assert error == "" and np.abs(logits - expected).max() < TOLERANCE
    last = tmp_path / str(group.count) / checkpoint.rank_file(group.count - 1, group.count)
    last.unlink()
    odd = config("v3", n_routed_experts=6, n_group=1, topk_group=1, num_attention_heads=3, num_key_value_heads=3)
    tokensieve.save(ours(odd), tmp_path / "odd")
    tokensieve.save(ours(config("v3", attention_bias=True)), tmp_path / "biases")
    for folder, words in (
        (last.parent, (last.name, "missing")),  # which is only known on the last rank
        (
            tmp_path / str(other),
            (f"for {other} ranks", f"started {group.count}", f"--nproc-per-node {other}", "convert"),
        ),
        (tmp_path / "odd", (f"{group.count} ranks do not divide num_attention_heads 3", "possible numbers of them: 1")),
        (tmp_path / "biases", ("attention_bias is true",)),
        (tmp_path / "nowhere", ("no such folder",)),
    ):
        for logits, error in group.ask(ranks.from_folder, folder):
            assert logits is None and all(word in error for word in words), error


def test_fp8_blocks_stay(group: Group, tmp_path: Path) -> None:
    """Sums in another order are rounded to E4M3 otherwise here and there, by up to a 16th."""
    shape = {
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 128,
        "v_head_dim": 128,
        "index_head_dim": 128,
        "hidden_size": 128,
    }
    folder = in_blocks(tmp_path / "hf", **shape, intermediate_size=512, moe_intermediate_size=512, q_lora_rank=128)
    checkpoint.write_shards(folder, tmp_path / "s", group.count)
    whole = tokensieve.load(folder, keep_fp8=True)
    with torch.no_grad():
        expected = whole(tokens(2, 60)).logits.numpy()
    found = [group.ask(ranks.from_folder, source, True)[0] for source in (folder, tmp_path / "s")]
    for logits, error in found:
        assert error == "" and 0 <= np.linalg.norm(logits - expected) < 0.05 * np.linalg.norm(expected)
    assert np.array_equal(found[0][0], found[1][0])


def test_one_rank(tmp_path: Path) -> None:
    """Without torchrun: shards for one are a model, shards for more say which command runs them."""
    model = ours(KINDS["sparse"], seed=2)
    tokensieve.save(model, tmp_path / "hf")
    alone = Mesh(0, 1, torch.device("cpu"))
    for count in (1, 2):
        checkpoint.write_shards(tmp_path / "hf", tmp_path / f"{count}", count)
    with torch.no_grad():
        expected = model(tokens(2, 60)).logits
        for folder in ("hf", "1"):
            assert torch.equal(load_rank(tmp_path / folder, alone)(tokens(2, 60)).logits, expected)
    for load in (tokensieve.load, lambda folder: load_rank(folder, alone)):
        with pytest.raises(UserError, match=r"torchrun --nproc-per-node 2 -m tokensieve generate .*2 --interactive"):
            load(tmp_path / "2")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_ends_all(failing: int) -> None:
    with ranks.started(2) as group:
        ends = group.ask(ranks.step_that_fails_here, KINDS["sparse"], failing)
    assert "a step of the engine failed" in ends[0], ends
    assert ends[1].startswith("ValueError: a defect" if failing else "RuntimeError"), ends
