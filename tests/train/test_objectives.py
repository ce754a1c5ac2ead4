"""What each stage's loss is and which parameters it reaches: equations (3) and (4)."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import tokensieve
from tests.support.training import OPTIMIZER, apart, batch, indexers, model, step_gradients
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.model import DecoderForCausalLM, ForwardOptions, KLScale, Objective, SelectionContext, attention
from tokensieve.model.kl import LayerLocalLoss
from tokensieve.model.selection import indexer
from tokensieve.train import Run
from tokensieve.train.learning import learning
from tokensieve.train.starting import make_optimizer

FREE = OPTIMIZER.__class__(lr=3e-3, clip=1e9, indexer_clip=1e9)


def run(stage: str, **changes: Any) -> TrainConfig:
    phases = (PhaseConfig(4, 48, 4, 4),)
    return TrainConfig(stage, "", "", phases, optimizer=FREE, device="cpu", **changes)


def gradients(trained: DecoderForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    trained.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}


def trunk(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g for n, g in found.items() if ".indexer." not in n}


def largest(found: dict[str, Tensor]) -> float:
    return max(float(g.abs().max()) for g in found.values())


# ---- adaptation


@pytest.fixture
def adapting() -> Iterator[DecoderForCausalLM]:
    made = model()
    with tokensieve.training(made, "adapt"):
        yield made.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_loss_reaches_only_its_own_parameters(adapting: DecoderForCausalLM, checkpointing: bool) -> None:
    adapting.model.gradient_checkpointing = checkpointing
    inputs = batch(2, 48, documents=True)
    both = gradients(adapting, adapting(**inputs).loss)
    assert set(both) == {n for n, _ in adapting.named_parameters()}
    silent = ForwardOptions(objective=Objective("adapt", KLScale(per_query=0.0)))
    language = gradients(adapting, adapting(**inputs, options=silent).loss)
    assert largest(indexers(language)) == 0.0  # the language-modelling loss does not reach the indexers
    assert all(torch.equal(g, both[n]) for n, g in trunk(language).items())  # and the KL does not reach the trunk
    assert min(float(g.abs().max()) for g in trunk(language).values()) > 0.0
    kl = gradients(adapting, 0.0 * adapting(**inputs).loss)
    assert largest(trunk(kl)) == 0.0
    assert all(torch.equal(g, both[n]) for n, g in indexers(kl).items())
    assert min(float(g.abs().max()) for g in indexers(kl).values()) > 0.0


def test_the_injected_gradient_is_that_of_the_mean_kl(adapting: DecoderForCausalLM) -> None:
    """Equation (4) by plain autograd, with the sets and probabilities that the model used."""
    inputs = batch(2, 48, documents=True)
    injected = indexers(gradients(adapting, adapting(**inputs).loss))
    total: list[Tensor] = []

    def recording(c: SelectionContext) -> Tensor:
        chosen = indexer(c)
        N, T = chosen.shape[0], c.keys.index[0].shape[0]
        found = torch.zeros(N, T + 1, dtype=torch.bool).scatter_(1, (chosen.long() + T + 1) % (T + 1), True)[:, :T]
        q, scale = c.attention_queries
        main = torch.einsum("nhd,td->nht", q, c.keys.keys_TGD[:, 0]) * scale
        p = main.masked_fill(~found[:, None], -torch.inf).softmax(-1).mean(1)
        with torch.enable_grad():
            q_I, k_I, w = c._index.hold()
            scores = torch.einsum("nh,nht->nt", w, torch.einsum("nhd,td->nht", q_I, k_I).relu())
            log_q = scores.masked_fill(~found, -torch.inf).log_softmax(-1)
            total.append(torch.where(found, p * (p.clamp_min(1e-30).log() - log_q), 0.0).sum(-1).mean())
        return chosen

    with tokensieve.selecting(adapting, recording):
        kept = adapting(**inputs, options=ForwardOptions(objective=Objective()))
    assert kept.kl is None
    plain = torch.autograd.grad(sum(total) / len(total), adapting.indexer_parameters())
    names = [n for n, _ in adapting.named_parameters() if ".indexer." in n]
    assert apart(injected, dict(zip(names, plain, strict=True))) < 1e-4


def test_dense_adaptation_leaves_the_indexers_alone() -> None:
    made, inputs = model(), batch(4, 48)
    found, figures = step_gradients(run("adapt", selection=False), made, [inputs])
    assert not indexers(found) and "kl" not in figures
    dense = model()
    with tokensieve.selecting(dense, "dense"):
        loss = dense(**inputs).loss
    assert torch.isclose(loss, torch.tensor(figures["lm"]), rtol=1e-6)


# ---- warm-up


@pytest.fixture
def warming() -> Iterator[DecoderForCausalLM]:
    made = model(index_topk=4)
    with tokensieve.training(made, "warmup"):
        yield made.train()


def equation_3(made: DecoderForCausalLM, inputs: dict[str, Tensor]) -> Tensor:
    """The mean over layers and queries of KL(head mass over all keys || softmax of the index scores), in float64."""
    found: list[Tensor] = []

    def recording(c: SelectionContext) -> None:
        key = torch.arange(c.keys.index[0].shape[0])
        visible = (key >= c.starts_N[:, None]) & (key < c.ends_N[:, None])
        q, scale = c.attention_queries
        main = torch.einsum("nhd,td->nht", q.double(), c.keys.keys_TGD[:, 0].double()) * scale
        p = main.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
        log_q = c.scores().double().masked_fill(~visible, -torch.inf).log_softmax(-1)
        found.append(torch.where(visible, p * (p.clamp_min(1e-300).log() - log_q), 0.0).sum(-1).mean())

    with torch.no_grad(), tokensieve.selecting(made, recording):
        made(**inputs, options=ForwardOptions(objective=Objective()))
    assert len(found) == made.config.num_hidden_layers
    return torch.stack(found).mean()


@pytest.mark.parametrize("documents", [False, True])
def test_warmup_loss_is_equation_3_over_all_keys(warming: DecoderForCausalLM, documents: bool) -> None:
    inputs = batch(3, 48, documents=documents)
    loss = warming(**inputs).loss
    assert torch.isclose(loss.double(), equation_3(warming, inputs), rtol=1e-5)
    with tokensieve.selecting(warming, "indexer", 48):  # what would be selected plays no part
        assert torch.equal(warming(**inputs).loss, loss)


def test_warmup_trains_the_indexers_and_nothing_else(warming: DecoderForCausalLM) -> None:
    before = {n: x.clone() for n, x in warming.state_dict().items()}
    found = gradients(warming, warming(**batch(2, 48)).loss)
    assert (
        set(found) == {n for n in before if ".indexer." in n}
        and min(float(g.abs().max()) for g in found.values()) > 0.0
    )
    this = Run(run("warmup"), warming)
    this.optimizer = make_optimizer(this.config, warming, torch.device("cpu"))
    losses = [this.step(number, [batch(4, 48)])["kl"] for number in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    after = warming.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if ".indexer." in n}


def test_layer_local_gradients_are_those_of_autograd(
    warming: DecoderForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = batch(2, 48, documents=True)
    local = gradients(warming, 3.0 * warming(**inputs).loss)

    class Plain:
        @staticmethod
        def apply(loss: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
            return loss()

    monkeypatch.setattr(attention, "LayerLocalLoss", Plain)
    assert apart(local, gradients(warming, 3.0 * warming(**inputs).loss)) < 1e-6


def test_layer_local_loss_alone() -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)

    def loss() -> Tensor:
        return (a.tanh() @ b).square().sum()

    plain = torch.autograd.grad(loss().sin(), (a, b))
    held = LayerLocalLoss.apply(loss, a, b)
    assert torch.equal(held, loss())
    for ours, theirs in zip(torch.autograd.grad(held.sin(), (a, b)), plain, strict=True):
        assert torch.allclose(ours, theirs)


def test_labels_play_no_part_and_no_logits_are_made(warming: DecoderForCausalLM) -> None:
    inputs = batch(2, 48)
    out = warming(**inputs)
    assert out.logits is None and torch.equal(out.loss, warming(input_ids=inputs["input_ids"]).loss)
    assert torch.equal(warming.eval()(input_ids=inputs["input_ids"]).loss, out.loss.detach())


@pytest.mark.slow
def test_warmup_goes_on_past_8192_keys() -> None:
    """What the last queries of a long document add to the loss and to its gradients, against equation (3) in float64.

    Queries before them see the same keys in a shorter document, so the difference of the two is theirs alone.
    """
    T, last = 8448, 256
    made = model(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        index_n_heads=2,
        max_position_embeddings=T,
    )
    summing = ForwardOptions(objective=Objective("warmup", KLScale(per_query=1.0)))  # over queries, instead of a mean
    ids = batch(1, T)["input_ids"]

    def summed(length: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = made(input_ids=ids[:, :length], options=summing).loss
        return loss.detach().double(), gradients(made, loss)

    with learning(made, "indexers"):
        whole, short = summed(T), summed(T - last)
    found: list[Tensor] = []

    def recording(c: SelectionContext) -> None:
        visible = torch.arange(T) <= torch.arange(T - last, T)[:, None]
        q, scale = c.attention_queries
        main = torch.einsum("nhd,td->nht", q[-last:].double(), c.keys.keys_TGD[:, 0].double()) * scale
        p = main.masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1).detach()
        with torch.enable_grad():
            q_I, k_I, w = (x.double() for x in c._index.hold())
            scores = torch.einsum("nh,nht->nt", w[-last:], torch.einsum("nhd,td->nht", q_I[-last:], k_I).relu())
            log_q = scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
            found.append(torch.where(visible, p * (p.clamp_min(1e-300).log() - log_q), 0.0).sum())

    with tokensieve.selecting(made, recording), learning(made, "indexers"):
        made(input_ids=ids)
    assert torch.isclose(whole[0] - short[0], found[0].detach(), rtol=1e-4)
    difference = {n: g - short[1][n] for n, g in whole[1].items()}
    assert apart(difference, gradients(made, found[0])) < 2e-3


def test_a_kl_at_some_queries_is_the_whole_one_in_the_mean() -> None:
    """Over all first queries, losses and gradients are those of every query; and no two of them are the same."""
    made, inputs = model().train(), batch(2, 60)
    whole = made(**inputs, options=ForwardOptions(objective=Objective("warmup"))).loss
    expected = indexers(gradients(made, whole))
    parts = []
    for first in range(4):
        loss = made(**inputs, options=ForwardOptions(objective=Objective("warmup", every=4, first=first))).loss
        parts.append((loss.detach(), indexers(gradients(made, loss))))
    values = torch.stack([value for value, _ in parts])
    assert torch.isclose(values.mean(), whole.detach(), rtol=1e-5) and len(values.unique()) == 4
    assert apart({n: torch.stack([g[n] for _, g in parts]).mean(0) for n in expected}, expected) < 1e-4


def test_a_kl_at_some_blocks_is_the_whole_one_in_the_mean_and_leaves_the_model_alone() -> None:
    """Of adaptation: the indexers' gradients, in the mean over all first blocks; the others are the same in each."""
    made, inputs = model().train(), batch(2, 96)

    def adapted(**blocks: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = made(**inputs, options=ForwardOptions(objective=Objective("adapt", **blocks)))
        return out.loss.detach(), out.kl.detach(), gradients(made, out.loss)

    loss, kl, expected = adapted()
    parts = [adapted(every=3, first=first) for first in range(3)]
    kls = torch.stack([kl for _, kl, _ in parts])
    assert torch.isclose(kls.mean(), kl, rtol=1e-5) and len(kls.unique()) == 3
    of_indexers = indexers(expected)
    assert apart({n: torch.stack([g[n] for _, _, g in parts]).mean(0) for n in of_indexers}, of_indexers) < 1e-4
    trunk = {n: g for n, g in expected.items() if n not in of_indexers}
    for its_loss, _, its in parts:
        assert torch.isclose(its_loss, loss, rtol=1e-6)
        assert apart({n: its[n] for n in trunk}, trunk) < 1e-4


def test_a_kl_at_some_queries_is_refused_where_it_cannot_be() -> None:
    wrong = (
        ("pretrain", 2, "1 in pretrain"),
        ("warmup", 0, "at least 1"),
        ("warmup", 7, "a multiple of 7"),
        ("adapt", 4, "in adapt every phases.context must be a multiple of 128"),
    )
    for stage, every, message in wrong:
        with pytest.raises(UserError, match=f"kl_every is {every}.*{message}"):
            TrainConfig(stage, "base", "out", (PhaseConfig(1, 64, 1),), kl_every=every)  # type: ignore[arg-type]
    for kind, every, first in (("none", 2, 0), ("adapt", 2, 2), ("warmup", 2, 2), ("warmup", 2, -1), ("warmup", 0, 0)):
        with pytest.raises(ValueError, match=f"every is {every} and first {first}"):
            Objective(kind, every=every, first=first)  # type: ignore[arg-type]


# ---- packing and padding, in both


@pytest.mark.parametrize("objective", ["warmup", "adapt"])
def test_packed_documents_equal_separate_ones(objective: Any) -> None:
    made = model().train()
    ids = batch(1, 60)["input_ids"]
    options = ForwardOptions(objective=Objective(objective, KLScale(per_query=1.0 / 60)))
    lengths = (37, 22, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed_kl, alone = made(input_ids=ids, position_ids=positions, options=options), []
    packed = gradients(made, packed_kl.loss if objective == "warmup" else 0.0 * packed_kl.logits.sum())
    made.zero_grad()
    for part in ids.split(lengths, dim=1):
        out = made(input_ids=part, options=options)
        (out.loss if objective == "warmup" else 0.0 * out.logits.sum()).backward()
        alone.append(out.kl.detach())
    assert torch.isclose(packed_kl.kl.detach(), torch.stack(alone).sum(), rtol=1e-5)
    separate = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    assert apart(indexers(packed), indexers(separate)) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("objective", ["warmup", "adapt"])
def test_padding_is_not_counted(objective: Any, side: str) -> None:
    made, options = model().train(), ForwardOptions(objective=Objective(objective))
    ids = batch(2, 40)["input_ids"]
    kept = slice(15, None) if side == "left" else slice(None, 25)
    mask = torch.ones_like(ids)
    mask[1] = 0
    mask[1, kept] = 1
    padded = made(input_ids=ids, attention_mask=mask, options=options).kl
    whole = made(input_ids=ids[:1], options=options).kl
    short = made(input_ids=ids[1:, kept], options=options).kl
    assert torch.isclose(padded, (40 * whole + 25 * short) / 65, rtol=1e-5)
    assert torch.isfinite(made(input_ids=ids, attention_mask=torch.zeros_like(ids), options=options).kl)


# ---- memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory held at once above what was held before, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@torch.no_grad()
def forward(made: DecoderForCausalLM, ids: Tensor) -> None:
    with tokensieve.selecting(made, "dense"):
        made.model(input_ids=ids)


def warm(made: DecoderForCausalLM, ids: Tensor) -> None:
    with tokensieve.training(made, "warmup"):
        made.train()(input_ids=ids).loss.backward()


def test_warmup_needs_one_layer_more_than_a_plain_forward() -> None:
    ids = batch(1, 512)["input_ids"]
    plain, warmed = {}, {}
    for layers in (1, 2, 8):
        made = model(num_hidden_layers=layers, max_position_embeddings=512, index_n_heads=4)
        plain[layers] = peak_bytes(lambda made=made: forward(made, ids))
        warmed[layers] = peak_bytes(lambda made=made: warm(made, ids))
    # The indexers' gradients, stored until the backward pass and then added up, are all that grows with depth.
    waiting = 2 * sum(4 * p.numel() for p in made.indexer_parameters())
    slack = 65536
    assert plain[8] - plain[2] <= slack
    assert warmed[8] - plain[8] <= warmed[1] + waiting + slack, (plain, warmed)
    assert warmed[8] - warmed[2] <= waiting + slack, (plain, warmed)
