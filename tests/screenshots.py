"""The pictures of docs/server.md, taken from the bundled model: python -m tests.screenshots"""

from pathlib import Path

import tokensieve
from tests.support import browser, servers
from tokensieve.engine import EngineConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
LIMITS = {"max_prompt_tokens": 0, "max_tokens": 4096, "max_body": 16 * 2**20}


def main() -> None:
    loaded = tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")
    source = {"name": "textwrap.py", "mimeType": "text/x-python", "buffer": browser.document(12_000).encode()}
    with (
        servers.running(loaded, EngineConfig(pages=300, running=2), **LIMITS) as (at, _),
        browser.chromium() as chromium,
    ):
        page = chromium.new_page(viewport={"width": 1280, "height": 800}, device_scale_factor=1.25)
        page.add_init_script("""localStorage.setItem("tokensieve", '{"temperature": 0}')""")
        page.goto(at)
        page.set_input_files("#files", [source])
        page.wait_for_selector(".chip >> text=tokens")
        page.fill("#question", browser.QUESTION)
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer footer:visible", timeout=120_000)
        page.fill("#question", "What is the badge number of amber-falcon?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer:nth-of-type(2) footer:visible", timeout=120_000)
        page.screenshot(path=DOCS / "page.png")
        page.click(".answer:nth-of-type(1) .token >> text=/^4$/")  # the code's first digit
        page.wait_for_selector(".lens mark", timeout=60_000)
        page.screenshot(path=DOCS / "lens.png")
        page.set_viewport_size({"width": 375, "height": 760})
        page.emulate_media(color_scheme="dark")
        page.click(".guide summary")
        layers = page.locator(".choices fieldset").last.locator("label")
        for number in range(1, layers.count()):
            layers.nth(number).click()
            if "not read" not in page.locator(".detail").inner_text():
                break
        page.screenshot(path=DOCS / "phone.png")


if __name__ == "__main__":
    main()
