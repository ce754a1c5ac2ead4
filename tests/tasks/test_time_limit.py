"""The time limit on a model's code: in every thread, in time, and never after its block."""

import threading
import time
from collections.abc import Callable

import pytest

import tokensieve
from tokensieve.config import UserError
from tokensieve.tasks import turns
from tokensieve.tasks.time_limit import TimeIsUp, time_limit

ENDLESS = {
    "nested ranges": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a list": "{% set r = range(99999)|list %}{% for i in r %}{% for j in r %}{% set k = 1 %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


def forever() -> None:
    with time_limit(0.2):
        while True:
            pass


def in_a_thread(work: Callable[[], object]) -> list[BaseException]:
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return raised


def test_a_loop_ends_in_every_thread() -> None:
    begin = time.monotonic()
    with pytest.raises(TimeIsUp):
        forever()
    assert [type(error) for error in in_a_thread(forever)] == [TimeIsUp]
    assert 0.3 < time.monotonic() - begin < 20


def test_nothing_is_raised_after_the_block() -> None:
    """The limit is reached where blocks end; some are stopped, others are not, and the code after them always runs."""
    for number in range(300):
        try:
            with time_limit(0.001):
                end = time.perf_counter() + 0.0005 + number * 2e-6
                while time.perf_counter() < end:
                    pass
        except TimeIsUp:
            pass
        end = time.perf_counter() + 0.0005
        while time.perf_counter() < end:
            pass


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LONGEST", 0.25)
    tokenizer = tokensieve.load_tokenizer("sparse")
    tokenizer.chat_template = ENDLESS[name]
    messages = [{"role": "user", "content": "Hello"}]
    errors = in_a_thread(lambda: turns.render(tokenizer, messages))
    with pytest.raises(turns.EndlessTemplate) as error:
        turns.render(tokenizer, messages)
    for refused in (error.value, *errors):
        expected = "the model's chat template does not end within 0.25 s; correct chat_template.jinja"
        assert str(refused) == expected
    assert len(errors) == 1


@pytest.mark.parametrize("source", ["{% for i in range(10 ** 12) %}x{% endfor %}", "{{ 'a' * 10 ** 13 }}"])
def test_a_template_that_takes_too_much_is_refused(source: str) -> None:
    tokenizer = tokensieve.load_tokenizer("sparse")
    tokenizer.chat_template = source
    with pytest.raises(UserError, match="chat template refuses these messages"):
        turns.render(tokenizer, [{"role": "user", "content": "Hello"}])
