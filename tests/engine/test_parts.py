"""The engine's parts: pages that are counted, tokens that are drawn, text that is certain."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Sequence
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

import tokensieve
from tokensieve.engine.detokenizer import Detokenizer
from tokensieve.engine.page_pool import PagePool, digests
from tokensieve.engine.request import Sampling
from tokensieve.engine.sampling import SamplingRow, choose, uniform


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_no_page_is_lost_or_given_twice(seed: int) -> None:
    """Anything that a scheduler may do, in any order: every page is free, known and unused, or somebody's."""
    draw, pool = random.Random(seed), PagePool(9)
    held: list[list[int]] = []
    names = [bytes([i]) * 16 for i in range(6)]
    for _ in range(60):
        move = draw.choice(["take", "take", "release", "publish", "find"])
        if move == "take":
            count = draw.randint(0, 5)
            pages, room = pool.take(count), pool.available
            assert (pages is None) == (count > room) if pages is None else len(pages) == count
            held += [pages] if pages else []
        elif move == "release" and held:
            pool.release(held.pop(draw.randrange(len(held))))
        elif move == "publish" and held:
            pool.publish(draw.choice(draw.choice(held)), draw.choice(names))
        else:
            found = pool.find(draw.sample(names, 3))
            pool.share(found)
            held += [found] if found else []
        users = Counter(page for pages in held for page in pages)
        assert pool.used == len(users) and pool.available == 9 - len(users)
        assert [users.get(page, 0) for page in range(9)] == pool._users
        assert not set(pool._free) & set(pool._unused) and not (set(pool._free) | set(pool._unused)) & set(users)
    for pages in held:
        pool.release(pages)
    taken = pool.take(9)
    assert taken is not None and sorted(taken) == list(range(9))


def test_a_page_released_too_often_is_an_error() -> None:
    pool = PagePool(2)
    pages = pool.take(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(pages)


def test_digests_are_of_whole_pages_and_of_all_before() -> None:
    tokens = list(range(200))
    found = list(digests(tokens, "indexer"))
    assert len(found) == 3 and len(list(digests(tokens[:63], "indexer"))) == 0
    assert list(digests([7, *tokens[1:]], "indexer"))[2] != found[2]
    assert list(digests([*tokens[:199], 7], "indexer")) == found
    assert not set(digests(tokens, "dense")) & set(found)


def of(sampling: Sampling, logits: torch.Tensor, draws: int, **row: Any) -> Counter:
    rows = [SamplingRow(sampling, 7, position, row.get("seen", ()), row.get("allowed")) for position in range(draws)]
    return Counter(choose(logits.expand(draws, -1), rows))


def test_draws() -> None:
    """Frequencies are the probabilities; nothing outside of top_k, top_p, min_p or a grammar is ever drawn."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = p.log() + 3.0
    found = of(Sampling(temperature=1.0), logits, 4000)
    for token, share in enumerate(p.tolist()):
        assert found[token] / 4000 == pytest.approx(share, abs=0.03)  # four standard deviations of the largest
    colder = of(Sampling(temperature=0.5), logits, 1000)
    assert colder[0] / 1000 == pytest.approx(0.25 / float((p**2).sum()), abs=0.06)
    assert set(of(Sampling(temperature=1.0, top_k=2), logits, 300)) == {0, 1}
    assert set(of(Sampling(temperature=1.0, top_p=0.74), logits, 300)) == {0, 1}
    assert set(of(Sampling(temperature=1.0, top_p=0.01), logits, 50)) == {0}
    assert set(of(Sampling(temperature=1.0, min_p=0.2), logits, 300)) == {0, 1, 2}
    allowed = torch.tensor([False, True, False, True, False])
    assert set(of(Sampling(temperature=1.0), logits, 300, allowed=allowed)) == {1, 3}
    assert set(of(Sampling(), logits, 1, allowed=allowed)) == {1}
    assert set(of(Sampling(repetition_penalty=100.0), logits, 1, seen=(0, 0))) == {1}
    assert set(of(Sampling(temperature=0.001), logits, 20)) == {0} and set(
        of(Sampling(temperature=100.0), logits, 200)
    ) == set(range(5))


def test_penalties_and_biases() -> None:
    """Penalties are for what the answer holds, as often as it does; what only the prompt holds is as before."""
    logits, seen = torch.tensor([3.0, 2.0, 1.0]), (0, 0, 1, 1)  # the last two are the answer

    def best(**said: Any) -> int:
        return choose(logits[None], [SamplingRow(Sampling(**said), 0, 2, seen)])[0]

    assert best(presence_penalty=2.0) == best(frequency_penalty=2.0) == 0
    assert (
        best(logit_bias=((1, 2.5),)) == best(logit_bias=((1, 4.4),), presence_penalty=2.0, frequency_penalty=0.5) == 1
    )
    assert best(logit_bias=((1, 4.4),), presence_penalty=2.0, frequency_penalty=0.8) == 0
    assert best(logit_bias=((0, -100.0), (1, -100.0))) == 2 and logits.tolist() == [3.0, 2.0, 1.0]
    row = SamplingRow(Sampling(logit_bias=((0, 100.0),)), 0, 0, (), torch.tensor([False, True, True]))
    assert choose(logits[None], [row]) == [1], "no bias gets past a grammar"


def test_equal_logits_give_the_first() -> None:
    assert choose(torch.tensor([[1.0, 3.0, 3.0]]), [SamplingRow(Sampling(), 0, 0, ())]) == [1]


def test_logits_stay_as_they_were() -> None:
    logits = torch.randn(2, 9)
    before = logits.clone()
    rows = [
        SamplingRow(Sampling(repetition_penalty=2.0), 0, 0, (1, 2)),
        SamplingRow(Sampling(), 0, 0, (), torch.arange(9) > 3),
    ]
    choose(logits, rows)
    assert torch.equal(logits, before)


def test_a_draw_depends_on_seed_and_place_alone() -> None:
    each = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(each)) == 1600 and all(0 <= u < 1 for u in each) and uniform(3, 4) == each[3 * 40 + 4]
    assert abs(sum(each) / 1600 - 0.5) < 0.03 and uniform((1 << 64) - 1, 0) < 1
    for position in (0, 1, 63, 64, 127, 1000):  # drawn in blocks, each is that of a generator that begins there
        assert uniform(7, position) == np.random.Generator(np.random.Philox(key=7, counter=position)).random()


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_text_comes_whole_and_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    """Any text in any characters: what is given is a beginning of it at every moment."""
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    places = [whole.find(stop) for stop in stops if stop in whole]
    stream, given_ = Detokenizer(tokenizer, tuple(stops)), ""
    for token in ids:
        given_ += stream.push(token)
        assert whole.startswith(given_)
        if stream.stopped:
            break
    given_ += stream.finish()
    if not places:
        assert given_ == whole and not stream.stopped
    else:
        assert stream.stopped and any(given_ == whole[:at] for at in places)


class Pieces:
    """As much of a tokenizer as a Detokenizer needs: its tokens are the words of up to three a's and b's, and one that
    is special.
    """

    words = ["".join(w) for n in (1, 2, 3) for w in itertools.product("ab", repeat=n)]

    def __init__(self):
        self.backend_tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(self.words)}, unk_token="a"))
        self.backend_tokenizer.decoder = Fuse()
        self.backend_tokenizer.add_special_tokens(["<end>"])

    def decode(self, ids: list[int], **_: object) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=True)


PIECES = Pieces()


def naive(words: list[str], stops: list[str]) -> Iterator[str]:
    """What a Detokenizer gives for each word, by the definition: all is searched at every word. The last one: what is
    held at the end.
    """
    held = ""
    for word in words:
        text = held + word.removesuffix("<end>")
        ends = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if ends:
            yield text[: min(ends)]
            return
        begins = [n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])]
        keep = 0 if word == "<end>" else max(begins, default=0)
        held = text[len(text) - keep :]
        yield text[: len(text) - keep]
    yield held


@given(st.lists(st.sampled_from([*Pieces.words, "<end>"])), st.lists(st.text("ab", min_size=1, max_size=9), max_size=4))
@settings(max_examples=300, deadline=None)
def test_stop_strings_are_found_as_by_searching_everything(words: list[str], stops: list[str]) -> None:
    stream = Detokenizer(PIECES, tuple(stops))
    given_ = []
    for word in words:
        given_.append(stream.push(PIECES.backend_tokenizer.token_to_id(word)))
        if stream.stopped:
            break
    given_ += [] if stream.stopped else [stream.finish()]
    assert given_ == list(naive(words, stops))


def test_stop_strings_that_nearly_end_cost_little() -> None:
    """As many and as long ones as may be. What one of them holds back is not searched for all others at every token."""
    stops = ("a" * 1023 + "b", *("b" * 1023 + chr(0x4E00 + i) for i in range(63)))
    stream = Detokenizer(PIECES, stops)
    begin = time.process_time()
    for _ in range(600):
        stream.push(PIECES.words.index("aaa"))
    assert not stream.stopped and time.process_time() - begin < 0.5  # 0.05 s; searched anew for every token, 7 s


def test_a_character_that_never_ends_is_given_at_the_end() -> None:
    tokenizer = _tokenizer()
    stream = Detokenizer(tokenizer)
    ids = tokenizer("a你", add_special_tokens=False).input_ids
    assert "".join(stream.push(token) for token in ids[:-1]) == "a" and stream.finish() == "�"


def test_bytes_that_are_no_character() -> None:
    """A tokenizer that spells rare characters in bytes decodes a whole run of them at once: a wrong one changes those
    before it.
    """
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "<unk>"]
    model = BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = Sequence([ByteFallback(), Fuse()])
    stream = Detokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    given = [stream.push(token) for token in (*"é".encode(), 0xFF, 256, *"🙂".encode(), 256)]
    assert given == ["", "é", "", "��a", "", "", "", "🙂", "a"] and stream.finish() == ""


_KNOWN: list[Any] = []


def _tokenizer() -> Any:
    if not _KNOWN:  # hypothesis calls a test many times, and has no fixture for all of them
        _KNOWN.append(tokensieve.load_tokenizer("base"))
    return _KNOWN[0]
