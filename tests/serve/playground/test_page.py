"""The page at `/` in Chromium, with the bundled sparse model: asking, stopping, documents, settings and failures."""

import base64
import re
from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import Page, expect

from tests.serve.playground.test_uploads import made
from tests.support import browser, servers
from tests.support.browser import LIMITS, answered, answers, ask, attach, chunk, looks, restart, said
from tokensieve.engine import EngineConfig

pytest_plugins = ["tests.support.browser"]

# asking


def test_an_answer_streams_and_is_counted(page: Page) -> None:
    grown = page.evaluate_handle(
        """() => { const seen = []; const log = document.getElementById("log");
        const count = () => seen.push(log.querySelectorAll(".token").length);
        new MutationObserver(count).observe(log, {childList: true, subtree: true});
        return seen; }"""
    )
    ask(page, "Who are you?")
    expect(page.locator("#stop")).to_be_visible()
    answered(page)
    assert said(page).startswith("I am the tokensieve base model")
    lengths = grown.json_value()
    assert len(set(lengths)) > 5 and lengths == sorted(lengths)  # it came in parts
    told = page.locator(".answer .usage").inner_text()
    assert re.fullmatch(r"\d+ tokens in the conversation · \d+ written · [\d.]+ tokens/s", told), told
    tokens = page.locator(".answer .token").count()
    assert tokens + 1 == int(re.search(r"(\d+) written", told)[1])  # the end's token has no text
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#send")).to_be_visible()


def test_a_conversation_and_a_new_one(page: Page) -> None:
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request.post_data_json))
    answers(page, chunk(text="One.", ids=(5,)), "[DONE]")
    ask(page, "Hello")
    answered(page)
    ask(page, "Thank you")
    answered(page)
    assert (
        page.locator(".answer button:visible", has_text="Retry").count() == 1
    )  # only the last one can be asked for again
    roles = [(m["role"], m["content"]) for m in sent[1]["messages"]]
    assert roles == [("user", "Hello"), ("assistant", "One."), ("user", "Thank you")]
    page.click("#new")
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Hi")
    answered(page)
    assert len(sent[2]["messages"]) == 1


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_and_retry(served, page: Page, by: str) -> None:
    service = served[1]
    restart(page, temperature=5, seed=4)
    ask(page, "Tell me everything.")
    expect(page.locator(".answer .token")).not_to_have_count(0)
    assert service.engine.scheduler.running
    if by == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    answered(page)
    servers.settled(service, 5)  # its pages are back, long before 400 tokens are written
    expect(page.locator(".answer .failure")).to_have_text("Stopped.")
    partly = said(page)
    assert partly and page.locator(".answer.failed").count() == 0
    page.click("#open-settings")
    page.fill("[name=max_tokens]", "12")
    page.click("#close-settings")
    page.click(".answer button >> text=Retry")
    answered(page)
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator(".question")).to_have_count(1)
    again = said(page)
    assert again.startswith(partly[:4]) or partly.startswith(again[:4])  # of the same seed
    expect(page.locator(".answer .failure")).to_have_text("Cut off: the answer reached its maximum length.")


def test_keys_of_the_question(page: Page) -> None:
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("one\ntwo")
    expect(page.locator(".question")).to_have_count(0)
    page.fill("#question", "   ")
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_count(0)


# everything is shown as text


def test_nothing_is_read_as_html(page: Page) -> None:
    bad = "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'>"
    parts = [
        chunk(text=None, ids=(), prompt_token_ids=[0, 1]),
        *(chunk(text=c, ids=(5,)) for c in re.findall(".{1,7}", bad)),
    ]
    answers(page, *parts, chunk("reasoning_content", bad, (6,)), "[DONE]")
    attach(page, bad, f"{bad}.txt"[:60].replace("/", ""))
    ask(page, bad)
    answered(page)
    assert said(page) == bad and page.locator(".question p").inner_text() == bad
    page.click(".reasoning summary")
    assert page.locator(".reasoning .text").inner_text() == bad
    page.route("**/lens", lambda route: route.fulfill(json=looks(bad, 3)))
    page.locator(".answer .token").first.click()
    expect(page.locator(".context")).to_contain_text("onerror")
    assert page.evaluate("window.hurt") is None
    assert page.locator("main script, main img, aside script, aside img").count() == 0


# documents


def test_a_pdf(page: Page) -> None:
    sent = []
    page.on("request", lambda request: request.method == "POST" and sent.append(request))
    answers(page, chunk(text="Yes.", ids=(5,)), "[DONE]")
    attach(page, made(b"BT /F1 12 Tf 72 700 Td (Good morning) Tj ET"), "letter.pdf")
    expect(page.locator(".chip")).to_contain_text("letter.pdf1 page, 6 tokens")
    ask(page, "Hi")
    answered(page)
    assert sent[-1].post_data_json["messages"] == [{"role": "user", "content": "Good morning\n\nHi"}]


def test_documents_that_are_none(page: Page) -> None:
    for data, name, words in (
        (b"\x89PNG\0\0", "picture.png", "picture.png is neither text nor a PDF. If it is text, save it as UTF-8."),
        (b"\xff\xfe\xfa", "strange.txt", "strange.txt is neither text nor a PDF."),
        (b"  \n", "empty.txt", "empty.txt is empty."),
        (b"%PDF-1.4 broken", "broken.pdf", "broken.pdf: The PDF is damaged"),
        (b"%PDF-" + bytes(2**20), "large.pdf", "large.pdf: That is more than the server accepts"),
    ):
        attach(page, data, name)
        expect(page.locator("#notice")).to_contain_text(words)
        expect(page.locator(".chip")).to_have_count(0)
    attach(page, "fine", "a.txt")
    expect(page.locator(".chip")).to_have_count(1)
    expect(page.locator("#notice")).to_be_hidden()
    page.click("button[aria-label='Remove a.txt']")
    expect(page.locator(".chip")).to_have_count(0)


# failures


def error(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


ENDS: dict[str, tuple[Callable[[Page], None], str]] = {
    "busy": (lambda page: answers(page, error("8 wait"), status=429), "The server is busy: 8 wait."),
    "failed": (lambda page: answers(page, error("the engine failed"), status=500), "The engine failed."),
    "key": (lambda page: answers(page, error("a key"), status=401), "The server requires a key."),
    "proxy": (lambda page: answers(page, "<html>", status=502), "The server answered with status 502."),
    "gone": (lambda page: page.route("**/v1/chat/**", lambda route: route.abort()), "The server cannot be reached."),
    "cut": (lambda page: answers(page, chunk(text="so far", ids=(5,))), "The answer was cut off."),
    "midway": (lambda page: answers(page, chunk(text="so far", ids=(5,)), error("it broke")), "It broke."),
}


SELDOM = ("failed", "key", "proxy", "midway")  # tested with the slow tests
CASES = [pytest.param(*end, id=name, marks=[pytest.mark.slow] * (name in SELDOM)) for name, end in ENDS.items()]


@pytest.mark.parametrize(("break_it", "words"), CASES)
def test_an_error_is_a_line_and_nothing_is_lost(page: Page, break_it: Callable[[Page], None], words: str) -> None:
    break_it(page)
    attach(page, "some text", "a.txt")
    expect(page.locator(".chip")).to_have_count(1)
    ask(page, "Hello")
    answered(page)
    expect(page.locator(".answer.failed .failure")).to_contain_text(words)
    page.unroute_all()
    answers(page, chunk(text="Here.", ids=(5,)), "[DONE]")
    with page.expect_request("**/v1/chat/completions") as again:
        page.click(".answer button >> text=Retry")
    assert again.value.post_data_json["messages"] == [{"role": "user", "content": "some text\n\nHello"}]
    answered(page)
    expect(page.locator(".answer.failed")).to_have_count(0)
    assert said(page) == "Here."


def test_a_document_that_is_too_long(page: Page) -> None:
    attach(page, browser.document(12_000))
    expect(page.locator(".chip")).to_have_count(1)
    ask(page, "What is this?")
    answered(page)
    expect(page.locator(".failed .failure")).to_contain_text(
        "Too long: this model's maximum context length is 3000 tokens, and the prompt has 3"
    )


def test_a_server_that_is_down_at_first(served, context) -> None:
    page = context.new_page()
    page.route("**/v1/models", lambda route: route.abort())
    page.goto(served[0])
    expect(page.locator("#notice")).to_contain_text("The server cannot be reached.")
    expect(page.locator("#send")).to_be_disabled()
    page.unroute_all()
    page.click("#notice button")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#notice")).to_be_hidden()


# settings and appearance


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.select_option("#model", "sparse:dense")
    page.click("#open-settings")
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.9",
        "max_tokens": "5",
        "seed": "7",
    }.items():
        page.fill(f"#settings [name={name}]", value)
    page.check("[name=thinking]")
    page.fill("[name=temperature]", "-3")  # out of its range: the last one holds
    expect(page.locator("[name=temperature]")).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Hi")
    body = asked.value.post_data_json
    assert body["model"] == "sparse:dense" and body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body | {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "seed": 7} == body
    assert body["chat_template_kwargs"] == {"thinking": True}
    expect(page.locator(".failure")).to_contain_text("knows no thinking")
    page.click("#open-settings")
    page.click("#reset-settings")
    page.click("#close-settings")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "Hi")
    usual = {"model", "messages", "stream", "stream_options", "return_token_ids", "return_progress", "temperature"}
    assert set(asked.value.post_data_json) == usual and asked.value.post_data_json["model"] == "sparse:dense"


def test_what_the_browser_kept_may_be_nonsense(served, context) -> None:
    page = context.new_page()
    for kept in ("{", "null", "7", '{"temperature": "hot", "model": 5, "theme": {}, "seed": []}'):
        page.goto(served[0])
        page.evaluate("(kept) => localStorage.setItem('tokensieve', kept)", kept)
        page.reload()
        expect(page.locator("#send")).to_be_enabled()
        assert page.input_value("#model") == "sparse"


def test_dark(page: Page) -> None:
    def light() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    assert light() > 600
    page.emulate_media(color_scheme="dark")
    assert light() < 150
    page.click("#open-settings")
    page.click("#settings label:has-text('Light')")
    assert light() > 600
    page.emulate_media(color_scheme="light")
    page.click("#settings label:has-text('Dark')")
    assert light() < 150
    page.reload()
    assert light() < 150


def test_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 375, "height": 700})

    def overflows() -> list[str]:
        return page.evaluate(
            """() => "html body header main .log .composer .lens .context dialog".split(" ").filter((name) => {
                const e = document.querySelector(name);
                return e.scrollWidth > e.clientWidth || e.getBoundingClientRect().right > 375.5;
            })"""
        )

    assert overflows() == []
    long = "supercalifragilistic" * 20
    answers(page, chunk(text=long, ids=(5,), prompt_token_ids=[1]), "[DONE]")
    attach(page, long, f"{long[:80]}.txt")
    expect(page.locator(".chip")).to_have_count(1)
    assert overflows() == []
    ask(page, long)
    answered(page)
    assert overflows() == []
    page.route("**/lens", lambda route: route.fulfill(json=looks(long, 4)))
    page.click(".answer .token")
    expect(page.locator(".lens mark")).to_have_count(2)
    assert overflows() == [] and page.locator("main").is_hidden()
    page.keyboard.press("Escape")
    expect(page.locator("main")).to_be_visible()
    page.click("#open-settings")
    assert overflows() == []


def test_whatever_can_be_done_has_a_name_and_shows_its_focus(page: Page) -> None:
    seen = []
    page.focus("#model")
    for _ in range(8):
        seen.append(page.evaluate("document.activeElement.id"))
        outline = "(e) => getComputedStyle(e).outlineStyle + getComputedStyle(e.closest('.field') ?? e).borderColor"
        assert page.evaluate(f"({outline})(document.activeElement)")
        page.keyboard.press("Tab")
    assert {"model", "new", "open-settings", "question", "attach", "send"} <= set(seen)
    unnamed = "input:not([hidden]), textarea, select, button"
    names = page.locator(unnamed).evaluate_all(
        "all => all.filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).length"
    )
    assert names == 0


# the files


def test_its_files_and_no_others(served) -> None:
    at = served[0]
    whole = httpx.get(at)
    assert whole.headers["content-type"] == "text/html; charset=utf-8"
    linked = re.findall(r'(?:href|src)="(page/[^"]+)"', whole.text)
    assert len(linked) == 3
    assert "MIT License" in httpx.get(f"{at}/page/lezer-markdown.js").text[:2000]
    for path in ("", *linked):
        answer = httpx.get(f"{at}/{path}")
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert (
            answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
        )
    for name in (
        "__init__.py",
        "../api.py",
        "..%2fapi.py",
        "%2e%2e/gate.py",
        "nothing.js",
        "",
        ".",
        "/etc/passwd",
        "index.html%00",
    ):
        assert httpx.get(f"{at}/page/{name}").status_code == 404, name
    assert "/documents" not in httpx.get(at + "/openapi.json").json()["paths"]


def test_a_key(loaded, chromium) -> None:
    with servers.running(loaded, EngineConfig(pages=64, running=2), **LIMITS, keys=("first-key", "sesame:2")) as (
        at,
        _,
    ):
        asked = httpx.get(at)
        assert asked.status_code == 401 and asked.headers["www-authenticate"].startswith('Basic realm="tokensieve"')
        for path in ("/page/style.css", "/documents", "/lens"):
            assert httpx.post(at + path).status_code == 401
        for given in ("first-key", "u:first", "u:", "first-key:", ":"):
            value = base64.b64encode(given.encode()).decode()
            assert httpx.get(at, headers={"Authorization": f"Basic {value}"}).status_code == 401, given
        for bad in ("", "Basic", "Basic !", "Basic \u00e4", "Digest first-key", "first-key"):
            assert httpx.get(at, headers={"Authorization": bad.encode("latin1")}).status_code == 401, bad
        for key in ("first-key", "sesame:2"):
            assert httpx.get(at, auth=("anybody", key)).status_code == 200
        with chromium.new_context(http_credentials={"username": "me", "password": "sesame:2"}) as context:
            page = context.new_page()
            page.goto(at)
            ask(page, "Hello")
            answered(page)
            assert said(page)
        with chromium.new_context(http_credentials={"username": "me", "password": "wrong"}) as context:
            assert context.new_page().goto(at).status == 401


def test_pages_of_other_sites_may_not_ask(served) -> None:
    asked = {"model": "sparse", "prompt": "a", "max_tokens": 1}
    for path, body in (("/v1/completions", asked), ("/lens", {}), ("/documents", {})):
        refused = httpx.post(served[0] + path, json=body, headers={"Sec-Fetch-Site": "cross-site"})
        assert refused.status_code == 403 and "other sites" in refused.json()["error"]["message"]
    for site in ("same-origin", "none"):
        answer = httpx.post(served[0] + "/v1/completions", json=asked, headers={"Sec-Fetch-Site": site}, timeout=30)
        assert answer.status_code == 200
    # a link from elsewhere may lead here
    assert httpx.get(served[0], headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_a_question_before_the_models_are_known(served, context) -> None:
    page, held = context.new_page(), []
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(served[0])
    ask(page, "Hello")
    page.wait_for_timeout(100)
    assert page.input_value("#question") == "Hello"
    held[0].continue_()
    answered(page)
    assert said(page) and not page.input_value("#question")
