"""Numbers of keys by layer as a user meets them: given to `sparsify`, or learned by `warmup` and `adapt` (`budget`)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import commands
from tokensieve.evals import fitted_k
from tokensieve.selectors import PerLayer

LEARN = ("--set", "budget.sequences=2")
K = 24  # of the home's sparse model, which has two layers
TEXT = "def parse_arguments(argv): " * 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("budget"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Any:
    return commands.runner(capsys)


@pytest.fixture(scope="module")
def uneven(home: Path) -> Path:
    """A model whose first layer looks everywhere, and whose second at few keys, which its indexer finds: all heads are
    the same one.
    """
    model = tokensieve.load(home / "dense")
    first, second = (layer.self_attn for layer in model.model.layers)
    with torch.no_grad():
        first.o_proj.weight.mul_(0.1)
        first.q_b_proj.weight.mul_(0.01)
        second.q_b_proj.weight.mul_(20)
        for projection in (second.q_b_proj, second.kv_b_proj):
            heads = projection.weight.unflatten(0, (second.heads, -1))
            heads[1:] = heads[0].clone()
    tokensieve.save(tokensieve.sparsify(model, K, 4, 16, init="attention"), home / "uneven")
    return home / "uneven"


def written(folder: Path) -> list[int] | None:
    return json.loads((folder / "config.json").read_text()).get("index_topk_by_layer")


def test_from_sparsify_to_the_server(home: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command reads what the one before it wrote, and selects as many keys in each layer."""
    out = tmp_path / "untrained"
    ended = run("sparsify", home / "dense", out, "--top-k", "16,32", "--index-heads", "4", "--index-dim", "16")
    assert ended.status == 0 and "16,32 keys per query" in ended.out, ended
    assert written(out) == [16, 32] and tokensieve.load(out).top_k == K
    for stage in ("warmup", "adapt"):
        ended = run(*commands.tiny(home, stage, tmp_path / stage, "--model", out, "--set", "phases.0.steps=1"))
        assert ended.status == 0, ended.err
        out = tmp_path / stage / "step-000001"
        assert written(out) == [16, 32]
    equal = "tokensieve.selectors:PerLayer([16, 32])"
    other = "tokensieve.selectors:PerLayer([24, 24])"
    sizes = ("--context", "1500", "--set", "sparse.needle_contexts=1", "--set", "sparse.texts=1", "--out", tmp_path)
    arms = ("--arm", f"equal={equal}", "--arm", f"other={other}")
    monkeypatch.setattr("tokensieve.data.sources.is_held_out", lambda name, share: True)
    ended = run("eval", out, "--quick", *arms, "--data", home / "text" / "*.py", *sizes)
    assert ended.status == 0, ended.err
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["equal"]["ppl"] == figures["sparse"]["ppl"] != figures["other"]["ppl"]
    answers = {}
    (tmp_path / "prompts.txt").write_text(TEXT)
    for name, selection in (("own", "indexer"), ("equal", equal), ("other", other)):
        for source in (("--prompt", TEXT), ("--input-file", tmp_path / "prompts.txt")):
            ended = run("generate", out, *source, "--selection", selection, "--max-new-tokens", 12)
            assert ended.status == 0, ended.err
            answers[name, source[0]] = ended.out
    for source in ("--prompt", "--input-file"):
        assert answers["own", source] == answers["equal", source] != answers["other", source]


def test_warm_up_learns_them(home: Path, uneven: Path, run: Any, tmp_path: Path) -> None:
    """After its last step, from its own sequences; the layer that looks everywhere gets more."""
    warm = commands.tiny(home, "warmup", tmp_path / "run", "--model", uneven, *LEARN)
    ended = run(*warm)
    assert ended.status == 0 and "keys by layer" in ended.err, ended.err
    assert written(tmp_path / "run" / "step-000002") is None
    ks = written(tmp_path / "run" / "step-000003")
    assert ks is not None and sum(ks) == 2 * K and ks[0] > ks[1]
    model = tokensieve.load(tmp_path / "run" / "step-000003")
    assert model.model.layer_top_k() == tuple(ks)
    ended = run(*commands.tiny(home, "adapt", tmp_path / "adapted", "--model", tmp_path / "run" / "step-000003"))
    assert ended.status == 0 and "keys by layer" not in ended.err, ended.err
    assert written(tmp_path / "adapted" / "step-000003") == ks


def test_adaptation_learns_them_before_its_first_step(home: Path, uneven: Path, run: Any, tmp_path: Path) -> None:
    """So a run that was stopped and resumed ends as one that was not."""
    settings = (*LEARN, "--model", uneven)
    ended = run(*commands.tiny(home, "adapt", tmp_path / "whole", *settings))
    assert ended.status == 0 and "keys by layer" in ended.err, ended.err
    ks = written(tmp_path / "whole" / "step-000003")
    assert ks is not None and ks == written(tmp_path / "whole" / "step-000002") and ks[0] > ks[1]
    plain = run(*commands.tiny(home, "adapt", tmp_path / "plain", "--model", uneven))
    assert plain.status == 0 and written(tmp_path / "plain" / "step-000003") is None
    first = run(*commands.tiny(home, "adapt", tmp_path / "parts", *settings, "--set", "phases.0.steps=1"))
    rest = run(*commands.tiny(home, "adapt", tmp_path / "parts", *settings, "--resume"))
    assert first.status == rest.status == 0 and "keys by layer" not in rest.err, rest.err
    assert written(tmp_path / "parts" / "step-000003") == ks


def test_refitting_forgets_the_numbers_before(home: Path, uneven: Path) -> None:
    model, ids = tokensieve.load(uneven), [torch.randint(5, 500, (90,), generator=torch.Generator().manual_seed(0))]
    ks = fitted_k(model, ids, queries=1000)
    model.config.index_topk_by_layer = [8, 40]
    assert fitted_k(model, ids, queries=1000) == ks != (8, 40)
    with tokensieve.selecting(model, PerLayer(ks)), torch.no_grad():
        model(ids[0][None])


def test_what_is_refused(home: Path, run: Any, tmp_path: Path) -> None:
    """Before anything is trained or written."""
    refused, out = commands.refusal(run), tmp_path / "run"
    for given, word in (
        ("16,x", "as in 256,128"), ("", "as in 256"), ("16,33", "mean is whole"), ("16,16,16", "each of 2 layers"),
        ("0", "top_k is 0"), ("-8", "top_k is -8"), ("0,48", "at least 1 for each"), ("1.5", "as in 256"),
    ):  # fmt: skip
        refused((word,), "sparsify", home / "dense", out, f"--top-k={given}")

    def warm(*settings: str) -> tuple[object, ...]:
        return commands.tiny(home, "warmup", out, *(x for s in settings for x in ("--set", s)))

    refused(("budget.sequences is 0",), *warm("budget.sequences=0"))
    refused(("budget.most is 1",), *warm("budget.most=1"))
    refused(("no document in 1 sequences has more than k = 24",), *warm("budget.sequences=1", "phases.0.context=16"))
    odd = tmp_path / "odd"
    assert run("sparsify", home / "dense", odd, "--top-k", "20", *commands.SMALL[2:]).status == 0
    refused(("k is 20", "a multiple of 8"), *warm("budget.sequences=2"), "--model", odd)
    shared = tmp_path / "shared"
    assert run("share", home / "sparse", shared, "--layers", "0").status == 0
    refused(("share indexers",), *warm("budget.sequences=2"), "--model", shared)
    uneven = tmp_path / "uneven"
    assert run("sparsify", home / "dense", uneven, "--top-k", "16,32", *commands.SMALL[2:]).status == 0
    refused(("each layer has a k of its own",), "share", uneven, tmp_path / "never", "--layers", "0")
    text = ("--data", home / "text", "--set", "context=100", "--set", "texts=1")
    refused(("each layer has a k of its own",), "share", uneven, tmp_path / "never", "--keep", "1", *text)
    for stage, setting, where in (
        ("pretrain", "seed=1", "pretrain"),
        ("adapt", "lora.rank=2", "adapt by lora"),
        ("adapt", "selection=false", "the dense model"),
    ):
        refused(("budget", where), *commands.tiny(home, stage, out, *LEARN, "--set", setting))
    assert not out.exists() or not any(out.glob("step-*"))
