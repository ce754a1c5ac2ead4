"""`tokensieve share` and `sparsify --share-every` as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import commands
from tokensieve.evals import greedy_choice, token_losses
from tokensieve.families import model_config
from tokensieve.selectors import Shared

FEW = ("--set", "context=200", "--set", "texts=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("share"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Any:
    return commands.runner(capsys)


@pytest.fixture(scope="module")
def deep(home: Path) -> Path:
    """A sparse model of four layers, with the tokenizer of the others."""
    small = tokensieve.load(home / "sparse")
    fields = {n: value for n, value in small.config.to_dict().items() if n not in ("layer_types", "mlp_layer_types")}
    config = model_config(fields | {"num_hidden_layers": 4})
    torch.manual_seed(0)
    model = tokensieve.model.DecoderForCausalLM(config).eval()
    model.folder = home / "sparse"
    tokensieve.save(model, home / "deep")
    return home / "deep"


def test_layers_give_their_indexers_up(run: Any, home: Path, deep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = run("share", deep, out, "--keep", "2", "--data", home / "text", *FEW)
    assert ended.status == 0, ended
    written = json.loads((out / "config.json").read_text())
    kinds = written["indexer_types"]
    assert kinds[0] == "full" and sorted(kinds) == ["full", "full", "shared", "shared"]
    assert written["model_type"] == "deepseek_v32_sharing"
    shared, ids = tokensieve.load(out), torch.randint(5, 500, (1, 90))
    every = tokensieve.load(deep)
    with torch.no_grad(), tokensieve.selecting(every, Shared(tuple(i for i in range(4) if kinds[i] == "shared"))):
        assert torch.equal(shared(ids).logits, every(ids).logits)
    lines = ended.out.splitlines()
    assert len(lines) == 5 and "with an indexer in every layer" in lines[0] and "without that of layer" in lines[2]
    again = run("share", deep, tmp_path / "named", "--layers", "0,3")
    assert again.status == 0 and "indexers in layers 0, 3" in again.out
    assert run("generate", tmp_path / "named", "--prompt", "import os", "--max-new-tokens", "2").status == 0


def test_the_choice_is_greedy(deep: Path) -> None:
    model = tokensieve.load(deep)
    texts = [torch.randint(5, 500, (120,), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    def loss(*layers: int) -> float:
        with tokensieve.selecting(model, Shared(layers)):
            return sum(float(token_losses(model, ids)[model.top_k :].double().mean()) for ids in texts) / 2

    seen: list[tuple[int, int]] = []
    choice = greedy_choice(model, texts, 1, lambda what, done, total: seen.append((done, total)))
    first = min((loss(layer), -layer) for layer in (1, 2, 3))
    left = [layer for layer in (1, 2, 3) if layer != -first[1]]
    second = min((loss(-first[1], layer), -layer) for layer in left)
    assert [step.layer for step in choice.steps[:2]] == [-first[1], -second[1]]
    assert choice.steps[1].loss == pytest.approx(second[0]) and choice.loss == pytest.approx(loss())
    assert choice.kept == (0,) and choice.kinds == ["full", "shared", "shared", "shared"]
    assert seen[-1] == (7, 7) and [done for done, _ in seen] == list(range(1, 8))


def test_untrained_indexers_are_shared(run: Any, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    ended = run("sparsify", home / "dense", out, *commands.SMALL, "--share-every", "2")
    assert ended.status == 0, ended
    model = tokensieve.load(out)
    assert model.config.indexer_types == ["full", "shared"][: model.config.num_hidden_layers]
    assert model.model.indexers == 1


def test_what_is_refused(run: Any, home: Path, deep: Path, tmp_path: Path) -> None:
    refused, out = commands.refusal(run), tmp_path / "out"
    text = ("--data", home / "text", *FEW)
    refused(("--keep", "--layers"), "share", deep, out)
    refused(("--keep", "--layers"), "share", deep, out, "--keep", "1", "--layers", "0")
    refused(("--layers: x is no whole number", "for example 0,2,5"), "share", deep, out, "--layers", "0,x")
    refused(("layer 9 has none", "from 0 to 3"), "share", deep, out, "--layers", "0,9")
    refused(("the first layer must keep its own",), "share", deep, out, "--layers", "1,2")
    refused(("keep is 4", "fewer than all"), "share", deep, out, "--keep", "4", *text)
    refused(("no indexers to share", "tokensieve sparsify"), "share", home / "dense", out, "--keep", "1", *text)
    refused(("no indexers to share",), "share", home / "dense", out, "--layers", "0")
    refused(("10 tokens", "k = 24", "longer"), "share", deep, out, "--keep", "1", *text, "--set", "context=10")
    refused(("texts is 0",), "share", deep, out, "--keep", "1", "--set", "texts=0")
    assert run("share", deep, out, "--layers", "0,2").status == 0
    refused(("share indexers already",), "share", out, tmp_path / "twice", "--keep", "1", *text)
