"""Layers that share an indexer, in every sparse family: what it learns, and what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import grouped
from tests.support.models import config, difference, ours, tokens
from tests.support.training import OPTIMIZER, apart, batch, indexers, step_gradients
from tokensieve.checkpoint import exportable, write_shards
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.families import FAMILIES, model_config
from tokensieve.model import DecoderForCausalLM, SelectionContext
from tokensieve.model.selection import indexer

OWNER = (0, 0, 2, 2)  # the layer whose indexer serves each layer
KINDS = ["full", "shared", "full", "shared"]
SPARSE = ("glm", "v32", *(f"{kind}_dsa" for kind in grouped.DENSE))


def sparse_config(family: str, kinds: list[str] | None, **changes: Any) -> Any:
    fields = (grouped.config if "_dsa" in family else config)(family, num_hidden_layers=4, **changes).to_dict()
    sharing = FAMILIES[fields["model_type"]].sharing_form if kinds else None
    given = kinds or (["full"] * 4 if family == "glm" else None)
    return model_config(fields | {"model_type": sharing or fields["model_type"], "indexer_types": given})


def gradients(model: DecoderForCausalLM, stage: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    settings = TrainConfig(stage, "", "", (PhaseConfig(1, 48, 4, 4),), optimizer=OPTIMIZER, device="cpu")
    return step_gradients(settings, model, [batch(4, 48)])


class Naive:
    """A selector of a model with an indexer in every layer, in which layers 0 and 2 select for all.

    It sums the KL of each layer's attention and its owner's scores, over the keys that attention reads.
    """

    def __init__(self, dense: bool):
        self.dense, self.queries, self.kl, self.owner = dense, 0, torch.zeros(()), {}

    def __call__(self, c: SelectionContext) -> Tensor | None:
        with torch.enable_grad():
            k_I = c.keys.index[0] if OWNER[c.layer] == c.layer else None
        chosen = c.topk() if OWNER[c.layer] == c.layer else c.before
        keys = c.keys.keys_TGD[:, 0]
        place = torch.arange(len(keys))
        read = (place >= c.starts_N[:, None]) & (place < c.ends_N[:, None])
        if not self.dense:
            read &= (chosen[:, :, None] == place).any(1)
        q, scale = c.attention_queries
        target = (q @ keys.T).mul(scale).masked_fill(~read[:, None], -torch.inf).softmax(-1).mean(1)
        with torch.enable_grad():
            if k_I is not None:
                q_I, w = c.index_queries
                self.owner[c.layer] = torch.einsum("nht,nh->nt", (q_I @ k_I.T).relu(), w)
            log = self.owner[OWNER[c.layer]].masked_fill(~read, -torch.inf).log_softmax(-1)
            terms = torch.where(target > 0, target * (target.clamp_min(1e-30).log() - log), 0.0)
            self.kl = self.kl + terms.sum()
        self.queries += len(c)
        return None if self.dense else chosen


@pytest.mark.parametrize("family", ["glm", "v32"])  # the two whose keys are one group, as `Naive` reads them
@pytest.mark.parametrize("stage", ["warmup", "adapt"])
def test_a_shared_indexer_learns_from_all_its_layers(family: str, stage: str) -> None:
    """Equations (3) and (4) in the mean over every layer, borrowing ones too, with the scores of their owner."""
    some = ours(sparse_config(family, KINDS, vocab_size=320), 1)
    every = ours(sparse_config(family, None, vocab_size=320), 1)
    every.load_state_dict(some.state_dict(), strict=False)
    naive = Naive(dense=stage == "warmup")
    with tokensieve.selecting(every, naive, check=False):
        every(batch(4, 48)["input_ids"])
    mean = naive.kl / naive.queries
    mean.backward()
    expected = indexers({n: p.grad for n, p in every.named_parameters() if p.grad is not None})
    expected = {name: grad for name, grad in expected.items() if int(name.split(".")[2]) in (0, 2)}
    taught, figures = gradients(some, stage)
    assert figures["kl"] == pytest.approx(mean.item(), rel=1e-4)
    assert apart(indexers(taught), expected) < 1e-3  # float32, sums in another order
    if stage == "adapt":
        assert {name.split(".")[2] for name in taught if ".kv_b_proj." in name} == {"0", "1", "2", "3"}
        some.model.gradient_checkpointing = True
        assert apart(gradients(some, stage)[0], taught) < 1e-5


@pytest.mark.parametrize("family", SPARSE)
@torch.no_grad()
def test_every_family_shares_and_saves(family: str, tmp_path: Path) -> None:
    model, ids = ours(sparse_config(family, KINDS)), tokens(2, 72)
    chosen = model(ids, return_selection=True).selection
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[2], chosen[3])
    assert not torch.equal(chosen[0], chosen[2])
    names = {name.split(".")[2] for name in model.state_dict() if ".indexer." in name}
    assert names == {"0", "2"}
    tokensieve.save(model, tmp_path)
    again = tokensieve.load(str(tmp_path))
    assert again.config.model_type == model.config.model_type and again.config.indexer_types == KINDS
    assert difference(again(ids).logits, model(ids).logits) == 0
    if family == "v32":
        assert model.config.model_type == "deepseek_v32_sharing"
        assert any(reason.startswith("transformers, vLLM, SGLang: layers share") for reason in exportable(model.config))
        with pytest.raises(UserError, match="layers share indexers, and the official demo has one in every layer"):
            write_shards(tmp_path, tmp_path / "shards", 1)


@torch.no_grad()
def test_a_selector_may_read_what_the_layer_before_selected() -> None:
    """So sharing is a selector too: the same logits as a model that has the owners' indexers alone."""
    some, ids = ours(sparse_config("v32", KINDS)), tokens(2, 72)
    every = ours(sparse_config("v32", None))
    every.load_state_dict(some.state_dict(), strict=False)
    seen: list[Any] = []

    def shared(c: SelectionContext) -> Tensor:
        seen.append(c.before)
        return indexer(c) if OWNER[c.layer] == c.layer else c.before

    with tokensieve.selecting(every, shared):
        assert torch.equal(every(ids).logits, some(ids).logits)
    assert seen[0] is None and all(x is not None for x in seen[1:])


@pytest.mark.parametrize("family", ["v32", "qwen3_dsa"])
@pytest.mark.parametrize("kinds", [["shared", "full", "full", "full"], ["full"], ["full", "half", "full", "full"]])
def test_what_is_refused(family: str, kinds: list[str]) -> None:
    with pytest.raises(UserError, match="indexer_types must be 'full' or 'shared' for each of 4 layers"):
        DecoderForCausalLM(sparse_config(family, kinds))
