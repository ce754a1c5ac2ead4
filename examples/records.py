"""Many records of one case, joined.

A file holds records of several cases, as hospitals and courts keep them: real text, over which the entries of each case
(a docket number, a case number, a batch number) are scattered. All entries of one case are to be put together. The join
is right if each of them is. There is a question for each kind of entry, since small models answer one thing at a time.
"""

import random
from dataclasses import dataclass

from arms import Local, Part, Reader, Remote, hide, main, names, number, pages

KINDS = ("docket number", "case number", "batch number")
CASES = 4  # in a file


@dataclass(frozen=True)
class Join:
    text: str
    name: str
    entries: tuple[str, ...]


def files(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Join]:
    """Files of four cases with three entries each, and one case of them to be joined."""
    archive = "\n".join(page.text for page in pages())
    joins = []
    for _ in range(count):
        entries = {name: [number(rng) for _ in KINDS] for name in names(rng, CASES)}
        lines = [f"# The {k} of {n} is {v}." for n, values in entries.items() for k, v in zip(KINDS, values)]
        begin = rng.randrange(max(1, len(archive) - 5 * tokens))
        text = hide(model.fit(archive[begin:], max(64, tokens - 350)), rng.sample(lines, len(lines)), rng)
        name = rng.choice(sorted(entries))
        joins.append(Join(text, name, tuple(entries[name])))
    return joins


def joined(reader: Reader, case: Join) -> float:
    """Whether every entry of the case is found."""
    said = [reader.ask(case.text, f"What is the {kind} of {case.name}?") for kind in KINDS]
    return float(all(value in answer for value, answer in zip(case.entries, said)))


if __name__ == "__main__":
    main(str(__doc__), Part("joining the records of a case", files, joined))
