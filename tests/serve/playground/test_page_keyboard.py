"""The page in Chromium without a mouse: everything that a reader does is done by keys, on a desk and on a phone."""

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.support.browser import answered, answers, chunk, looks

pytest_plugins = ["tests.support.browser"]

NAME = "(({ ariaLabel, labels, textContent }) => ariaLabel || labels?.[0]?.textContent || textContent)"


def focused(page: Page) -> str:
    return page.evaluate(f"{NAME}(document.activeElement)").strip()


def press(page: Page, name: str, key: str = "Enter", by: str = "Tab") -> None:
    """Moves with Tab until the element of this name has the focus, and presses a key on it."""
    for _ in range(40):
        if focused(page) == name:
            return page.keyboard.press(key)
        page.keyboard.press(by)
    raise AssertionError(f"no key leads to {name}")


@pytest.mark.parametrize(("width", "colours"), [(1280, "light"), (390, "dark")])
def test_all_of_the_page_by_keys(page: Page, context, tmp_path: Path, width: int, colours: str) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=colours)
    for kind in ("mousedown", "pointerdown"):
        page.evaluate("(kind) => addEventListener(kind, () => (window.mouse = true), true)", kind)

    # a question is sent, and stopped
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    assert focused(page) == "Your question"
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    press(page, "Stop")
    expect(page.locator(".failure")).to_have_text("Stopped.")
    assert focused(page) == "Your question"
    page.unroute_all()

    # a document is added and removed, and asked about
    file = tmp_path / "notes.txt"
    file.write_text("some text")
    for times in range(2):
        with page.expect_file_chooser() as chooser:
            press(page, "Add document", by="Shift+Tab" if times else "Tab")
        chooser.value.set_files(file)
        expect(page.locator(".chip")).to_contain_text("3 tokens")
        if not times:
            press(page, "Remove notes.txt", by="Shift+Tab")
            expect(page.locator(".chip")).to_have_count(0)
            assert focused(page) == "Your question"
    answers(page, *(chunk(text=text, ids=(5,), prompt_token_ids=[1]) for text in ("One", " **two**")), "[DONE]")
    press(page, "Your question", "A", by="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_count(2)
    answered(page)

    # the answer is asked for again, copied and exported, the question changed
    press(page, "Retry", by="Shift+Tab")
    answered(page)
    assert focused(page) == "Your question"
    press(page, "Copy the answer", by="Shift+Tab")
    expect(page.get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "One **two**"
    press(page, "Edit the question", by="Shift+Tab")
    expect(page.locator("#question")).to_have_value("A")
    page.keyboard.type("gain")
    page.keyboard.press("Enter")
    expect(page.locator(".question").last).to_contain_text("Again")
    answered(page)
    with page.expect_download():
        press(page, "Export", by="Shift+Tab")

    # a setting: what is out of range says so
    press(page, "Settings")
    for _ in range(2):
        page.keyboard.press("Tab")  # from the system prompt, which the dialog begins with
        if page.evaluate("document.activeElement.name") == "temperature":
            break
    page.keyboard.press("Control+a")
    page.keyboard.type("9")
    expect(page.locator(".wrong:not(:empty)")).to_have_text(
        "Not used: this takes a number from 0 to 5, or nothing. 0 holds."
    )
    press(page, "Done")
    assert page.evaluate("document.activeElement.name") == "temperature"
    page.keyboard.press("Control+a")
    page.keyboard.type("1")
    press(page, "Done")
    expect(page.locator("#settings")).to_be_hidden()
    assert focused(page) == "Settings"

    # the lens: through words, layers and views, and back
    page.route("**/lens", lambda route: route.fulfill(json=looks("abcd", 4)))
    while page.evaluate("!document.activeElement.matches('.answer:last-of-type .token')"):
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator(".lens q")).to_have_text(" **two**")
    expect(page.locator("mark.at")).to_be_focused()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".detail")).to_contain_text("Token 0 “a”")
    press(page, "All", "ArrowRight", by="Shift+Tab")
    expect(page.locator(".summary")).to_contain_text("Layer 0 read 2 of 4 tokens")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".summary")).to_contain_text("Layer 1 read 2 of 4 tokens")
    press(page, "Read", "ArrowLeft", by="Shift+Tab")  # the last view follows the first
    expect(page.locator(".summary")).to_contain_text("in place of")
    press(page, "Next weaker", by="Tab")
    expect(page.locator(".detail")).to_contain_text("Token")
    page.keyboard.press("Escape")
    expect(page.locator("#lens")).to_be_hidden()
    assert focused(page) == "two"

    press(page, "New chat")
    press(page, "Try an example", by="Shift+Tab")
    expect(page.locator(".question")).to_contain_text("silver-harbor")
    assert focused(page) == "Your question"
    answered(page)
    assert page.evaluate("window.mouse") is None
