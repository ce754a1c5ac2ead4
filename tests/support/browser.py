"""The page in Chromium, for tests: what opens it, what a reader does there, and answers that no model has to give.

A test file takes the fixtures with `pytest_plugins`.
"""

import functools
import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, expect, sync_playwright

import tokensieve
from tests.support import servers
from tokensieve.engine import EngineConfig, Service

LIMITS = {"max_tokens": 400, "max_prompt_tokens": 3000, "max_body": 2**20}
GREEDY = """localStorage.getItem("tokensieve") ?? localStorage.setItem("tokensieve", '{"temperature": 0}')"""
GET = "python -m playwright install chromium-headless-shell"
expect.set_options(timeout=20_000)

FACTS = {
    0.3: "# Note: the access code of silver-harbor is 482913.",
    0.7: "# Reminder: the badge number of amber-falcon is 70358.",
}
QUESTION = "What is the access code of silver-harbor?"
ANSWER = "silver-harbor: 482913"


def document(characters: int) -> str:
    """About three characters a token of real code, with facts between its lines that nothing else in it tells."""
    lines = inspect.getsource(textwrap)[:characters].splitlines()
    for share, fact in FACTS.items():
        at = int(len(lines) * share)
        while lines[at].strip():
            at += 1
        lines.insert(at, fact)
    return "\n".join(lines) + "\n"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, or else Playwright's own. playwright.sync_api.Error if there is none that starts."""
    paths = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=paths[0] if paths else None, args=["--no-sandbox"])
        yield browser
        browser.close()


@functools.cache
def why_not() -> str | None:
    """The reason why no browser opens here, with the remedy."""
    try:
        with chromium():
            return None
    except Error as error:
        return f"no browser: apt-get install chromium, or {GET} ({error.message.splitlines()[0]})"


@pytest.fixture(scope="module")
def loaded():
    return tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")


@pytest.fixture(scope="module")
def served(loaded) -> Iterator[tuple[str, Service]]:
    with servers.running(loaded, EngineConfig(pages=160, running=4), **LIMITS) as both:
        yield both


@pytest.fixture(scope="module", name="chromium")
def _chromium() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def context(chromium) -> Iterator[BrowserContext]:
    made = chromium.new_context(viewport={"width": 1200, "height": 800})
    made.add_init_script(GREEDY)
    yield made
    made.close()


@pytest.fixture
def page(served, context) -> Iterator[Page]:
    """The page, loaded. Nothing may be refused by its policy, and no script may fail."""
    opened, problems = context.new_page(), []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: message.type == "error" and problems.append(message.text))
    opened.goto(served[0])
    expect(opened.locator("#send")).to_be_enabled()
    yield opened
    assert [p for p in problems if not p.startswith("Failed to load resource")] == []


def restart(page: Page, **kept: Any) -> None:
    """The page anew, in a browser that has kept these settings."""
    page.evaluate("(kept) => localStorage.setItem('tokensieve', kept)", json.dumps(kept))
    page.reload()
    expect(page.locator("#send")).to_be_enabled()


def ask(page: Page, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page: Page) -> None:
    expect(page.locator(".answer").last).to_have_attribute("aria-busy", "false")


def said(page: Page) -> str:
    """The last answer's text."""
    return page.locator(".answer > .text").last.inner_text()


def attach(page: Page, text: str | bytes, name: str = "notes.py") -> None:
    data = text if isinstance(text, bytes) else text.encode()
    page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": data}])


def drop(page: Page, text: str, name: str) -> None:
    transfer = page.evaluate_handle(
        "([text, name]) => { const all = new DataTransfer(); all.items.add(new File([text], name)); return all; }",
        [text, name],
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_hidden()


# answers as the server sends them, made up


def stream(*events: Any) -> str:
    return "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)


def chunk(kind: str = "content", text: str | None = None, ids: tuple[int, ...] = (), **more: Any) -> dict[str, Any]:
    delta = {} if text is None else {kind: text}
    return {"choices": [{"index": 0, "delta": delta, "token_ids": list(ids), "finish_reason": None}], **more}


def answers(page: Page, *events: Any, status: int = 200) -> None:
    """Every answer is this one, from now on."""
    kind = "text/event-stream" if status == 200 else "application/json"
    body = stream(*events) if status == 200 else json.dumps(events[0])
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, content_type=kind, body=body))


def looks(text: str, context: int) -> dict[str, Any]:
    """Three layers of three; the first read what it should, the last none of it. Positions are characters of `text`."""
    layer = {
        "read": 2,
        "selected": [0, 2],
        "attention": [0.2, 0.8],
        "dense": [0, 2],
        "dense_attention": [0.2, 0.7],
        "kept": 0.9,
    }
    worse = layer | {"dense": [0, 1], "dense_attention": [0.4, 0.35], "kept": 0.5}
    worst = layer | {
        "dense": [1],
        "read": 1,
        "selected": [0],
        "attention": [1.0],
        "dense_attention": [0.6],
        "kept": 0.123,
    }
    layers = [one | {"layer": i} for i, one in enumerate((layer, worse, worst))]
    told = {"model": "sparse", "text": text, "starts": list(range(context)), "context": context}
    return told | {"markers": [], "layers": layers}
