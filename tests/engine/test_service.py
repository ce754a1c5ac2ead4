"""Many callers on one engine's thread: order, leaving early, a step that fails, a full queue, and the end."""

import asyncio
import time

import pytest

from tests.support import models
from tokensieve.config import UserError
from tokensieve.engine import Busy, Engine, EngineConfig, Output, Request, Sampling, Service, Stopping
from tokensieve.engine.service import Caller


class Letters:
    """As much of a tokenizer as the engine asks for: every token is a letter."""

    eos_token_id = None

    def __init__(self):
        from tokenizers import Tokenizer
        from tokenizers.decoders import Fuse
        from tokenizers.models import WordLevel

        letters = {chr(0x4E00 + i): i for i in range(models.VOCAB)}
        self.backend_tokenizer = Tokenizer(WordLevel(letters, unk_token=next(iter(letters))))
        self.backend_tokenizer.decoder = Fuse()

    def decode(self, ids: list[int], **_: object) -> str:
        return self.backend_tokenizer.decode(ids)


@pytest.fixture(scope="module")
def model():
    return models.ours(models.config("v32", num_hidden_layers=2))


@pytest.fixture
def service(model):
    made = Service(Engine(model, Letters(), EngineConfig(pages=12, running=3, chunk=64)), waiting=2)
    made.start()
    yield made
    made.stop(drain=False)
    assert not made.alive and made.engine.scheduler.pool.used == 0


def request(id: str, tokens: int = 6, length: int = 40, **sampling: object) -> Request:
    prompt = tuple(models.tokens(1, length, seed=length)[0].tolist())
    return Request(id, prompt, Sampling(max_tokens=tokens, ignore_eos=True, **sampling))


async def collect(service: Service, asked: Request) -> list[Output]:
    return [output async for output in service.stream(asked)]


async def settled(service: Service) -> None:
    """Nothing is open, and the pages are back."""
    for _ in range(500):
        if not service.open and not service.engine.busy:
            break
        await asyncio.sleep(0.01)
    assert service.open == 0 and service.engine.scheduler.pool.used == 0


def test_callers_get_their_own_answers(service: Service) -> None:
    async def main() -> None:
        asked = [request(f"r{i}", tokens=4 + i, length=30 + i) for i in range(5)]
        together = await asyncio.gather(*(collect(service, r) for r in asked))
        for r, outputs in zip(asked, together):
            assert {o.id for o in outputs} == {r.id} and [o.finish for o in outputs[:-1]] == [None] * (len(outputs) - 1)
            assert outputs[-1].finish == "length" and outputs[-1].completion_tokens == r.sampling.max_tokens
            alone = await collect(service, r)
            assert [o.tokens for o in alone] == [o.tokens for o in outputs]
        await settled(service)

    asyncio.run(main())


def test_requests_asked_together(service: Service) -> None:
    """Each is answered as alone; leaving, or one that cannot run, ends all of them."""

    async def main() -> None:
        asked = [request(f"r{i}", tokens=4 + i, length=30 + i) for i in range(4)]
        together = [output async for output in service.stream(*asked)]
        for r in asked:
            its = [o for o in together if o.id == r.id]
            assert [o.finish for o in its] == [None] * (len(its) - 1) + ["length"]
            assert [o.tokens for o in await collect(service, r)] == [o.tokens for o in its]
        stream = service.stream(*(request(f"r{i}", tokens=700 if i else 2) for i in range(3)))
        while (await anext(stream)).finish is None:
            pass
        assert service.open == 2
        await stream.aclose()
        await settled(service)
        with pytest.raises(UserError, match="empty"):
            async for _ in service.stream(request("long", tokens=700), Request("empty", ())):
                pass
        await settled(service)
        with pytest.raises(UserError, match="6 answers are asked for at once, and 5 may"):
            await anext(service.stream(*(request(f"r{i}") for i in range(6))))
        with pytest.raises(UserError, match="r0 already"):
            await anext(service.stream(request("r0"), request("r0")))
        assert service.open == 0

    asyncio.run(main())


def test_one_that_leaves_gives_its_pages_back(service: Service) -> None:
    async def main() -> None:
        stream = service.stream(request("closed", tokens=700))
        await anext(stream)
        assert service.load.running == 1 and service.load.pages_used > 0
        await stream.aclose()
        task = asyncio.create_task(collect(service, request("cancelled", tokens=700)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(service)

    asyncio.run(main())


def test_a_slow_reader_delays_nobody(service: Service) -> None:
    async def main() -> None:
        slow = service.stream(request("slow", tokens=50))
        await anext(slow)
        assert (await collect(service, request("quick", tokens=50)))[-1].finish == "length"
        rest = [output async for output in slow]
        assert rest[-1].completion_tokens == 50
        await settled(service)

    asyncio.run(main())


def test_a_step_that_fails_ends_what_runs_and_no_more(service: Service, monkeypatch, caplog) -> None:
    async def main() -> None:
        whole, left = service.engine.runner.step, [3]

        def fails_once(*args: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("out of memory, say")
            return whole(*args)

        monkeypatch.setattr(service.engine.runner, "step", fails_once)
        both = await asyncio.gather(*(collect(service, request(id, tokens=30)) for id in "ab"))
        for outputs in both:
            assert outputs[-1].finish == "error" and "RuntimeError" in outputs[-1].error
        assert "Traceback" in caplog.text and "out of memory, say" in caplog.text
        assert service.alive and (await collect(service, request("c")))[-1].finish == "length"
        await settled(service)

    asyncio.run(main())


def test_whoever_ended_in_the_step_that_failed_hears_of_it(service: Service, monkeypatch) -> None:
    """Its last output is lost with the step; it is not left waiting for it, and the service can end."""

    async def main() -> None:
        step = service.engine.step

        def after_an_end() -> list[Output]:
            outputs = step()
            if any(output.finish for output in outputs):
                raise RuntimeError("later in the same step")
            return outputs

        monkeypatch.setattr(service.engine, "step", after_an_end)
        found = await asyncio.wait_for(
            asyncio.gather(collect(service, request("short", 2)), collect(service, request("long", 50))), 20
        )
        assert [outputs[-1].finish for outputs in found] == ["error", "error"]
        assert service.open == 0 and not service._callers
        await settled(service)

    asyncio.run(main())


def test_an_add_that_fails_is_told_to_its_caller_alone(service: Service, monkeypatch) -> None:
    async def main() -> None:
        running = service.stream(request("a", tokens=100))
        await anext(running)
        monkeypatch.setattr(service.engine.scheduler, "add", lambda *_: 1 / 0)
        assert (await collect(service, request("b")))[-1].finish == "error"
        monkeypatch.undo()
        assert [output async for output in running][-1].finish == "length"
        assert (await collect(service, request("b")))[-1].finish == "length"

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_fail_all_ends_the_service(model, monkeypatch) -> None:
    async def main() -> None:
        service = Service(Engine(model, Letters(), EngineConfig(pages=4)))
        service.start()
        for name in ("step", "fail_all"):
            monkeypatch.setattr(service.engine, name, lambda *_: 1 / 0)
        outputs = await collect(service, request("a"))
        assert outputs[-1].finish == "error"
        service._thread.join()
        assert not service.alive
        with pytest.raises(Stopping):
            await collect(service, request("b"))

    asyncio.run(main())


def test_what_cannot_run_is_refused(service: Service) -> None:
    async def main() -> None:
        with pytest.raises(UserError, match="empty"):
            await collect(service, Request("empty", ()))
        with pytest.raises(UserError, match="room for"):
            await collect(service, request("long", length=1000))
        first = service.stream(request("same", tokens=500))
        await anext(first)
        with pytest.raises(UserError, match="already"):
            await collect(service, request("same"))
        await first.aclose()
        await settled(service)

    asyncio.run(main())


def test_a_full_queue_is_busy(service: Service) -> None:
    async def main() -> None:
        streams = [service.stream(request(f"r{i}", tokens=150)) for i in range(5)]
        first = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="try again"):
            await collect(service, request("one too many"))
        await asyncio.gather(*first[:3])
        for stream, task in zip(streams, first):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await stream.aclose()
        await settled(service)

    asyncio.run(main())


@pytest.mark.parametrize("drain", [True, False])
def test_the_end(model, drain: bool) -> None:
    async def main() -> None:
        service = Service(Engine(model, Letters(), EngineConfig(pages=24)))
        with pytest.raises(Stopping):
            await collect(service, request("early"))
        service.start()
        stream = service.stream(request("last", tokens=200))
        await anext(stream)
        stopping = asyncio.create_task(asyncio.to_thread(service.stop, drain))
        while not service.draining:
            await asyncio.sleep(0.001)
        with pytest.raises(Stopping):
            await collect(service, request("late"))
        outputs = [output async for output in stream]
        await stopping
        assert outputs[-1].finish == ("length" if drain else "abort")
        assert not service.alive and service.open == 0 and service.engine.scheduler.pool.used == 0

    asyncio.run(main())


def test_a_closed_loop_is_survived(service: Service) -> None:
    async def leave() -> None:
        service._submit([Caller(request("gone", 300), asyncio.get_running_loop())])

    asyncio.run(leave())
    for _ in range(500):
        if not service.open:
            break
        time.sleep(0.01)
    assert service.alive and service.open == 0
    asyncio.run(settled(service))


def test_an_idle_service_sleeps(service: Service) -> None:
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1
