"""The page in Chromium: a conversation is kept, copied, edited and exported; documents are measured."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import answered, answers, ask, attach, chunk, looks, restart, said

pytest_plugins = ["tests.support.browser"]


def spoken(page: Page, *texts: str) -> None:
    """A question and an answer for each text, which is the answer's."""
    for number, text in enumerate(texts, 1):
        page.unroute_all()
        answers(page, chunk(text=text, ids=(5,), prompt_token_ids=list(range(10 * number))), "[DONE]")
        ask(page, f"Question {number}")
        expect(page.locator(".answer")).to_have_count(number)
        answered(page)


def reload(page: Page) -> list[str]:
    """Reloads the page. Returns the kinds of dialogs that the browser showed."""
    dialogs = []

    def seen(dialog) -> None:
        dialogs.append(dialog.type)
        dialog.accept()

    page.on("dialog", seen)
    page.reload()
    page.remove_listener("dialog", seen)
    expect(page.locator("#send")).to_be_enabled()
    return dialogs


def test_a_reload_warns_or_keeps_the_conversation(page: Page) -> None:
    assert not page.is_checked("#keep") and reload(page) == []
    attach(page, "some text", "a.txt")
    expect(page.locator(".chip")).to_contain_text("3 tokens")
    spoken(page, "One.", "Two.")
    assert page.evaluate("localStorage.getItem('tokensieve.conversation')") is None
    assert reload(page) == ["beforeunload"]
    expect(page.locator(".answer")).to_have_count(0)

    page.focus("#keep")
    page.keyboard.press("Space")
    attach(page, "some text", "a.txt")
    expect(page.locator(".chip")).to_contain_text("3 tokens")
    spoken(page, "One.", "Two.")
    assert reload(page) == []
    assert page.locator(".answer > .text").all_inner_texts() == ["One.", "Two."]
    assert page.locator(".answer button:visible").all_inner_texts() == ["Copy", "Copy", "Retry"]
    expect(page.locator(".question").first).to_contain_text("a.txt")
    page.route("**/lens", lambda route: route.fulfill(json=looks("abcd", 4)))
    with page.expect_request("**/lens") as asked:
        page.locator(".answer .token").last.click()
    assert asked.value.post_data_json == {"model": "sparse", "token_ids": list(range(20))}
    page.keyboard.press("Escape")
    page.uncheck("#keep")
    assert page.evaluate("localStorage.getItem('tokensieve.conversation')") is None


def test_too_much_to_keep_is_said(page: Page) -> None:
    page.check("#keep")
    page.evaluate("localStorage.setItem('much', 'x'.repeat(5 * 2 ** 20 - 2000))")
    spoken(page, "word " * 1000)
    expect(page.locator("#notice")).to_contain_text("too large for the browser to keep. Export it")
    page.evaluate("localStorage.removeItem('much')")
    assert reload(page) == ["beforeunload"]


def test_a_kept_conversation_may_be_nonsense(page: Page) -> None:
    for kept in ("{", "null", "7", "[null]", '[{"text": "a", "documents": [{}], "answer": {}}]'):
        page.evaluate("(kept) => localStorage.setItem('tokensieve.conversation', kept)", kept)
        restart(page, keep=True)
        expect(page.locator("#welcome")).to_be_visible()


def test_a_question_is_edited(page: Page) -> None:
    attach(page, "some text", "a.txt")
    expect(page.locator(".chip")).to_contain_text("3 tokens")
    spoken(page, "One.", "Two.")
    edit = page.get_by_role("button", name="Edit the question").first
    edit.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_have_value("Question 1")
    expect(page.locator(".chip")).to_contain_text("a.txt")
    expect(page.locator("#room")).to_have_text("3 of 10,240 tokens")  # of the document, not of what it replaces
    page.click("#keep-question")
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator(".answer")).to_have_count(2)  # nothing is lost

    edit.click()
    with page.expect_request("**/v1/chat/**") as asked:
        ask(page, "Better")
    assert [m["content"] for m in asked.value.post_data_json["messages"]] == ["some text\n\nBetter"]
    answered(page)
    expect(page.locator(".answer")).to_have_count(1)
    expect(page.locator("#editing")).to_be_hidden()


def test_copy_and_export(page: Page, context, tmp_path: Path) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(page.locator("#export")).to_be_disabled()
    attach(page, "```\ncode\n```\n", "a.md")
    expect(page.locator(".chip")).to_have_count(1)
    spoken(page, "One **bold**.")
    copy = page.get_by_role("button", name="Copy the answer")
    copy.click()
    expect(copy).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "One **bold**."
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as without TLS
    page.evaluate("document.execCommand = (name) => (window.copied = name + getSelection().toString())")
    copy.click()
    page.wait_for_function("window.copied === 'copyOne **bold**.'")
    with page.expect_download() as saved:
        page.click("#export")
    saved.value.save_as(tmp_path / "saved.md")
    assert saved.value.suggested_filename == "conversation.md"
    assert (tmp_path / "saved.md").read_text() == (
        "## Question\n\nDocument: a.md\n\n````\n```\ncode\n```\n````\n\nQuestion 1\n\n"
        "## Answer of sparse\n\nOne **bold**.\n"
    )


def test_only_reasoning_is_explained(page: Page) -> None:
    answers(page, chunk("reasoning_content", "Hm.", (5,)), "[DONE]")
    ask(page, "?")
    answered(page)
    expect(page.locator(".reasoning .text")).to_be_visible()
    expect(page.locator(".answer .failure")).to_contain_text("it wrote only reasoning. Ask again, or turn thinking off")


def test_the_wait_is_counted(page: Page) -> None:
    page.clock.install()
    attach(page, "some text", "a.txt")
    expect(page.locator(".chip")).to_contain_text("3 tokens")
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    ask(page, "?")
    expect(page.locator(".answer")).to_have_count(1)
    page.clock.run_for(7100)
    expect(page.locator(".answer .wait")).to_have_text("Reading 3 tokens… 7 s")
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".answer .wait")).to_have_count(0)


def test_the_time_left_is_told(page: Page) -> None:
    page.clock.install(time=0)
    page.clock.pause_at(3_600)
    make = """async () => { const { Answer } = await import("./page/reply.js");
        window.answer = new Answer("sparse", 0, () => {}); document.body.append(window.answer.root); }"""
    page.evaluate(make)
    for processed, told in ((512, ""), (10_752, ", about 10 s left"), (15_872, ", about 7 s left")):
        page.evaluate("(processed) => window.answer.progress({ total: 20_992, processed })", processed)
        expect(page.locator(".wait")).to_have_text(f"Reading: {processed:,} of 20,992 tokens{told}")
        page.clock.run_for(10_000)


def test_words_can_be_chosen_is_always_said(page: Page) -> None:
    expect(page.locator("#words")).to_be_hidden()
    spoken(page, "One.", "Two.")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        expect(page.locator("#words")).to_be_visible()


def test_the_example_is_asked_by_one_key(page: Page) -> None:
    answers(page, "[DONE]")
    page.focus("#example")
    with page.expect_request("**/v1/chat/**") as asked:
        page.keyboard.press("Enter")
    content = asked.value.post_data_json["messages"][-1]["content"]
    assert content.count("482913") == 1 and content.endswith("What is the access code of silver-harbor?")
    answered(page)


@pytest.mark.slow
def test_the_example_is_answered(page: Page) -> None:
    page.click("#example")
    expect(page.locator(".answer")).to_have_count(1)
    answered(page)
    assert said(page) == "silver-harbor: 482913"


ENCODED = {
    "UTF-8": ("Größe 漢".encode(), "11 tokens"),
    "UTF-8 with a mark": ("\ufeffGröße 漢".encode(), "tokens"),
    "UTF-16LE": (b"\xff\xfe" + "Größe 漢".encode("utf-16-le"), "read as UTF-16LE"),
    "UTF-16BE": (b"\xfe\xff" + "Größe 漢".encode("utf-16-be"), "read as UTF-16BE"),
    "Latin-1": ("Größe µ".encode("latin1"), "read as Latin-1"),
}


def test_encodings_of_documents(page: Page) -> None:
    answers(page, "[DONE]")
    for data, note in ENCODED.values():
        attach(page, data, "a.txt")
        expect(page.locator(".chip")).to_contain_text(note)
        expect(page.locator("#send")).to_be_enabled()
        with page.expect_request("**/v1/chat/**") as asked:
            ask(page, "")
        assert asked.value.post_data_json["messages"][-1]["content"] in ("Größe 漢", "Größe µ")
        answered(page)


def test_too_long_is_said_before_sending(page: Page) -> None:
    attach(page, "a b c d\n" * 5000, "long.txt")
    expect(page.locator("#room")).to_have_class("room full")
    ask(page, "Hi")
    expect(page.locator("#notice")).to_contain_text("do not fit into 10,240. Remove a document.")
    expect(page.locator("#question")).to_have_value("Hi")
    expect(page.locator(".answer")).to_have_count(0)
    expect(page.locator(".chip")).to_have_count(1)


def test_a_setting_that_is_not_used_says_so(page: Page) -> None:
    page.click("#open-settings")
    page.fill("[name=temperature]", "9")
    wrong = page.locator("label:has([name=temperature]) .wrong")
    expect(wrong).to_have_text("Not used: this takes a number from 0 to 5, or nothing. 0 holds.")
    page.fill("[name=max_tokens]", "2.5")
    whole = page.locator("label:has([name=max_tokens]) .wrong")
    expect(whole).to_have_text("Not used: this takes a whole number of at least 1, or nothing. The default holds.")
    page.click("#close-settings")
    expect(page.locator("#settings")).to_be_visible()
    expect(page.locator("[name=temperature]")).to_be_focused()
    page.fill("[name=temperature]", "1")
    page.fill("[name=max_tokens]", "")
    expect(page.locator(".wrong:not(:empty)")).to_have_count(0)
    page.click("#close-settings")
    expect(page.locator("#settings")).to_be_hidden()
