"""Rollouts by the engine, and training that sees them as the engine did."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import grouped
from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.model import DecoderForCausalLM
from tokensieve.posttrain import Rollout, Rollouts, replaying
from tokensieve.posttrain.replay import selection_of
from tokensieve.posttrain.rollouts import rollout_config, rounded

K, SAMPLES = 16, 4
SAMPLING = Sampling(max_tokens=24, temperature=1.0, ignore_eos=True)
SMALL = EngineConfig(pages=32, running=8, chunk=64)


def model_of(kind: str, **changes: Any) -> DecoderForCausalLM:
    make = grouped.config if kind.endswith("_dsa") else config
    return ours(make(kind, index_topk=K, vocab_size=4096, **changes))


def prompts(*lengths: int) -> list[tuple[int, ...]]:
    return [tuple(tokens(1, length, seed=length)[0].tolist()) for length in lengths]


def sampled(model: DecoderForCausalLM, **options: Any) -> list[Rollout]:
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL, **options)
    return [one for group in rollouts.sample(prompts(150, 90, 130), SAMPLES, SAMPLING) for one in group]


def padded(rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
    """Ids and mask as TRL makes them: prompts padded on the left, answers on the right."""
    left, right = (max(len(getattr(r, part)) for r in rollouts) for part in ("prompt", "answer"))
    rows, masks = [], []
    for r in rollouts:
        before, after = left - len(r.prompt), right - len(r.answer)
        rows.append([0] * before + [*r.prompt, *r.answer] + [0] * after)
        masks.append([0] * before + [1] * (len(r.prompt) + len(r.answer)) + [0] * after)
    return torch.tensor(rows), torch.tensor(masks)


def layers_of(rollout: Rollout) -> torch.Tensor:
    """(layers, T - 1, K): all parts of its selection."""
    return torch.cat(rollout.selection, 1)


def difference(model: DecoderForCausalLM, rollouts: list[Rollout]) -> Tensor:
    """|log probability in training - in the rollout| of every token of the answers, one after the other."""
    ids, mask = padded(rollouts)
    left = max(len(r.prompt) for r in rollouts)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits[:, left - 1 : -1].float()
    taken = logits.log_softmax(-1).gather(2, ids[:, left:, None])[..., 0]
    pairs = zip(taken, rollouts, strict=True)
    return torch.cat(
        [(row[: len(r.answer)][torch.tensor(r.mask)] - torch.tensor(r.logprobs)).abs() for row, r in pairs]
    )


@pytest.mark.parametrize("kind", ["v32", "glm", "llama_dsa", "qwen3_dsa"])
def test_training_and_rollouts_agree(kind: str) -> None:
    """The gate of reinforcement learning: below 1e-6 in the mean with replay. In another order of rows, padded."""
    model = model_of(kind)
    rollouts = sampled(model)
    order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = [rollouts[place] for place in order]
    with replaying(model, rollouts):
        assert difference(model, mixed).mean() < 1e-6
    assert difference(model, mixed).mean() < 1e-2  # without: keys at the k-th place may differ by a rounding
    other = [replace(r, selection=(layers_of(r).flip(0),)) for r in rollouts]
    with replaying(model, other):
        assert difference(model, rollouts).mean() > 1e-3  # the replayed keys are really what is read


def test_the_kept_selection_is_what_the_model_selects() -> None:
    """For prompts whose pages are shared, too; every token but the last has min(k, position + 1) keys."""
    model = model_of("v32")
    rollouts = sampled(model)
    assert len(rollouts) == 3 * SAMPLES and len({r.answer for r in rollouts}) > 3
    for r in rollouts:
        total = len(r.prompt) + len(r.answer)
        assert layers_of(r).shape == (3, total - 1, K)
        counts = (layers_of(r)[0] >= 0).sum(1)
        assert counts.tolist() == [min(K, place + 1) for place in range(total - 1)]
        ids = torch.tensor([[*r.prompt, *r.answer][:-1]])
        with torch.no_grad():
            chosen = model(ids, return_selection=True).selection
        same = [bool((a[0] == b).all(1).float().mean() > 0.95) for a, b in zip(chosen, layers_of(r), strict=True)]
        assert all(same)


def test_the_engine_reads_a_prompt_once_for_all_samples() -> None:
    model, prompt = model_of("v32"), prompts(150)[0]
    engine = Engine(model, tokensieve.load_tokenizer("base"), EngineConfig(pages=16, chunk=64, keep_selection=True))
    for sample in range(3):
        engine.add(Request(str(sample), prompt, Sampling(max_tokens=4, ignore_eos=True)))
    ends = {}
    while engine.busy:
        ends |= {output.id: output for output in engine.step() if output.finish is not None}
    assert [ends[name].cached_tokens for name in ("0", "1", "2")] == [0, 150, 150]
    assert all(end.selection[0] is ends["0"].selection[0] for end in ends.values())
    assert all([part.shape[1] for part in end.selection] == [150, 3] for end in ends.values())


def test_short_prompts_are_read_before_answers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few prompts of one chunk, so that every step after that has all answers; a GPU reads longer chunks."""
    rollouts = Rollouts(model_of("v32"), tokensieve.load_tokenizer("base"), 256, at_once=6)
    step, widths = rollouts.engine.runner.step, []

    def seen(tokens: Sequence[int], *more: Any) -> Tensor:
        widths.append(len(tokens))
        return step(tokens, *more)

    monkeypatch.setattr(rollouts.engine.runner, "step", seen)
    rollouts.sample(prompts(150, 90, 130), 2, SAMPLING)
    assert widths == [6] * (SAMPLING.max_tokens - 1)
    sizes = [rollout_config(256, 6, torch.device(name)) for name in ("cpu", "cuda")]
    assert sizes[0] == EngineConfig(pages=6 * 5, running=6, chunks=6) and sizes[1].chunk == 2048


def test_a_rounded_copy_is_never_whole_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: Any) -> None:
        raise AssertionError("a parameter was copied before it was rounded")

    model = model_of("v32")
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", copied)
    made = rounded(model, torch.bfloat16)
    for (name, own), theirs in zip(made.named_parameters(), model.parameters(), strict=True):
        wanted = torch.float32 if "weights_proj" in name else torch.bfloat16
        assert own.dtype == wanted and not own.requires_grad and theirs.requires_grad and theirs.dtype == torch.float32
        assert torch.equal(own, theirs.to(wanted)) and own.data_ptr() != theirs.data_ptr()


def test_a_preempted_answer_keeps_its_selection() -> None:
    """Too few pages for all: the youngest begins again, and brings the same as with room for everyone."""
    model, asked = model_of("v32"), prompts(90, 100, 110)
    found = []
    for pages in (32, 7):
        small = EngineConfig(pages=pages, running=8, chunk=64)
        rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=small)
        found.append(
            [one for group in rollouts.sample(asked, 1, Sampling(max_tokens=60, ignore_eos=True)) for one in group]
        )
        assert (rollouts.engine.scheduler.preempted > 0) == (pages == 7)
    for a, b in zip(*found, strict=True):
        assert a.answer == b.answer and a.logprobs == b.logprobs
        assert torch.equal(layers_of(a), layers_of(b))


def test_the_same_weights_and_seed_give_the_same_and_new_weights_are_seen() -> None:
    model = model_of("v32")
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL)
    first, again, drawn = (rollouts.sample(prompts(150), 2, SAMPLING, seed) for seed in (0, 0, 1))
    assert [r.answer for r in first[0]] == [r.answer for r in again[0]] != [r.answer for r in drawn[0]]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    changed = rollouts.sample(prompts(150), 2, SAMPLING, 0)[0]
    fresh = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL).sample(prompts(150), 2, SAMPLING, 0)[
        0
    ]
    assert [r.logprobs for r in changed] == [r.logprobs for r in fresh] != [r.logprobs for r in first[0]]


def test_the_indexer_learns_on_the_replayed_keys() -> None:
    model = model_of("v32")
    rollouts = sampled(model)[:2]
    ids, mask = padded(rollouts)
    grads = []
    for selection in (
        rollouts,
        [replace(r, selection=(layers_of(r).flip(0),)) for r in rollouts],
    ):
        model.zero_grad()
        with tokensieve.training(model.train(), "adapt"), replaying(model, selection):
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if ".indexer." in n and p.grad is not None}
        )
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 15
    assert any(not torch.allclose(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_failure_leaves_nothing_behind() -> None:
    """A prompt that cannot run, and one that is interrupted: the next call samples as if nothing had been."""
    model = model_of("v32").train()
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL)
    assert model.training
    want = rollouts.sample(prompts(90), 2, SAMPLING)
    with pytest.raises(UserError, match="shorten it"):
        rollouts.sample([prompts(90)[0], (5,) * 5000], 2, SAMPLING)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollouts.sample(prompts(90, 150), 2, SAMPLING, on_progress=interrupt)
    assert model.training and not rollouts.engine.busy and rollouts.engine.scheduler.pool.used == 0
    again = rollouts.sample(prompts(90), 2, SAMPLING)
    assert [r.answer for r in again[0]] == [r.answer for r in want[0]]


def test_equal_rows_take_their_rollouts_in_turn_and_a_masked_answer_its_prompt() -> None:
    model = model_of("v32")
    (one, other) = sampled(model)[:2]
    twin = replace(one, selection=tuple(part * 0 for part in one.selection))
    ids = torch.tensor([[*one.prompt, *one.answer]] * 2 + [[*other.prompt, *([0] * len(other.answer))]])
    mask = torch.ones_like(ids)
    mask[2, len(other.prompt) :] = 0
    chosen = selection_of(ids, mask, [one, twin, other])[0]
    assert torch.equal(chosen[0, :-1], layers_of(one)[0]) and bool((chosen[1] == 0).all())
    length = len(other.prompt)
    assert torch.equal(chosen[2, :length], layers_of(other)[0, :length]) and bool((chosen[2, length:] == -1).all())


def test_what_is_refused() -> None:
    model, tokenizer = model_of("v32"), tokensieve.load_tokenizer("base")
    plain = Rollouts(model, tokenizer, 256, config=SMALL, keep_selection=False).sample(prompts(90), 1, SAMPLING)[0]
    assert plain[0].selection == ()
    with pytest.raises(UserError, match="keep_selection=True"), replaying(model, plain):
        pass
    kept = sampled(model)[:1]
    with replaying(model, kept), pytest.raises(UserError, match="is none of the rollouts"):
        model(tokens(1, 40))
    with pytest.raises(UserError, match="no model of tokensieve"), replaying(torch.nn.Linear(2, 2), kept):
        pass
    for selector, message in (("dense", "attends to every key"), ("tokensieve.selectors:DenseBelow(40)", "selects 40")):
        asked = Rollouts(model, tokenizer, 256, selector=selector, config=SMALL)
        with pytest.raises(UserError, match=f"rollout of prompt 0 failed: layer 0 {message}.*use the indexer"):
            asked.sample(prompts(90), 1, SAMPLING)
    for sizes, message in (
        ({"tokens": 0}, "tokens is 0"),
        ({"at_once": 0}, "at_once is 0"),
        ({"result_tokens": -1}, "-1"),
    ):
        with pytest.raises(UserError, match=f"rollouts: .*{message}; it must be at least"):
            Rollouts(model, tokenizer, **{"tokens": 256, "config": SMALL} | sizes)
    small = Rollouts(model, tokenizer, 256, config=SMALL)
    for options, message in (({"samples": 0}, "samples is 0"), ({"seed": -1}, "seed -1")):
        with pytest.raises(UserError, match=f"rollouts: .*{message}"):
            small.sample(prompts(90), **{"samples": 1, "sampling": SAMPLING} | options)
    with pytest.raises(UserError, match="no text to find stop strings in"):
        small.sample(prompts(90), 1, replace(SAMPLING, stop=("x",)))
    with pytest.raises(UserError, match=r"pages of the cache need .* choose at most"):
        Rollouts(model, tokenizer, 256, config=EngineConfig(pages=1 << 24))
    with pytest.raises(UserError, match="shorten it"):
        Rollouts(model, tokenizer, 256, config=EngineConfig(pages=1)).sample(prompts(90), 1, SAMPLING)


ENDS = [*range(0, 4096, 8)]  # so many tokens end a turn that a model of random weights has several turns
TURNS = Sampling(max_tokens=40, temperature=1.0)


def result_of(prompt: tuple[int, ...], turns: Sequence[tuple[int, ...]]) -> list[int] | None:
    """A tool that hands out 30 tokens of its own, by what was called; the third turn is the last."""
    number = sum(turns[-1]) + len(turns)
    return None if len(turns) == 3 else [1 + (number * 37 + place * 11) % 4000 for place in range(30)]


def episodes(model: DecoderForCausalLM, sampling: Sampling = TURNS, tokens: int = 256, **more: Any) -> list[Rollout]:
    model.generation_config.eos_token_id = ENDS
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), tokens, config=replace(SMALL, **more))
    return [one for group in rollouts.sample(prompts(150, 90), SAMPLES, sampling, respond=result_of) for one in group]


def stretches(rollout: Rollout) -> list[tuple[bool, tuple[int, ...]]]:
    """(the model wrote it, tokens), in order."""
    pairs = groupby(zip(rollout.mask, rollout.answer, strict=True), key=lambda pair: pair[0])
    return [(wrote, tuple(token for _, token in stretch)) for wrote, stretch in pairs]


def test_an_answer_goes_on_after_the_result_of_a_tool() -> None:
    """Turns and results alternate, the results are the tool's, and training agrees about what the model wrote."""
    model = model_of("v32")
    rollouts = episodes(model)
    assert {len(stretches(r)) for r in rollouts} == {5}
    for r in rollouts:
        turns: list[tuple[int, ...]] = []
        for wrote, tokens_of in stretches(r):
            if wrote:
                turns.append(tokens_of)
            else:
                assert list(tokens_of) == result_of(r.prompt, turns) and turns[-1][-1] in ENDS
        assert r.ended == (len(turns) == 3 and turns[-1][-1] in ENDS) and len(r.logprobs) == sum(map(len, turns)) <= 40
        assert layers_of(r).shape[1:] == (len(r.prompt) + len(r.answer) - 1, K)
    with replaying(model, rollouts):
        assert difference(model, rollouts).mean() < 1e-6
    assert difference(model, rollouts).mean() < 1e-2
    wrong = [replace(r, logprobs=tuple(reversed(r.logprobs))) for r in rollouts]
    with replaying(model, rollouts):
        assert difference(model, wrong).mean() > 0.1  # each log probability is of its own token


def test_turns_are_the_same_alone_and_begin_as_without_tools() -> None:
    model = model_of("v32")
    together, alone = episodes(model), episodes(model, running=1)
    assert [(r.answer, r.written) for r in together] == [(r.answer, r.written) for r in alone]
    plain = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL)
    first_turns = [one for group in plain.sample(prompts(150, 90), SAMPLES, TURNS) for one in group]
    for whole, first in zip(together, first_turns, strict=True):
        count = len(first.answer)
        assert whole.answer[:count] == first.answer and whole.logprobs[:count] == first.logprobs
        assert first.written == () and first.mask == (True,) * count
        # What a turn read is what its continuation reads of it, so one selection serves the whole rollout.
        kept = len(first.prompt) + count - 1
        assert torch.equal(layers_of(whole)[:, :kept], layers_of(first))


def test_a_continuation_takes_what_was_read_from_the_cache() -> None:
    model = model_of("v32")
    model.generation_config.eos_token_id = ENDS
    rollouts = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=replace(SMALL, pages=64))
    run, cached = rollouts._run, []

    def watched(requests: Sequence[Request], on_progress: Any) -> dict[str, list[Any]]:
        outputs = run(requests, on_progress)
        cached.append([outputs[request.id][-1].cached_tokens for request in requests])
        return outputs

    rollouts._run = watched
    rollouts.sample(prompts(150), SAMPLES, TURNS, respond=result_of)
    assert len(cached) == 3 and all(tokens >= 128 for turn in cached[1:] for tokens in turn)  # whole chunks of 64


def test_an_episode_is_cut_off_before_a_result_that_has_no_room() -> None:
    """No room in the context, or no token left of those that the model may write."""
    model = model_of("v32")
    crowded = episodes(model, tokens=200)
    assert {(len(r.prompt), len(stretches(r)), r.ended) for r in crowded} == {(150, 3, False), (90, 5, True)}
    assert all(len(r.prompt) + len(r.answer) <= 200 and r.mask[-1] for r in crowded)
    model.generation_config.eos_token_id = ENDS
    limited = Rollouts(model, tokensieve.load_tokenizer("base"), 256, config=SMALL, result_tokens=59)
    for lengths in ((90,), (90, 150)):  # each result has 30 tokens, so the second is cut off, whatever is beside it
        first, *_ = limited.sample(prompts(*lengths), SAMPLES, TURNS, respond=result_of)
        assert all(len(stretches(r)) == 3 and r.mask.count(False) == 30 and not r.ended for r in first)
    brief = episodes(model, Sampling(max_tokens=8, temperature=1.0))
    assert all(len(r.logprobs) <= 8 and r.mask[-1] and not r.ended for r in brief) and any(r.written for r in brief)
