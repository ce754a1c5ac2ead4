"""Questions about a long manual, and its summary.

The manual is this project's own documentation. Question answering: one of the settings that an operator has noted in it
is asked for. Summarising: the manual's pages begin with a summary, and the log probability of this summary behind the
rest of its page is compared.
"""

import random

from arms import Case, Local, Part, Remote, answered, continued, hide, main, names, number, pages

NOTED = ("serial number", "account number", "phone extension", "port")


def questions(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    """Texts with eight notes each, and a question for one of them."""
    manual = "\n".join(page.text for page in pages())
    cases = []
    for _ in range(count):
        begin = rng.randrange(max(1, len(manual) - 5 * tokens))
        facts = [(rng.choice(NOTED), name, number(rng)) for name in names(rng, 8)]
        lines = [f"# Note: the {noun} of {name} is {value}." for noun, name, value in facts]
        text = hide(model.fit(manual[begin:], max(64, tokens - 250)), lines, rng)
        noun, name, value = rng.choice(facts)
        cases.append(Case(text, f"What is the {noun} of {name}?", value))
    return cases


def summaries(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    """Pages without their opening paragraph, which is the answer. Other pages stand before a shorter one."""
    found, manual = [], pages()
    for page in rng.sample(manual, len(manual)):
        title, _, rest = page.text.partition("\n\n")
        summary, _, body = rest.partition("\n\n")
        if len(found) < count and len(body) > 1500 and len(summary) > 80 and summary[0].isalpha():
            others = "\n\n".join(other.text for other in manual if other is not page)
            body = model.fit(body, tokens)
            before = model.fit(others, max(0, tokens - model.size(body)))
            found.append(Case(f"{before}\n\n{body}", f"{title}\n\nIn short:", f" {summary}"))
    return found


if __name__ == "__main__":
    main(
        str(__doc__),
        Part("question answering over a manual", questions, answered),
        Part("summarising a manual", summaries, continued, "nats"),
    )
