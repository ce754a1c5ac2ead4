"""The page in Chromium on a desk and on a phone, light and dark: every word can be read, and nothing runs out of it."""

from typing import Any

from playwright.sync_api import Page, expect

from tests.serve.playground.test_page_markdown import WRITTEN
from tests.support.browser import answered, answers, ask, attach, chunk, looks

pytest_plugins = ["tests.support.browser"]

# WCAG 2's contrast of each visible text with what is painted below it, if it is under 4.5
FAINT = """() => {
    const parse = (colour) => {
        const [r, g, b, alpha = 1] = colour.match(/[\\d.]+/g).map(Number);
        return [...[r, g, b].map((value) => (colour.startsWith("color(") ? 255 * value : value)), alpha];
    };
    const over = (colour, below) => below.map((value, i) => colour[i] * colour[3] + value * (1 - colour[3]));
    const linear = (value) => (value <= 10.3 ? value / 3295 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
    const faint = [];
    for (const one of document.querySelectorAll("body *")) {
        const text = [...one.childNodes].map((node) => (node instanceof Text ? node.data : "")).join("").trim();
        if (!text || !one.checkVisibility() || one.closest(":disabled, .unseen")) continue;
        const boxes = [];
        for (let box = one; box; box = box.parentElement) boxes.unshift(getComputedStyle(box));
        const below = boxes.reduce((under, box) => over(parse(box.backgroundColor), under), [255, 255, 255]);
        const both = [light(below), light(over(parse(boxes.at(-1).color), below))];
        const contrast = Math.max(...both) / Math.min(...both);
        if (contrast < 4.5) faint.push(`${one.tagName}.${one.className} "${text.slice(0, 20)}" ${contrast.toFixed(2)}`);
    }
    return faint;
}"""
# What reaches out of the window, or is wider than its place. A table may scroll, and a long name is cut with dots.
WIDE = """() => [...document.querySelectorAll("body *")].filter((one) => {
    if (!one.checkVisibility() || one.closest(".unseen, legend, table, .lens h2, .chip b")) return false;
    const { left, right } = one.getBoundingClientRect();
    const isCut = getComputedStyle(one).overflowX !== "visible" && one.scrollWidth > one.clientWidth + 1;
    return left < -0.5 || right > innerWidth + 0.5 || isCut;
}).map((one) => `${one.tagName}.${one.className}`)"""


def seen(page: Page, state: str) -> list[Any]:
    """What is wrong with the page as it stands, in both sizes and both colours."""
    wrong = []
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        for colours in ("light", "dark"):
            page.emulate_media(color_scheme=colours)
            wrong += [(state, width, colours, one) for one in (*page.evaluate(FAINT), *page.evaluate(WIDE))]
    return wrong


def test_every_word_can_be_read_and_nothing_runs_out(page: Page) -> None:
    wrong = seen(page, "welcome")
    long = "supercalifragilistic" * 12
    attach(page, long, f"{long[:60]}.txt")
    expect(page.locator(".chip")).to_contain_text("tokens")
    thought = chunk("reasoning_content", "Hm. ", (6,), prompt_token_ids=[1])
    table = "".join(f"| {long[:30]} " for _ in range(4)) + "|"
    text = f"{WRITTEN}\n\n{table}\n{'|---' * 4}|\n{table}\n\n{long} [{long}](https://a.example)\n"
    answers(page, thought, chunk(text=text, ids=(5,)), {"error": {"message": "it broke", "code": None}})
    ask(page, f"{long} why?")
    answered(page)
    page.click(".reasoning summary")
    page.click(".question summary")
    attach(page, b"\x89PNG\0\0", "picture.png")
    expect(page.locator("#notice")).to_be_visible()
    wrong += seen(page, "answer")
    page.get_by_role("button", name="Markup").click()
    page.get_by_role("button", name="Edit the question").click()
    wrong += seen(page, "markup, editing")
    page.click("#open-settings")
    page.fill("[name=temperature]", "9")
    wrong += seen(page, "settings")
    page.fill("[name=temperature]", "1")
    page.keyboard.press("Escape")
    page.route("**/lens", lambda route: route.fulfill(json=looks(long, 240) | {"markers": [2, 5]}))
    page.set_viewport_size({"width": 1280, "height": 800})
    page.locator(".answer h3 .token").first.click()
    expect(page.locator(".lens mark")).to_have_count(2)
    page.locator(".guide").evaluate("(guide) => (guide.open = true)")
    page.get_by_label("chat markers").check()
    wrong += seen(page, "lens")
    page.locator(".lens label", has_text="Difference").click()
    wrong += seen(page, "difference")
    assert wrong == [], "\n".join(map(str, wrong))
