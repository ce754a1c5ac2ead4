"""Chromium for the tests of the page, and a document that the bundled model can be asked about."""

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

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
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    assert found, "the page is tested in a browser and there is none: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()
