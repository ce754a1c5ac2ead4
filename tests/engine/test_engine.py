"""The engine's answers: those of the model's own generation, whatever runs beside, and no page is ever lost."""

import json
import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.models import config, ours
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Output, Request, Sampling, engine_on
from tokensieve.engine.runner import Runner
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM

KINDS: dict[str, Any] = {
    "dense": config("v3"),
    "dense v2": config("v2", q_lora_rank=None),
    "sparse": config("v32"),
    "sparse without a latent": config("v32", q_lora_rank=None),
    "sparse fp8": config("v32", index_dtype="fp8"),
}
LENGTHS = (1, 5, 63, 64, 65, 130, 200)
SMALL = EngineConfig(pages=64, running=16, chunk=64, chunks=2)


RARE = pytest.param("sparse without a latent", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[RARE if kind in RARE.values else kind for kind in KINDS])
def model(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    return ours(KINDS[request.param], seed=1)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(seed * 1000 + length).choices(range(16, 96), k=length))


def ask(id: str, length: int, text: int = 0, **sampling: Any) -> Request:
    return Request(id, prompt(length, text), Sampling(**{"max_tokens": 12, "ignore_eos": True, **sampling}))


def run(engine: Engine, requests: list[Request], late: int = 0) -> dict[str, list[Output]]:
    """Everything that comes of the requests; the last `late` of them arrive one a step."""
    found: dict[str, list[Output]] = {r.id: [] for r in requests}
    coming = requests[len(requests) - late :]
    for r in requests[: len(requests) - late]:
        engine.add(r)
    while engine.busy or coming:
        if coming:
            engine.add(coming.pop(0))
        for output in engine.step():
            found[output.id].append(output)
    assert engine.scheduler.pool.used == 0
    return found


def tokens(outputs: list[Output]) -> list[int]:
    assert [o.finish is None for o in outputs] == [True] * (len(outputs) - 1) + [False]
    return [token for o in outputs for token in o.tokens]


def test_the_progress_of_a_prompt_is_reported_if_it_is_wanted(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """After every chunk but the last, which gives the first token. What the cache holds counts as read."""
    engine = Engine(sparse, tokenizer, SMALL)
    asked, quiet = replace(ask("a", 200), progress=True), ask("b", 200)
    outputs = run(engine, [asked])["a"]
    reading = [o for o in outputs if o.reading]
    assert [o.read_tokens for o in reading] == [64, 128, 192]
    assert all(o == Output("a", "", (), prompt_tokens=200, read_tokens=o.read_tokens) for o in reading)
    assert outputs[:3] == reading and all(o.tokens and o.read_tokens == 200 for o in outputs[3:])

    longer = Request("c", asked.prompt[:130] + prompt(190), asked.sampling, progress=True)
    reading = [o for o in run(engine, [longer])["c"] if o.reading]
    assert [(o.cached_tokens, o.read_tokens) for o in reading] == [(128, 192), (128, 256)]
    assert [replace(o, id="a") for o in run(Engine(sparse, tokenizer, SMALL), [quiet])["b"]] == outputs[3:]


def test_answers_are_those_of_generate(model: DecoderForCausalLM, tokenizer: Any) -> None:
    """Prompts of less and more than k = 24 tokens, of one chunk and more, all at once."""
    requests = [ask(str(n), n) for n in LENGTHS]
    found = run(Engine(model, tokenizer, SMALL), requests)
    for r in requests:
        with torch.inference_mode():
            expected = model.generate(
                torch.tensor([r.prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=2
            )
        assert tokens(found[r.id]) == expected[0, len(r.prompt) :].tolist(), r.id
        assert found[r.id][-1].finish == "length" and found[r.id][-1].completion_tokens == 12


def test_an_answer_does_not_depend_on_what_runs_beside(model: DecoderForCausalLM, tokenizer: Any) -> None:
    """To the bit: its log probabilities are the same, alone and in a crowd that comes and goes."""
    some = [ask(str(n), n, temperature=1.0, seed=n, logprobs=2) for n in LENGTHS]
    others = {"text": 9, "temperature": 0.5}
    crowd = [ask(f"other {i}", 3 + 17 * i, max_tokens=1 + i, logprobs=(None, 0, 5)[i % 3], **others) for i in range(9)]
    together = run(Engine(model, tokenizer, SMALL), [*crowd[:5], *some, *crowd[5:]], late=8)
    for r in some:
        alone = run(Engine(model, tokenizer, SMALL), [r])
        assert tokens(alone[r.id]) == tokens(together[r.id])
        assert [o.logprobs for o in alone[r.id]] == [o.logprobs for o in together[r.id]]


def test_a_cache_smaller_than_the_demand(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """Requests wait, and some give their pages back and begin again: none is lost, and nothing of any changes."""
    requests = [ask(str(i), 40 + 20 * i, temperature=1.0, seed=i, max_tokens=30, logprobs=0) for i in range(5)]
    engine = Engine(sparse, tokenizer, replace(SMALL, pages=5))
    crowded = run(engine, requests)
    assert engine.scheduler.preempted > 0
    roomy = run(Engine(sparse, tokenizer, SMALL), requests)
    for r in requests:
        assert tokens(crowded[r.id]) == tokens(roomy[r.id])
        assert [o.logprobs for o in crowded[r.id]] == [o.logprobs for o in roomy[r.id]]
        assert crowded[r.id][-1].completion_tokens == 30


def test_prompts_that_begin_alike_share_pages(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    first = ask("first", 200)
    again = replace(first, id="again")
    longer = replace(first, id="longer", prompt=(*first.prompt[:150], *prompt(60, seed=3)))
    engine = Engine(sparse, tokenizer, SMALL)
    found = {**run(engine, [first]), **run(engine, [again, longer])}
    assert [found[name][-1].cached_tokens for name in ("first", "again", "longer")] == [0, 192, 128]
    fresh = run(Engine(sparse, tokenizer, replace(SMALL, prefix_cache=False)), [again, longer])
    for name in ("again", "longer"):
        assert tokens(found[name]) == tokens(fresh[name])
    # what dense attention stored is not what sparse attention stores
    dense = run(engine, [replace(first, id="dense", selector="dense")])
    assert dense["dense"][-1].cached_tokens == 0
    assert tokens(dense["dense"]) == tokens(run(engine, [replace(first, id="d", selector="dense")])["d"])


def test_pages_of_a_prefix_are_given_up_when_they_are_needed(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, replace(SMALL, pages=6))
    for i in range(5):
        found = run(engine, [ask(str(i), 250, text=i)])
        assert len(tokens(found[str(i)])) == 12


def test_a_long_prompt_does_not_starve_short_ones(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, replace(SMALL, chunks=1))
    engine.add(ask("long", 1000))
    engine.step()
    engine.add(ask("short", 10, max_tokens=3))
    finished = []
    while engine.busy:
        finished += [o.id for o in engine.step() if o.finish]
    assert finished == ["short", "long"]
    both = replace(SMALL, chunks=2, running=8)
    engine = Engine(sparse, tokenizer, both)
    engine.add(ask("long", 1000))
    for i in range(30):  # short ones without end do not starve the long one either
        engine.add(ask(f"short {i}", 60, text=i, max_tokens=1))
        if any(o.id == "long" for o in engine.step()):
            break
    else:
        pytest.fail("the long prompt was never done")


def test_ends(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """Abort, the end token, stop strings, the model's last position, and a step that failed."""
    engine = Engine(sparse, tokenizer, SMALL)
    engine.add(ask("a", 100))
    engine.add(ask("b", 100, text=1))
    engine.step()
    engine.step()
    gone = engine.abort("a")
    assert gone is not None and gone.finish == "abort" and engine.abort("a") is None
    failed = engine.fail_all("out of luck")
    assert [(o.id, o.finish, o.error) for o in failed] == [("b", "error", "out of luck")]
    assert not engine.busy and engine.scheduler.pool.used == 0
    whole = run(engine, [ask("whole", 30)])["whole"]
    text, first = "".join(o.text for o in whole), tokens(whole)
    stop = text[3:5]
    stopped = run(engine, [ask("stop", 30, stop=(stop, "never"))])["stop"]
    assert "".join(o.text for o in stopped) == text[: text.index(stop)] and stopped[-1].finish == "stop"
    engine._ends = {first[4]}
    ended = run(engine, [ask("ends", 30, ignore_eos=False)])["ends"]
    assert tokens(ended) == first[: first.index(first[4]) + 1] and ended[-1].finish == "stop"
    last = run(engine, [ask("last", 1020, max_tokens=100)])["last"]
    assert last[-1].finish == "length" and last[-1].completion_tokens == 4


def test_what_can_never_run(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, replace(SMALL, pages=3))
    for request, words in (
        (Request("x", ()), "empty"),
        (ask("x", 192), "room for 192"),
        (Request("x", (5, 4096)), "outside of the vocabulary"),
        (Request("x", (5, -1)), "outside of the vocabulary"),
        (replace(ask("x", 5), selector="best"), "selection 'best' is unknown"),
        (ask("x", 5, schema={"type": "nothing"}), "schema cannot be followed"),
    ):
        with pytest.raises(UserError, match=words):
            engine.add(request)
    engine.add(ask("x", 5))
    with pytest.raises(UserError, match="already"):
        engine.add(ask("x", 5))
    for wrong in (
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"temperature": 1e-310},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"top_k": -1},
        {"top_k": 10**400},
        {"max_tokens": -1},
        {"max_tokens": 2, "min_tokens": 3},
        {"min_tokens": 1, "grammar": 'start: "a"'},
        {"repetition_penalty": 1e-40},
        {"logprobs": 21},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": ("x",) * 65},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)
    for wrong in ({"pages": -1}, {"running": 0}, {"chunk": 100}, {"chunks": 0}):
        with pytest.raises(UserError, match="engine"):
            EngineConfig(**wrong)


def test_logprobs_are_the_models(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    request = ask("x", 40, logprobs=3, temperature=0.7, seed=2, repetition_penalty=1.3, top_k=5)
    found = run(Engine(sparse, tokenizer, SMALL), [request])["x"]
    said = tokens(found)
    with torch.inference_mode():
        logits = sparse(torch.tensor([[*request.prompt, *said]])).logits[0, len(request.prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    for i, output in enumerate(found):
        told = output.logprobs[0]
        assert told.token == said[i] and told.logprob == pytest.approx(float(expected[i, said[i]]), abs=1e-4)
        best = expected[i].topk(3)
        assert [t for t, _ in told.top] == best.indices.tolist()
        assert [p for _, p in told.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_an_answer_obeys_its_schema(tokenizer: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "n": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }  # fmt: skip
    model = ours(config("v32", vocab_size=4096), seed=1)
    requests = [ask(str(i), 20, text=i, seed=i, schema=schema, temperature=1.0, max_tokens=300) for i in range(3)]
    found = run(Engine(model, tokenizer, SMALL), requests)
    for r in requests:
        assert found[r.id][-1].finish == "stop"
        said = json.loads("".join(o.text for o in found[r.id]))
        assert set(said) == {"name", "n"} and len(said["name"]) <= 8 and 0 <= said["n"] <= 99


@pytest.mark.parametrize("index_dtype", ["bf16", "fp8", "none"])
def test_quantized_pages(index_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and keys in FP8, as on a GPU: a token has about the logits that the full forward gives it, whether its
    chunk is run or it is decoded, and the same to rounding in both ways, since both read what is stored. Without
    experts: a rounding would choose others.
    """
    widths = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "index_n_heads": 8}
    if index_dtype == "none":
        model = ours(config("v3", first_k_dense_replace=3, kv_lora_rank=512, qk_rope_head_dim=64), seed=1)
    else:
        model = ours(config("v32", first_k_dense_replace=3, index_dtype=index_dtype, **widths), seed=1)
    monkeypatch.setattr("tokensieve.engine.runner.is_quantized", lambda model: (True, index_dtype == "fp8"))
    runner, ids, pages = Runner(model, 4), prompt(150), [2, 0, 3]
    assert runner.pools.entries[0].dtype == torch.uint8
    assert runner.pools.index[0].dtype == (torch.uint8 if index_dtype == "fp8" else torch.float32)
    for selection in ("indexer", "dense"):
        for a in (0, 64):
            runner.chunk(ids[a : a + 64], a, pages, selection)
        chunked = runner.chunk(ids[128:], 128, pages, selection)
        runner.chunk(ids[128:149], 128, pages, selection)
        decoded = runner.step([ids[149]], [150], [pages], selection)[0]
        with torch.inference_mode(), tokensieve.selecting(model, selection):
            whole = model(torch.tensor([ids])).logits[0, -1]
        assert float((chunked - decoded).abs().max()) < 2e-3 * float(whole.abs().max())
        assert float((decoded - whole).norm()) < 0.25 * float(whole.norm())  # three layers; E4M3 rounds by up to a 16th


def test_what_is_shared_has_the_same_bits(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    """A prompt that ends within a chunk shares none of it: the rest of the chunk would have been computed with it."""
    engine = Engine(sparse, tokenizer, replace(SMALL, chunk=128))
    whole = ask("whole", 300, logprobs=0)
    run(engine, [replace(whole, id="beginning", prompt=whole.prompt[:70])])
    first, again = run(engine, [whole])["whole"], run(engine, [replace(whole, id="again")])["again"]
    fresh = run(Engine(sparse, tokenizer, replace(SMALL, chunk=128)), [whole])["whole"]
    assert (first[-1].cached_tokens, again[-1].cached_tokens) == (0, 256)
    assert [o.logprobs for o in first] == [o.logprobs for o in fresh] == [o.logprobs for o in again]


def test_a_large_prompt_that_waits_is_passed_but_not_for_ever(sparse: DecoderForCausalLM, tokenizer: Any) -> None:
    engine = Engine(sparse, tokenizer, replace(SMALL, pages=16))
    engine.add(ask("running", 60, max_tokens=60))  # two of the 16 pages, and the large one needs 15
    engine.step()
    engine.add(ask("large", 900))
    for i in range(24):
        engine.add(ask(f"small {i}", 10, text=i, max_tokens=2))
    large, ended = engine._generations["large"].running, 0
    while engine.busy:
        ended += sum(o.finish is not None for o in engine.step())
    assert large.passed == 16 and ended == 26


def test_what_is_not_finite_ends_alone(
    sparse: DecoderForCausalLM, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(sparse, tokenizer, SMALL)
    step = engine.runner.step

    def broken(tokens, lens, pages, selection):
        logits = step(tokens, lens, pages, selection).clone()
        logits[0, 3] = float("nan")
        return logits

    engine.add(ask("a", 30, temperature=1.0, seed=1))
    engine.add(ask("b", 30, text=1, temperature=1.0, seed=1))
    engine.step()
    monkeypatch.setattr(engine.runner, "step", broken)
    ended = {o.id: o for o in engine.step()}
    assert ended["a"].finish == "error" and "not finite" in ended["a"].error and ended["b"].finish is None


def test_schemas_that_cannot_be_followed_are_errors(tokenizer: Any) -> None:
    model = ours(config("v32", vocab_size=4096), seed=1)
    engine = Engine(model, tokenizer, SMALL)
    with pytest.raises(UserError, match="more than 32768"):
        engine.add(ask("x", 5, schema={"enum": ["x" * 40000]}))
    many = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}
    try:  # where it is seen at once; else on the way
        engine.add(ask("many", 5, schema=many, temperature=1.0, seed=0))
    except UserError:
        return
    last = []
    while engine.busy:
        last = engine.step() or last
    assert last[-1].finish in ("error", "length"), last


def test_whoever_serves_is_told_the_size_of_the_cache(
    sparse: DecoderForCausalLM, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tokensieve")
    with engine_on(Mesh(0, 1, torch.device("cpu")), sparse, tokenizer, EngineConfig(pages=8)) as engine:
        assert engine is not None
        size = engine.runner.pools.bytes / 2**20
        assert caplog.messages == [f"cache: {engine.cache_size}"] == [f"cache: 8 pages, up to {size:.1f} MiB"]
