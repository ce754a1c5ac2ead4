"""The page's lens in Chromium shows exactly what the server sends."""

import json
import re
import time
from typing import Any

from playwright.sync_api import Page, Route, expect

from tests.support import browser
from tests.support.browser import answered, answers, ask, chunk, drop, looks, said

pytest_plugins = ["tests.support.browser"]


WAITING = """() => {
    const told = [];
    const look = () => {
        const bar = document.querySelector("progress:not([hidden])");
        if (bar && told.at(-1)?.[1] !== bar.position) told.push([bar.parentElement.textContent, bar.position]);
    };
    const what = {childList: true, subtree: true, attributes: true};
    new MutationObserver(look).observe(document.getElementById("log"), what);
    return told;
}"""


def test_a_document_is_asked_about_and_seen_through_the_lens(page: Page) -> None:
    """From the document to the lens: the answer's digits were read where the document has them."""
    drop(page, browser.document(6000), "textwrap.py")
    expect(page.locator(".chip")).to_contain_text("textwrap.py")
    told = page.evaluate_handle(WAITING)
    ask(page, browser.QUESTION)
    expect(page.locator(".chip")).to_have_count(0)
    answered(page)
    progress, total = told.json_value(), page.locator(".usage").inner_text().split()[0]
    shares = [share for _, share in progress]
    assert len(progress) > 2 and shares == sorted(shares) and 0 < shares[0] < shares[-1] < 1
    assert all(re.fullmatch(rf"Reading: [\d,]+ of {total} tokens(, about \d+ s left)?", line) for line, _ in progress)
    assert "left" in progress[-1][0]
    expect(page.locator(".answer progress")).to_have_count(0)
    assert said(page) == browser.ANSWER
    page.click(".question summary")
    assert "access code of silver-harbor is 482913" in page.locator(".question pre").inner_text()

    with page.expect_response("**/lens") as response:
        page.locator(".answer .token", has_text="4").first.click()
    told = response.value.json()
    expect(page.locator(".lens mark")).not_to_have_count(0)
    whole = page.locator(".context").evaluate("e => e.textContent")
    assert whole == told["text"] + "4"  # with the chosen token at its end

    # at first: all layers together, at the strongest distant token, which is the code itself
    read = len(told["layers"][0]["selected"])
    union = {p for layer in told["layers"] for p in layer["selected"]}
    kept = sum(layer["kept"] for layer in told["layers"]) / 8
    assert page.locator(".lens mark").count() == len(union)
    expect(page.locator(".summary")).to_have_text(
        f"Each layer read {read} of {told['context']:,} tokens; {len(union):,} were read by at least one layer. "
        f"On average, a layer's {read} would hold {100 * kept:.1f}% of the attention of a model that reads everything."
    )
    code = told["text"].index("482913.")
    assert page.locator("mark.at").get_attribute("data-position") == str(told["starts"].index(code))
    assert page.evaluate("document.activeElement.matches('mark.at')")

    # all numbers of a layer are the server's
    for layer in told["layers"][1::3]:
        page.locator(".choices fieldset").last.locator("label").nth(1 + layer["layer"]).click()
        expect(page.locator(".summary")).to_contain_text(
            f"Layer {layer['layer']} read {read} of {told['context']:,} tokens. "
            f"They would hold {100 * layer['kept']:.1f}% of the attention of a model that reads everything."
        )
        marks = page.locator(".lens mark").evaluate_all("all => all.map((m) => Number(m.dataset.position))")
        assert marks == layer["selected"]
        everyday = {0, *told["markers"], *range(told["context"] - 8, told["context"])}
        others = [i for i in range(read) if layer["selected"][i] not in everyday]
        strongest = max(others, key=lambda i: layer["attention"][i])
        page.click("text=Go to strongest")
        share = float(f"{100 * layer['attention'][strongest]:.3g}")
        expect(page.locator(".detail")).to_contain_text(f"{share:g}% of layer {layer['layer']}'s attention")
    page.click(".lens label >> text=Dense would read")
    marks = page.locator(".lens mark").evaluate_all("all => all.map((m) => Number(m.dataset.position))")
    assert marks == told["layers"][-1]["dense"]
    page.click(".lens label >> text=Difference")
    marks = page.locator(".lens mark").evaluate_all("all => all.map((m) => Number(m.dataset.position))")
    assert marks == sorted(set(told["layers"][-1]["dense"]) ^ set(told["layers"][-1]["selected"]))


def test_the_lens_by_keyboard_alone(page: Page) -> None:
    asked = []

    def lens(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(json=looks("🙂é𝄞z", 4))

    page.route("**/lens", lens)
    answers(
        page,
        chunk(text=None, prompt_token_ids=[10, 11]),
        chunk(text="one", ids=(20,)),
        chunk(text=None, ids=(21,)),  # half a character
        chunk(text=" two", ids=(22,)),
        chunk(text=" three", ids=(23,)),
        "[DONE]",
    )
    ask(page, "?")
    answered(page)
    page.keyboard.press("Shift+Tab")
    while page.evaluate("document.activeElement.className") != "token":
        page.keyboard.press("Shift+Tab")
    for key, word in (
        ("ArrowRight", " two"),
        ("ArrowRight", " three"),
        ("Home", "one"),
        ("End", " three"),
        ("ArrowLeft", " two"),
    ):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == word
    page.keyboard.press("Enter")
    expect(page.locator(".lens mark")).to_have_count(2)
    assert asked == [{"model": "sparse", "token_ids": [10, 11, 20]}]  # up to the first token of what was chosen

    # characters outside of the first plane are two units of a JavaScript string
    assert page.locator(".lens mark").all_inner_texts() == ["🙂", "𝄞"]
    assert page.locator(".context").evaluate("e => e.textContent") == "🙂é𝄞z two"
    assert page.evaluate("document.activeElement.textContent") == "𝄞"
    expect(page.locator(".detail")).to_have_text(
        "Token 2 “𝄞”: 53.3% of the attention, read by 2 of 3 layers; reading everything would give it at least 23.3%."
    )
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".detail")).to_contain_text("Token 0 “🙂”: 46.7% of the attention, read by 3 of 3 layers; ")
    expect(page.locator(".detail")).to_contain_text("reading everything would give it at least 20%.")
    page.keyboard.press("Escape")
    expect(page.locator("#lens")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == " two"
    page.keyboard.press("ArrowRight")
    with page.expect_response("**/lens"):
        page.keyboard.press("Space")
    expect(page.locator("#lens")).to_be_visible()
    assert asked[1]["token_ids"] == [10, 11, 20, 21, 22]


def test_views_of_the_lens(page: Page) -> None:
    page.route("**/lens", lambda route: route.fulfill(json=looks("abcd", 4)))
    answers(page, chunk(text="x", ids=(20,), prompt_token_ids=[1]), "[DONE]")
    ask(page, "?")
    answered(page)
    page.click(".answer .token")

    def see(view: str, layer: str) -> tuple[list[str], str]:
        page.click(f".lens label >> text={view}")
        page.locator(".choices fieldset").last.get_by_text(layer, exact=True).click()
        kinds = "all => all.map((m) => m.textContent + ['extra', 'missed'].filter((k) => m.classList.contains(k)))"
        return page.locator(".lens mark").evaluate_all(kinds), page.locator(".summary").inner_text()

    hold = "They would hold 90.0% of the attention of a model that reads everything."
    assert see("Read", "0") == (["a", "c"], f"Layer 0 read 2 of 4 tokens. {hold}")
    expect(page.locator(".detail")).to_have_text(
        "Token 2 “c”: 80% of layer 0's attention; reading everything would give it 70%."
    )
    would = "would get most attention if everything were read."
    assert see("Difference", "0") == ([], f"Layer 0 read exactly the tokens that {would}")
    assert page.locator(".steps button:enabled").count() == 0
    different = f"Layer 1 read 1 token in place of 1 token that {would}"
    assert see("Difference", "1") == (["bmissed", "cextra"], different)
    page.click("text=Go to strongest")
    expect(page.locator(".detail")).to_have_text(
        "Token 2 “c”: 80% of layer 1's attention; reading everything would not put it among the strongest."
    )
    page.click("text=Next weaker")
    expect(page.locator(".detail")).to_have_text(
        "Token 1 “b”: not read by layer 1; reading everything would give it 35%."
    )
    assert see("Difference", "All")[0] == ["aextra", "bmissed", "cextra"]
    unread = "Token 1 “b”: not read by any layer; reading everything would give it at least 31.7%."
    expect(page.locator(".detail")).to_have_text(unread)
    assert page.locator(".colours > :visible").all_inner_texts() == ["token you chose", "described at the bottom"]
    chosen = "The 1 of 4 tokens that would get most attention in layer 2 if everything were read."
    assert see("Dense would read", "2") == (["b"], chosen)
    together = "in each layer if everything were read; 3 are among them in at least one layer."
    assert see("Dense would read", "All")[1] == f"The 2 of 4 tokens that would get most attention {together}"
    see("Read", "All")
    expect(page.locator(".caption")).to_contain_text("The whole conversation, from start to end; the grey part")
    box = page.locator(".strip").bounding_box()
    page.mouse.click(box["x"] + 1, box["y"] + 5)
    expect(page.locator(".detail")).to_contain_text("Token 0 “a”")


def first_look(page: Page, **more: Any) -> None:
    """The lens, opened on 40 characters of which a marker and a neighbour got most attention, and "k" most of the rest.

    more: fields of the only layer.
    """
    text = "".join(chr(97 + i % 26) for i in range(40))
    attention = [0.3, 0.05, 0.2, 0.01, 0.4]
    layer = {"layer": 7, "read": 5, "selected": [0, 10, 20, 25, 38], "attention": attention, "kept": 0.732}
    layer |= {"dense": layer["selected"], "dense_attention": attention} | more
    told = looks(text, 40) | {"markers": [20], "layers": [layer]}
    page.route("**/lens", lambda route: route.fulfill(json=told))
    answers(page, chunk(text="x", ids=(20,), prompt_token_ids=[1]), "[DONE]")
    ask(page, "?")
    answered(page)
    page.click(".answer .token")
    expect(page.locator(".lens mark")).to_have_count(5)


def test_the_first_look_leaves_out_what_every_token_reads(page: Page) -> None:
    """The begin, markers of the template and the last tokens do not hide what the answer was read from."""
    first_look(page)
    expect(page.locator(".lead")).to_have_text(
        "To write “x”, the model looked most at abcdefghijklmnopqrst 30 tokens back, which got 5% of the "
        "attention. Attention is how much each token counts; it adds up to 100%. Dotted tokens are set aside."
    )
    expect(page.locator(".lead b")).to_have_text("k")
    assert page.locator("mark.at").inner_text() == "k"
    assert page.locator("mark.a9").all_inner_texts() == ["k"]  # the scale is of what is coloured
    assert page.locator("mark.aside").all_inner_texts() == ["a", "u", "m"]
    assert page.locator(".context .marker").all_inner_texts() == ["u"]
    assert page.locator(".also label").all_inner_texts() == ["chat markers, 50.0%", "last 8 tokens, 40.0%"]
    # a longer line is cut, and says so
    around = """async () => { const { ContextText } = await import("./page/context.js");
        const text = new ContextText(document.createElement("p"));
        text.load({ text: "ab\\ncdefghi", starts: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], markers: [] }, "");
        return [4, 6, 9].map((at) => Object.values(text.around(at, 2))); }"""
    assert page.evaluate(around) == [["c", "ef…"], ["…de", "gh…"], ["…gh", ""]]
    page.get_by_label("last 8 tokens").focus()
    page.keyboard.press("Space")
    assert page.locator("mark.a9").all_inner_texts() == ["m"]
    expect(page.locator(".lead b")).to_have_text("m")


def test_the_lens_explains_itself_without_a_mouse(page: Page) -> None:
    first_look(page)
    guide = page.locator(".guide")
    expect(guide).to_have_attribute("open", "")
    for words in ("Grey text was not read", "picks the 5 that seem to matter", "73.2% (layer 7)", "the last 8 tokens"):
        expect(guide).to_contain_text(words)
    expect(page.get_by_role("radio", name="Layer 7, holds 73.2% of dense attention")).to_have_count(1)
    for width, height in ((1280, 600), (390, 700)):  # opened, it leaves room for the context
        page.set_viewport_size({"width": width, "height": height})
        assert page.locator(".context").bounding_box()["height"] >= 140
    page.set_viewport_size({"width": 1280, "height": 800})
    guide.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(guide.locator("li").first).to_be_hidden()
    page.keyboard.press("Escape")
    page.click(".answer .token")  # it stays closed
    expect(page.locator(".lead b")).to_have_text("k")
    expect(guide.locator("li").first).to_be_hidden()


def test_a_long_context_stays_smooth(page: Page) -> None:
    """Dense attention reads everything: here 32768 tokens in each of four layers."""
    tokens = 32768
    weights = [1 / (i + 1) for i in range(tokens)]
    layer = {"read": tokens, "selected": list(range(tokens)), "attention": weights, "kept": 1.0}
    layer |= {"dense": layer["selected"], "dense_attention": weights}
    told = {"model": "sparse", "context": tokens, "starts": list(range(0, 4 * tokens, 4)), "text": "word" * tokens}
    told |= {"markers": []}
    body = json.dumps(told | {"layers": [layer | {"layer": i} for i in range(4)]})
    page.route("**/lens", lambda route: route.fulfill(content_type="application/json", body=body))
    answers(page, chunk(text="x", ids=(20,), prompt_token_ids=[1]), "[DONE]")
    ask(page, "?")
    answered(page)
    page.click(".answer .token")
    expect(page.locator(".summary")).to_contain_text("26,768 weakest are not marked", timeout=15_000)
    expect(page.locator(".summary")).to_contain_text("Each layer read all 32,768 tokens.")
    expect(page.locator(".guide")).to_contain_text("So does this one.")
    begin = time.monotonic()
    page.locator(".choices fieldset").last.locator("label").nth(4).click()
    expect(page.locator(".summary")).to_contain_text("Layer 3")
    assert time.monotonic() - begin < 2
    box = page.locator(".strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 5)
    scrolled = page.locator(".context").evaluate("e => (e.scrollTop + e.clientHeight / 2) / e.scrollHeight")
    assert abs(scrolled - 0.75) < 0.02


def test_a_lens_that_fails(page: Page) -> None:
    error = {"error": {"message": "no lens today", "type": "server_error", "param": None, "code": None}}
    page.route("**/lens", lambda route: route.fulfill(status=500, json=error))
    answers(page, chunk(text="x", ids=(20,), prompt_token_ids=[1]), "[DONE]")
    ask(page, "?")
    answered(page)
    page.click(".answer .token")
    expect(page.locator(".summary")).to_have_text("No lens today.")
    expect(page.locator(".caption")).to_be_hidden()
    page.click("button[aria-label='Close the lens']")
    expect(page.locator("#lens")).to_be_hidden()
