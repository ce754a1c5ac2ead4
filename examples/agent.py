"""An agent of several steps, with a tool and a long scratchpad.

In each step the agent reads a code from its scratchpad and opens the page behind it with the tool `open`. The page is
real text with the next code in it, and is added to the scratchpad. The task is done if every page was opened, and if at
the end the agent still knows the last code and the first. The order of the steps is given; the codes are the model's.
"""

import random
import re
from dataclasses import dataclass

from arms import Local, Part, Reader, Remote, hide, main, names, number, pages

STEPS = 4


@dataclass(frozen=True)
class Task:
    """names: what each page tells the code of. codes: of the names; a page is behind the code of the one before it."""

    start: str
    names: tuple[str, ...]
    codes: tuple[str, ...]
    texts: tuple[str, ...]

    def open(self, code: str) -> str | None:
        """The tool: the page behind a code, or None."""
        return self.texts[self.codes.index(code) + 1] if code in self.codes[:-1] else None


def tasks(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Task]:
    manual = "\n".join(page.text for page in pages())
    made = []
    for _ in range(count):
        keys, codes = names(rng, STEPS), [number(rng) for _ in range(STEPS)]
        texts = []
        for key, code in zip(keys, codes):
            begin = rng.randrange(max(1, len(manual) - 5 * tokens))
            body = model.fit(manual[begin:], max(64, tokens // STEPS - 40))
            texts.append(hide(body, [f"# Note: the door code of {key} is {code}."], rng))
        made.append(Task(keys[0], tuple(keys), tuple(codes), tuple(texts)))
    return made


def done(reader: Reader, task: Task) -> float:
    """Whether the agent opens page after page by the codes that it reads, and still knows the first one at the end."""
    scratchpad = task.texts[0]
    for name in task.names[:-1]:
        said = re.search(r"\d{4,}", reader.ask(scratchpad, f"What is the door code of {name}?"))
        if said is None or (page := task.open(said[0])) is None:
            return 0.0
        scratchpad += f"\n\nopen({said[0]})\n\n{page}"
    last, first = (reader.ask(scratchpad, f"What is the door code of {name}?") for name in (task.names[-1], task.start))
    return float(task.codes[-1] in last and task.codes[0] in first)


if __name__ == "__main__":
    main(str(__doc__), Part("an agent with a tool and a scratchpad", tasks, done))
