"""Who waits in the engine's queue: for pages, and for a prompt that is on its way already."""

import json
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from tests.engine.test_engine import SMALL, ask, run, tokens
from tests.support.models import config, ours
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request
from tokensieve.engine.scheduler import MOST_PASSES, Scheduler
from tokensieve.model import DecoderForCausalLM


def test_the_same_prompt_is_run_once(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """Asked several times at once, it waits for itself, and all begin at its end, also if it is shorter than a chunk.
    Another one does not wait.
    """
    engine = Engine(sparse, tokenizer, SMALL)
    requests = [ask(f"same {i}", 200, seed=i, temperature=1.0) for i in range(4)]
    others = [ask("other", 190, text=7), *(ask(f"short {i}", 60) for i in range(2))]
    alone = {r.id: tokens(run(Engine(sparse, tokenizer, SMALL), [r])[r.id]) for r in [*requests, *others]}
    for r in [*requests, *others]:
        engine.add(r)
    engine.step()
    assert len(engine.scheduler.running) == 4 and len(engine.scheduler.waiting) == 3
    engine.fail_all("again")
    found = run(Engine(sparse, tokenizer, SMALL), [*requests, *others])
    assert {id: tokens(outputs) for id, outputs in found.items()} == alone
    assert [found[r.id][-1].cached_tokens for r in requests] == [0, 200, 200, 200]
    assert [found[r.id][-1].cached_tokens for r in others] == [0, 0, 60]


def test_who_began_at_the_end_of_anothers_prompt_has_pages_of_its_own(
    sparse: DecoderForCausalLM, tokenizer: Any
) -> None:
    """The first one may end before the others, and each page is given back once."""
    requests = [ask(f"same {i}", 200, seed=i, temperature=1.0, max_tokens=9, ignore_eos=True) for i in range(3)]
    alone = {r.id: tokens(run(Engine(sparse, tokenizer, SMALL), [r])[r.id]) for r in requests}
    engine = Engine(sparse, tokenizer, SMALL)
    for r in requests:
        engine.add(r)
    outputs = engine.step()
    while not any(output.tokens for output in outputs):
        outputs = engine.step()
    one, *others = engine.scheduler.running
    assert all(r.pages[:3] == one.pages[:3] for r in others) and len({r.pages[3] for r in (one, *others)}) == 3
    assert engine.abort("same 0") is not None  # the pages of the first one's prompt stay
    while engine.busy:
        outputs += engine.step()
    assert [tokens([o for o in outputs if o.id == r.id]) for r in requests[1:]] == [*alone.values()][1:]
    assert engine.scheduler.pool.used == 0


@pytest.mark.parametrize("length", [128, 200])
def test_answers_for_which_there_was_no_room_begin_where_one_that_runs_did(
    sparse: DecoderForCausalLM, tokenizer: Any, length: int
) -> None:
    """Whatever it has answered since: the prompt is run once, as long as one of its answers runs."""
    requests = [ask(f"same {i}", length, seed=i, temperature=1.0, max_tokens=3 + 4 * i) for i in range(5)]
    alone = {r.id: tokens(run(Engine(sparse, tokenizer, SMALL), [r])[r.id]) for r in requests}
    found = run(Engine(sparse, tokenizer, replace(SMALL, running=2, keep_selection=True)), requests)
    assert {id: tokens(outputs) for id, outputs in found.items()} == alone
    assert [found[r.id][-1].cached_tokens for r in requests] == [0, *[length] * 4]
    first, *others = (found[r.id][-1].selection for r in requests)
    assert all(parts[0] is first[0] for parts in others)


def test_a_request_that_begins_again_brings_its_trace_once(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, SMALL)
    engine.add(replace(ask("one", 70), trace=True))
    outputs = engine.step()
    while not any(output.tokens for output in outputs):
        outputs += engine.step()
    engine.scheduler._preempt(engine.scheduler.running[0])
    while engine.busy:
        outputs += engine.step()
    assert [bool(output.trace) for output in outputs if output.tokens] == [True] + [False] * 11


def test_a_traced_prompt_is_run_for_its_trace_alone(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """Such a pass may round otherwise, so that other answers must not begin at its end."""
    traced, plain = replace(ask("traced", 20, max_tokens=30), trace=True), ask("plain", 20, logprobs=0)
    alone = run(Engine(sparse, tokenizer, SMALL), [plain])["plain"]
    found = run(Engine(sparse, tokenizer, SMALL), [traced, ask("other", 30), plain], late=2)["plain"]
    assert [o.logprobs for o in found] == [o.logprobs for o in alone] and found[-1].cached_tokens == 0


def test_answers_that_begin_together_pass_who_waits_only_so_often() -> None:
    """With no room for it, a large request is passed by the samples of a prompt as by others; then it is their turn."""
    scheduler = Scheduler(pages=40, max_running=256, chunk=512, chunks=2)
    twins = [scheduler.add(Request("twin 0", tuple(range(100))), 0)]
    scheduler.admit()
    large = scheduler.add(Request("large", tuple(range(39 * 64))), 0)
    twins += [scheduler.add(Request(f"twin {i}", twins[0].request.prompt), i) for i in range(1, 30)]
    scheduler.admit()
    assert scheduler.running == twins[:1]
    scheduler.ran(twins[0], scheduler.chunk_end(twins[0]))
    begun = [running for running, leader in scheduler.admit() if leader is twins[0]]
    assert begun == twins[1 : 1 + MOST_PASSES] and large.passed == MOST_PASSES


def test_a_prompt_that_ends_hashes_no_queue_of_other_prompts() -> None:
    """Thousands of long ones may wait, and a step would stand still for them."""
    scheduler = Scheduler(pages=40, max_running=1, chunk=512, chunks=2)
    leader = scheduler.add(Request("leader", tuple(range(100))), 0)
    scheduler.admit()
    others = [scheduler.add(Request(f"other {i}", tuple(range(i, 101 + 2 * i))), 0) for i in range(40)]
    scheduler.ran(leader, scheduler.chunk_end(leader))
    assert scheduler.admit() == [] and not any({"whole", "digests"} & vars(r).keys() for r in others[1:])


@pytest.mark.parametrize("answers", [2, 40, 128])
def test_many_answers_to_a_long_prompt_delay_nobody(answers: int) -> None:
    """They wait for the prompt, which is run once, and who came after them is let in at once."""
    scheduler = Scheduler(pages=4000, max_running=256, chunk=512, chunks=2)
    prompt = tuple(range(6000))
    twins = [scheduler.add(Request(f"twin {i}", prompt), i) for i in range(answers)]
    other = scheduler.add(Request("other", tuple(range(1000, 1100))), 0)
    first, steps = True, 0
    while any(r.in_prompt for r in [*twins, other]):
        scheduler.admit()
        assert not first or scheduler.running == [twins[0], other]
        for running in scheduler.next_chunks():
            scheduler.ran(running, scheduler.chunk_end(running))
            if not running.in_prompt:
                scheduler.admit()
        first, steps = False, steps + 1
        assert steps < 6000 // 512 + 2
    assert [r.reused for r in twins] == [0, *[6000] * (answers - 1)] and twins[-1] in scheduler.running


def test_after_a_fault_nothing_written_is_shared(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, SMALL)
    asked = ask("before", 200)
    run(engine, [asked])
    again = run(engine, [replace(asked, id="again")])["again"][-1]
    engine.add(ask("bad", 200, text=3))
    engine.step()
    engine.fail_all("a fault")
    after = run(engine, [replace(asked, id="after")])["after"][-1]
    assert again.cached_tokens == 192 and after.cached_tokens == 0 and engine.scheduler.pool.used == 0


def test_who_waits_costs_little(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """A step takes as long with thousands that wait for pages as with a few."""
    engine = Engine(sparse, tokenizer, EngineConfig(pages=4, running=64, chunk=64))
    for i in range(2000):
        engine.add(ask(str(i), 130 + i % 3, text=i, max_tokens=100))
    engine.step()
    begin = time.process_time()
    for _ in range(20):
        engine.scheduler.admit()
    assert time.process_time() - begin < 0.2  # 0.01 s; 4 s where all are looked at
    assert len(engine.fail_all("enough")) == 2000 and engine.scheduler.pool.used == 0


def test_a_schema_is_compiled_once(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """A large one takes long, and 128 answers to one request may have it. One that cannot be followed is refused as
    quickly each time.
    """
    engine = Engine(ours(config("v32", vocab_size=len(tokenizer)), seed=1), tokenizer, SMALL)
    compiled = []
    made = engine._grammars._compile
    engine._grammars._compiled = lru_cache(lambda *of: compiled.append(1) or made(*of))
    schema = {"enum": [f"{i:03}" for i in range(40)]}
    requests = [ask(str(i), 20, seed=i, temperature=5.0, ignore_eos=False, schema=schema) for i in range(6)]
    found = run(engine, requests)
    texts = ["".join(output.text for output in outputs) for outputs in found.values()]
    assert len(compiled) == 1 and len(set(texts)) > 2 and all(json.loads(text) in schema["enum"] for text in texts)
    for _ in range(3):
        with pytest.raises(UserError, match="JSON schema cannot be followed"):
            engine.add(ask("wrong", 20, schema={"type": "cow"}))
    assert len(compiled) == 2
