"""The page in Chromium shows an answer's Markdown, token by token, and nothing else of what an answer may hold."""

import random
import re

from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.support.browser import answered, answers, ask, chunk, looks, said

pytest_plugins = ["tests.support.browser"]

WRITTEN = """\
# Head *x*

One **bold *it*** `code` [a](http://x.y) [1] <b>hi</b> &amp; \\* end
__init__

- one
  more
- two
  ```python
  x = 1

  y
  ```

3. a

> q1
> q2

| a | b |
|---|--:|
| 1 |   |
|  | ~~2~~ |

    indented
    code

---
<div onclick="x">
</div>
"""
SHOWN = """\
<h3> Head <em>x</em></h3>
<p>One <strong>bold <em>it</em></strong> <code>code</code> <a>a</a> [1] &lt;b&gt;hi&lt;/b&gt; &amp;amp; * end
<strong>init</strong></p>
<ul><li><p>one
  more</p></li><li><p>two</p><div><pre>x = 1

y</pre></div></li></ul>
<ol><li><p>a</p></li></ol>
<blockquote><p>q1
 q2</p></blockquote>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td></td></tr><tr><td></td><td><s>2</s></td></tr></table>
<div><pre>indented
code</pre></div>
<div></div>
<p>&lt;div onclick="x"&gt;
&lt;/div&gt;</p>
"""
OUTLINE = """(root) => {
    const copy = root.cloneNode(true);
    for (const one of copy.querySelectorAll("button, .markup")) one.remove();
    for (const one of copy.querySelectorAll(".token")) one.replaceWith(one.textContent);
    for (const one of copy.querySelectorAll("*")) for (const name of one.getAttributeNames()) one.removeAttribute(name);
    return [...copy.childNodes].map((one) => one.outerHTML + "\\n").join("");
}"""
WHOLE = """(root) => {
    const copy = root.cloneNode(true);
    for (const one of copy.querySelectorAll("button")) one.remove();
    return copy.textContent;
}"""


def written(page: Page, text: str, *sizes: int) -> None:
    """An answer of tokens with so many characters each, by turns."""
    parts, at = [], 0
    while at < len(text):
        size = sizes[len(parts) % len(sizes)]
        parts.append(text[at : at + size])
        at += size
    first = chunk(text=None, prompt_token_ids=[1])
    answers(page, first, *(chunk(text=part, ids=(20 + i,)) for i, part in enumerate(parts)), "[DONE]")
    ask(page, "?")
    answered(page)


def test_markdown_is_shown_and_every_character_kept(page: Page, context: BrowserContext) -> None:
    for sizes in ((1,), (3, 1, 5), (len(WRITTEN),)):  # however the answer is cut into tokens
        written(page, WRITTEN, *sizes)
        text = page.locator(".answer > .text").last
        assert text.evaluate(OUTLINE) == SHOWN
        assert text.evaluate(WHOLE) == WRITTEN
    assert page.locator("ol").last.get_attribute("start") == "3"
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    copy = page.get_by_role("button", name="Copy the code")
    expect(copy).to_have_count(6)
    copy.first.click()
    expect(copy.first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ny"


def test_a_block_is_shown_before_it_ends(page: Page) -> None:
    answers(page, chunk(text="Look:\n```js\nlet", ids=(5,)), chunk(text=" a;", ids=(6,)))  # cut off
    ask(page, "?")
    answered(page)
    assert page.locator(".answer pre").inner_text() == "let a;"
    assert page.locator(".answer .code").get_attribute("data-language") == "js"


def test_links_lead_only_where_they_say_and_pictures_are_not_loaded(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    safe = ["[a](https://a.example/?q=1)", "<https://b.example>", "http://c.example/d", "[m](<mailto:m@a.example>)"]
    safe += ["![picture](https://p.example/p.png)", "[![inner](https://i.example/i.png)](https://o.example)"]
    text = ["[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,x)", "[x](//evil.example)"]
    text += ["[x](vbscript:x)", "[x](/v1/models)", "![](https://p.example/none.png)", "[x][ref]"]
    text += ["<javascript:alert(1)>"]
    text += ["![p](file:///etc/passwd)", "[x]( javascript:alert(1))", "[x](&#106;avascript:alert(1))"]
    text += ["<img src=http://h.example>"]
    written(page, "\n\n".join(safe + text), 4)
    links = page.locator(".answer a").evaluate_all("all => all.map((a) => [a.getAttribute('href'), a.rel, a.target])")
    addresses = ["https://a.example/?q=1", "https://b.example", "http://c.example/d", "mailto:m@a.example"]
    addresses += ["https://p.example/p.png", "https://o.example"]
    assert links == [[address, "noopener noreferrer", "_blank"] for address in addresses]
    assert said(page).split("\n\n")[len(safe) :] == text
    assert page.locator(".answer img, .answer script").count() == 0
    assert {re.sub(r"(//[^/]*).*", r"\1", url) for url in asked} == {page.url.rstrip("/")}


def test_tokens_of_markup_can_be_shown_and_chosen(page: Page) -> None:
    lens: list[list[int]] = []

    def look(route: Route) -> None:
        lens.append(route.request.post_data_json["token_ids"])
        route.fulfill(json=looks("abcd", 4))

    page.route("**/lens", look)
    first = chunk(text=None, prompt_token_ids=[1])
    parts = ("**", "bold", "** ", "[so](http://x.y)", "!")
    answers(page, first, *(chunk(text=part, ids=(20 + i,)) for i, part in enumerate(parts)), "[DONE]")
    ask(page, "?")
    answered(page)
    assert said(page) == "bold so!"
    page.locator(".answer .token:visible").first.focus()
    for key, word in (("ArrowRight", " "), ("ArrowRight", "so"), ("ArrowRight", "!"), ("ArrowLeft", "so")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == word
    with page.expect_response("**/lens"):
        page.keyboard.press("Enter")  # within a link, too: a click follows it
    expect(page.locator(".lens q")).to_have_text("[so](http://x.y)")
    assert lens == [[1, 20, 21, 22]]
    page.keyboard.press("Escape")

    markup = page.get_by_role("button", name="Markup")
    markup.focus()
    page.keyboard.press("Enter")
    expect(markup).to_have_attribute("aria-pressed", "true")
    assert said(page) == "".join(parts)
    page.locator(".answer .token", has_text="**").first.click()
    expect(page.locator(".lens q")).to_have_text("**")
    assert lens[1:] == [[1]]


def test_plain_text_has_no_markup(page: Page) -> None:
    written(page, "def f(x):\n    return x", 5)
    assert said(page) == "def f(x):\n    return x"
    expect(page.get_by_role("button", name="Markup")).to_be_hidden()


FUZZ = """async ([pieces, texts]) => {
    const { AnswerText } = await import("./page/answer.js");
    const shown = (parts) => {
        const text = new AnswerText(document.createElement("div"));
        for (const [i, part] of parts.entries()) {
            text.push(part, i);
            text.draw();
        }
        const copy = text.root.cloneNode(true);
        for (const one of copy.querySelectorAll("button")) one.remove();
        for (const one of copy.querySelectorAll("span")) one.replaceWith(...one.childNodes);
        return [copy.innerHTML, copy.textContent];
    };
    const same = (parts) => {
        const [html, text] = shown(parts);
        return text === parts.join("") && html === shown([text])[0];
    };
    return texts.map((choices) => choices.map((i) => pieces[i])).filter((parts) => !same(parts));
}"""
MARKS = ["**", "~~", "```", "```py\n", "    ", "- ", "1. ", "> ", "---", "|-|-|\n", "[ ] ", "\\", "\t", "\n\n", "\r\n"]
LINKS = ["[x]", "(http://a.b)", "![", "](", "http://c.d", "<http://e>", "[r]: http://f\n", "www.g.h", "i@j.k"]
HTML = ["<b>", "<div>", "</div>\n", "&amp;", "<!--", "-->"]
PIECES = [*" \n*_`|#-=>$é🙂", "word ", *MARKS, *LINKS, *HTML]


def test_an_answer_that_comes_in_parts_looks_like_one_that_comes_whole(page: Page) -> None:
    """What was shown before stays right, whatever follows: --- is a rule, and ---x goes on with the text before."""
    draw = random.Random(5)
    texts = [draw.choices(range(len(PIECES)), k=draw.randrange(1, 30)) for _ in range(800)]
    assert page.evaluate(FUZZ, [PIECES, texts]) == []
