"""Several long documents, compared: contracts and papers.

The contracts are licences of the packages that are installed here, each with a clause of its own ("the contract number
of A is 4711"); one of them is asked for, among all. The papers are this project's pages: behind several of them the
title of one is given, and the log probability of its first paragraph is compared, which has to be found and repeated.
"""

import random
from importlib.metadata import distributions

from arms import Case, Local, Page, Part, Remote, answered, continued, hide, main, names, number, pages, source

from tokensieve.config import UserError

TOGETHER = 4  # documents that are compared, at least


def licences() -> list[str]:
    """The texts of the longest licences, each once."""
    paths = [file.locate() for one in distributions() for file in one.files or () if "LICENSE" in file.name]
    texts = {path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()}
    if not texts:
        raise UserError("no installed package has a LICENSE file to compare; install tokensieve with its dependencies")
    return sorted(texts, key=lambda text: (-len(text), text))[:12]


def contracts(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    cases, texts = [], licences()
    for _ in range(count):
        parties, values = names(rng, TOGETHER), [number(rng) for _ in range(TOGETHER)]
        parts = []
        for party, value in zip(parties, values):
            clause = f"The contract number of {party} is {value}."
            body = model.fit(rng.choice(texts), max(64, tokens // TOGETHER - 60))
            parts.append(f"Contract of {party}\n\n{hide(body, [clause], rng)}")
        asked = rng.randrange(TOGETHER)
        question = f"What is the contract number of {parties[asked]}?"
        cases.append(Case("\n\n".join(parts), question, values[asked]))
    return cases


def papers(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    cases = []
    for _ in range(count):
        found = [(page, opened) for page in pages() if (opened := opening(page))]
        shuffled, texts, left = rng.sample(found, len(found)), [], tokens
        for page, _ in shuffled:
            texts.append(model.fit(page.text, min(left, tokens // TOGETHER)))
            left = max(0, left - model.size(texts[-1]))
        page, (title, first) = rng.choice(shuffled[:TOGETHER])
        cases.append(Case("\n\n".join(filter(None, texts)), f"{title}\n\n", model.fit(first, 48), page.name))
    return cases


def opening(page: Page) -> tuple[str, str] | None:
    """A page's title and first paragraph. None if the page begins otherwise."""
    title, _, rest = page.text.partition("\n\n")
    first = rest.partition("\n\n")[0]
    return (title, first) if title.startswith("# ") and first[:1].isalpha() and len(first) > 80 else None


if __name__ == "__main__":
    main(
        str(__doc__),
        Part("comparing contracts", contracts, answered),
        Part("comparing papers", papers, continued, "nats", source),
    )
