"""Tasks with long contexts, generated: of the kinds of RULER `Pairs` (needles), `Variables` and `CommonWords`, and
`CrossDocument` and `Repository`, whose answers lie in other documents and files than what is asked about.

Source: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? arXiv 2404.06654.
Phrasings, word lists and generators are our own, so figures are comparable between models measured here, and not with
published ones.
"""

from typing import Any

from tokensieve.config import LONG_TASKS, LongSizes, UserError
from tokensieve.tasks.documents import Documents
from tokensieve.tasks.ruler.common_words import CommonWords
from tokensieve.tasks.ruler.other_documents import CrossDocument, Repository
from tokensieve.tasks.ruler.pairs import Pairs
from tokensieve.tasks.ruler.question import LongExample, LongTask
from tokensieve.tasks.ruler.variables import Variables

__all__ = ["CommonWords", "CrossDocument", "LongExample", "LongTask", "Pairs", "Repository", "Variables", "long_tasks"]


def long_tasks(tokenizer: Any, documents: Documents, sizes: LongSizes) -> list[LongTask]:
    """The tasks that `sizes.tasks` names, with the knobs of `sizes`.

    Raises:
        UserError: no name, or one that is none of `LONG_TASKS`.
    """
    unknown = [name for name in sizes.tasks if name not in LONG_TASKS]
    if unknown or not sizes.tasks:
        what = f"task {unknown[0]!r} is unknown" if unknown else "no tasks"
        raise UserError(f"long.tasks: {what}; use some of {', '.join(LONG_TASKS)}")
    around: dict[str, Any] = {"tokenizer": tokenizer, "documents": documents, "haystack": sizes.haystack}
    needles = around | {"key": sizes.key, "value": sizes.value}
    keys, together = sizes.keys, sizes.together
    groups = min(sizes.asked, max(1, keys // max(1, together)))
    tasks: list[LongTask] = [
        Pairs(name="single", **needles),
        Pairs(name="multikey", keys=keys, asked=min(sizes.asked, keys), **needles),
        Pairs(name="multivalue", values=sizes.values, **needles),
        Pairs(name="multiquery", keys=keys, together=together, asked=groups, **needles),
        Variables(chains=sizes.chains, hops=sizes.hops, **around),
        CommonWords(tokenizer=tokenizer, common=sizes.common, often=sizes.often, rarely=sizes.rarely),
        CrossDocument(tokenizer=tokenizer, documents=documents, chains=sizes.chains),
        Repository(tokenizer=tokenizer, documents=documents, modules=keys, asked=min(sizes.asked, keys)),
    ]
    return [task for name in sizes.tasks for task in tasks if task.name == name]
