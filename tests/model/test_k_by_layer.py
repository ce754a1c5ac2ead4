"""A number of keys for each layer, kept in the model's config: the same as the selector `PerLayer`, on every road."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import grouped
from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.families import model_config
from tokensieve.model import ForwardOptions
from tokensieve.selectors import PerLayer

KS = [8, 40, 24]  # of three layers, 24 in the mean


def by_layer(kind: str = "v3", **changes: Any) -> Any:
    make = grouped.config if kind in grouped.DENSE else config
    return tokensieve.sparsify(ours(make(kind, **changes)), KS, 4, 16, init="random")


@pytest.mark.parametrize("kind", ["v3", "v2", "llama", "qwen3"])
@torch.no_grad()
def test_it_is_kept_in_the_checkpoint_and_selects(kind: str, tmp_path: Path) -> None:
    """With documents in a pack, and under a budget of the caller's own, which is that of every layer."""
    tokensieve.save(by_layer(kind), tmp_path / "x")
    model, ids = tokensieve.load(tmp_path / "x"), tokens(1, 120)
    positions = torch.cat((torch.arange(50), torch.arange(70)))[None]
    assert (model.top_k, model.model.layer_top_k()) == (24, tuple(KS))

    def logits(selector: Any, k: int | None = None) -> torch.Tensor:
        with tokensieve.selecting(model, selector, k):
            return model(ids, position_ids=positions).logits

    own = model(ids, position_ids=positions, return_selection=True)
    assert [int((layer >= 0).sum(-1).max()) for layer in own.selection] == KS
    assert torch.equal(own.logits, logits(PerLayer(tuple(KS)), 16))
    assert torch.equal(own.logits, logits("indexer", 24))  # its own k
    uniform = logits(PerLayer((16, 16, 16)))
    assert torch.equal(uniform, logits("indexer", 16)) and not torch.equal(uniform, own.logits)
    window = logits("window")
    assert not torch.equal(window, logits("window", 25)) and torch.equal(window, logits("window", 24))


@torch.no_grad()
def test_the_engine_selects_as_generate_does_and_keeps_it() -> None:
    model, ids = by_layer(vocab_size=4096), tokens(1, 100)
    whole = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    settings = EngineConfig(pages=8, chunk=64, keep_selection=True)
    engine = Engine(model, tokensieve.load_tokenizer("base"), settings)
    engine.add(Request("x", tuple(ids[0].tolist()), Sampling(max_tokens=5, ignore_eos=True)))
    answer: list[int] = []
    kept: Any = None
    while engine.busy:
        for output in engine.step():
            answer += output.tokens
            kept = torch.cat(output.selection, 1) if output.selection else kept
    assert answer == whole[0, 100:].tolist()
    wanted = model(whole[:, :-1], return_selection=True).selection
    for layer, k in enumerate(KS):
        assert torch.equal(kept[layer][:, :k], wanted[layer][0])
        assert kept[layer].shape[1] == max(KS) and bool((kept[layer][:, k:] == -1).all())


def test_both_stages_train_it() -> None:
    """Warm-up is dense; adaptation selects each layer's own number, and every indexer learns."""
    model, ids = by_layer().train(), tokens(1, 90)
    for objective in ("warmup", "adapt"):
        model.zero_grad(set_to_none=True)
        with tokensieve.training(model, objective):
            model(ids, labels=ids).loss.backward()
        grads = [p.grad for name, p in model.named_parameters() if ".indexer.wk" in name]
        assert len(grads) == 3 and all(g is not None and bool(g.any()) for g in grads)
    out = model(ids, return_selection=True, options=ForwardOptions(check_selection=True))
    assert [layer.shape[-1] for layer in out.selection] == KS


WRONG = {
    "too few": {"index_topk_by_layer": [24, 24]},
    "another mean": {"index_topk_by_layer": [8, 40, 25]},
    "nothing": {"index_topk_by_layer": [0, 48, 24]},
    "below nothing": {"index_topk_by_layer": [-8, 56, 24]},
    "no numbers": {"index_topk_by_layer": ["8", "40", "24"]},
    "parts of keys": {"index_topk_by_layer": [8.0, 40.0, 24.0]},
    "switches": {"index_topk_by_layer": [True, 47, 24]},
    "no list": {"index_topk_by_layer": 24},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_config_that_contradicts_itself(kind: str) -> None:
    fields = by_layer().config.to_dict() | WRONG[kind]
    with pytest.raises(UserError, match=r"index_topk_by_layer is .* must give each of 3 layers at least 1 key, and"):
        tokensieve.model.DecoderForCausalLM(model_config(fields))


def test_layers_that_share_an_indexer_have_one_k() -> None:
    model = ours(config("glm", index_topk=24, indexer_types=["full", "shared", "full"]))
    fields = model.config.to_dict()
    with pytest.raises(UserError, match="gives layer 1 40 keys, and it reads the 8 of the layer before it"):
        tokensieve.model.DecoderForCausalLM(model_config(fields | {"index_topk_by_layer": KS}))
    together = tokensieve.model.DecoderForCausalLM(model_config(fields | {"index_topk_by_layer": [16, 16, 40]}))
    assert together.model.layer_top_k() == (16, 16, 40)
    with pytest.raises(UserError, match="each layer has a k of its own"):
        tokensieve.share(by_layer(), [0])


@pytest.mark.parametrize("ks", [[8, 40], [8, 40, 25], [0, 40, 32], [], [8, 40, 24, 24]])
def test_numbers_that_sparsify_refuses(ks: list[int]) -> None:
    with pytest.raises(UserError, match=r"one of at least 1 for each of 3 layers, whose mean is whole"):
        tokensieve.sparsify(ours(config("v3")), ks, 4, 16)


def test_other_programs_do_not_get_it(tmp_path: Path) -> None:
    from tokensieve.checkpoint import exportable, write_shards

    model = by_layer()
    assert any("all layers select index_topk keys there" in reason for reason in exportable(model.config))
    tokensieve.save(model, tmp_path / "x")
    with pytest.raises(UserError, match="every layer has a k of its own"):
        write_shards(tmp_path / "x", tmp_path / "shards", 1)
    assert "| keys per query (k) | 24 in the mean; by layer 8, 40, 24 |" in (tmp_path / "x" / "README.md").read_text()
