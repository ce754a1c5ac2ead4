"""Chunks of several prompts in one pass: what each prompt gets is what it gets in a pass of its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.test_engine import SMALL, ask, run, tokens
from tests.support.models import config, ours
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Sampling
from tokensieve.engine.runner import Chunk, Runner
from tokensieve.model import DecoderForCausalLM
from tokensieve.model.selection import window

KINDS: dict[str, Any] = {
    "dense": config("v3"),
    "sparse": config("v32"),
    "shared indexers": config("glm", indexer_types=["full", "shared", "full"]),
}
LENGTHS = (1, 63, 64, 65, 130, 200, 20)
ROUNDING = 2e-5  # products of other sizes add in another order: a few units of the last place of logits within 4


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    return ours(KINDS[request.param], seed=1)


def prompts(runner: Runner) -> list[Chunk]:
    """Whole prompts on pages that do not lie side by side."""
    free = iter(torch.randperm(runner.pools.entries[0].shape[0], generator=torch.Generator().manual_seed(0)).tolist())
    return [Chunk(ask("", n).prompt, 0, [next(free) for _ in range(-(-n // 64))]) for n in LENGTHS]


@pytest.mark.parametrize("selector", ["indexer", "dense", "window"])
@pytest.mark.parametrize("form", ["auto", "gathered"])
def test_logits_are_those_of_a_pass_alone(model: DecoderForCausalLM, selector: str, form: Any) -> None:
    """Whole prompts, and chunks that begin anywhere, beside whole ones; entries in the cache too."""
    together, alone = Runner(model, 40, form=form), Runner(model, 40, form=form)
    whole = prompts(together)
    begins = [replace(chunk, tokens=chunk.tokens[:64]) for chunk in whole]
    rests = [Chunk(chunk.tokens[64:], 64, chunk.pages) for chunk in whole if len(chunk.tokens) > 64]
    # The last prompt comes whole beside the rests, so that some of the pass have a past and one has none.
    for chunks in (begins[:-1], [*rests, whole[-1]]):
        logits = together.chunks(chunks, selector)
        for chunk, got in zip(chunks, logits, strict=True):
            expected = alone.chunk(chunk.tokens, chunk.past, chunk.pages, selector)
            assert float((got - expected).abs().max()) < ROUNDING
    for own, other in zip(together.pools.entries, alone.pools.entries, strict=True):
        assert float((own - other).abs().max()) < ROUNDING


def test_selections_count_from_each_prompts_beginning(sparse: DecoderForCausalLM) -> None:
    together, alone = (Runner(sparse, 40, keep_selection=True) for _ in range(2))
    assert together.selected is not None and alone.selected is not None
    whole = prompts(together)
    together.chunks(whole, "indexer")
    for chunk in whole:
        alone.chunk(chunk.tokens, 0, chunk.pages, "indexer")
        found, expected = (r.selected.read(chunk.pages, chunk.end) for r in (together, alone) if r.selected)
        assert torch.equal(found, expected)
        assert int(found.min()) >= -1 and int(found.max()) < chunk.end


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[Chunk]]:
    """Filled with the chunks of every pass."""
    found: list[list[Chunk]] = []
    run_chunks = Runner._run_chunks

    def counted(self: Runner, chunks: list[Chunk], *args: Any) -> torch.Tensor:
        found.append([*chunks])
        return run_chunks(self, chunks, *args)

    monkeypatch.setattr(Runner, "_run_chunks", counted)
    return found


def test_answers_are_those_of_passes_apart(
    model: DecoderForCausalLM, tokenizer: Any, passes: list[list[Chunk]]
) -> None:
    """Every chunk once, up to 500 keys a pass; samples of a prompt still share it."""
    requests = [ask(str(n), n, temperature=1.0, seed=n, logprobs=0) for n in LENGTHS]
    requests.append(replace(requests[-1], id="twin", sampling=replace(requests[-1].sampling, seed=99)))
    packed = replace(SMALL, chunks=8, pass_tokens=500)
    together = run(Engine(model, tokenizer, packed), requests)
    read = [chunk for chunks in passes for chunk in chunks]
    assert sum(len(chunk.tokens) for chunk in read) == sum(LENGTHS) and len(read) == sum(-(-n // 64) for n in LENGTHS)
    assert len(passes) < len(read) / 2 and max(map(len, passes)) > 3
    assert max(sum(chunk.end for chunk in chunks) for chunks in passes) in range(300, 501)
    assert together["twin"][-1].cached_tokens == LENGTHS[-1]
    apart = run(Engine(model, tokenizer, SMALL), requests)
    for r in requests:
        assert tokens(together[r.id]) == tokens(apart[r.id])
        both = zip(together[r.id], apart[r.id], strict=True)
        assert all(abs(a.logprobs[0].logprob - b.logprobs[0].logprob) < ROUNDING for a, b in both)


def test_who_wants_more_of_its_pass_has_one_to_itself(
    sparse: DecoderForCausalLM, tokenizer: Any, passes: list[list[Chunk]]
) -> None:
    """A trace, the prompt's log probabilities, and a selector of the user's, whose error ends its own request alone."""

    def broken(c: Any) -> torch.Tensor:
        return torch.full((len(c), c.k), 10**6, dtype=torch.int32)

    plain = [ask(f"plain {n}", n) for n in (5, 6)]
    traced, scored = replace(ask("traced", 50), trace=True), ask("scored", 45, prompt_logprobs=0)
    ended, dense = replace(ask("ended", 35), selector="broken"), replace(ask("dense", 25), selector="dense")
    packed = replace(SMALL, chunks=8, pass_tokens=512)
    requests = [*plain, traced, scored, ended, dense]
    found = run(Engine(sparse, tokenizer, packed, {"broken": broken}), requests)
    lengths = [[len(chunk.tokens) for chunk in chunks] for chunks in passes]
    assert sorted(lengths) == [[5, 6], [25], [35], [45], [50]]
    assert [name for name, outputs in found.items() if outputs[-1].finish == "error"] == ["ended"]
    assert found["traced"][0].trace and len(found["scored"][0].prompt_logprobs) == 45
    apart = run(Engine(sparse, tokenizer, SMALL), [*plain, traced, scored, dense])
    assert all(tokens(apart[name]) == tokens(found[name]) for name in apart)


def test_an_error_ends_the_request_that_made_it(tokenizer: Any) -> None:
    """In a pass that it shares with others, and in a step: those have the answers that they have alone."""

    def short(c: Any) -> torch.Tensor:
        return window(c) if int((c.ends_N - c.starts_N).max()) < 40 else torch.full((len(c), c.k), 10**6)

    model = ours(KINDS["sparse"], seed=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    others, broken = [ask(str(n), n) for n in (50, 70)], replace(ask("broken", 30), prompt=(20, 3, 30))
    steps = [replace(ask(f"step {n}", n), selector="short") for n in (20, 30)]
    packed = replace(SMALL, chunk=128, chunks=8, pass_tokens=512)
    found = run(Engine(model, tokenizer, packed, {"short": short}), [others[0], broken, others[1], *steps])
    errors = {name: outputs[-1].error for name, outputs in found.items() if outputs[-1].finish == "error"}
    assert errors.keys() == {"broken", "step 30"} and "short gave" in errors["step 30"]
    assert len(found["step 30"]) == 11  # an answer's tokens while there are fewer than 40 keys, and the error
    apart = run(Engine(model, tokenizer, replace(SMALL, chunk=128), {"short": short}), [*others, steps[0]])
    assert all(tokens(apart[name]) == tokens(found[name]) for name in apart)


def test_on_the_cpu_each_chunk_has_a_pass_unless_it_is_told(
    sparse: DecoderForCausalLM, tokenizer: Any, passes: list[list[Chunk]]
) -> None:
    run(Engine(sparse, tokenizer, replace(SMALL, chunks=8)), [ask(str(n), n) for n in (20, 30)])
    assert [len(chunks) for chunks in passes] == [1, 1]
    for sizes, message in (
        ({"pass_tokens": -1}, "pass_tokens is -1; it must be at least 0"),
        ({"pass_tokens": float("nan")}, "pass_tokens is nan"),
        ({"chunks": 0}, "chunks is 0; it must be at least 1"),
        ({"chunk": 100}, "chunk is 100; it must be a multiple of 64"),
    ):
        with pytest.raises(UserError, match=f"engine: {message}"):
            EngineConfig(**sizes)


def test_without_text(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """The same tokens, and no stop strings, which are found in the text."""
    asked = ask("one", 30, temperature=1.0, seed=1, logprobs=0)
    silent = replace(asked, sampling=replace(asked.sampling, detokenize=False))
    text, none = (run(Engine(sparse, tokenizer, SMALL), [r])["one"] for r in (asked, silent))
    assert any(o.text for o in text) and [replace(o, text="") for o in text] == none
    with pytest.raises(UserError, match="detokenize=False"):
        Sampling(stop=("a",), detokenize=False)
