"""Answers that lie in another document than the question's: facts to be joined, and names that a file imports."""

import random
from dataclasses import dataclass

from tokensieve.config import UserError
from tokensieve.tasks.documents import Split
from tokensieve.tasks.encoder import encoder
from tokensieve.tasks.ruler.haystack import beginnings, hiding, shares, without
from tokensieve.tasks.ruler.question import LongTask, Puzzle, Question
from tokensieve.tasks.ruler.strings import FORMS, distinct


@dataclass(frozen=True, kw_only=True)
class _Among(LongTask):
    """Small documents hidden among the beginnings of real ones, each under its heading. It takes no haystack."""

    def __post_init__(self) -> None:
        if self.haystack != "documents" or self.depth is not None:
            raise UserError(f"{self.name}: it hides documents among others; leave out haystack and depth")

    def among(
        self, rng: random.Random, split: Split, head: str, hidden: list[str], heading: str, secrets: list[str]
    ) -> Puzzle:
        """The puzzle of the hidden documents, without questions. heading: of a document, before its name."""
        what = "held-out" if split == "test" else "training"
        source = beginnings(rng, self.documents.of(split), what, lambda name: heading + self.title(name))
        lines = list(zip(hidden, shares(rng, len(hidden), None), strict=True))
        encode = encoder(self.tokenizer)
        return Puzzle(hiding(encode, head, lines, without(source, secrets), before=heading), [])

    def title(self, name: str) -> str:
        """A real document's name as its heading has it."""
        return name


@dataclass(frozen=True, kw_only=True)
class CrossDocument(_Among):
    """One document names the supplier of a thing, another the access code of that supplier, and the code is asked for.

    The answer shall name both, so that half of the score is for the first step.

    chains: pairs of such documents in a context, each asked for.
    """

    chains: int = 4
    name: str = "cross_document"

    @property
    def form(self) -> str:
        return f"{FORMS['words']}|{FORMS['numbers']}"

    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and questions. UserError: no chain."""
        if self.chains < 1:
            raise UserError(f"{self.name}: use at least 1 chain, not {self.chains}")
        drawn = distinct(rng, "words", split, 2 * self.chains)
        things, suppliers = drawn[: self.chains], drawn[self.chains :]
        codes = distinct(rng, "numbers", split, self.chains)
        hidden = [
            f"# document: Order of {thing}\nThe supplier of {thing} is {supplier}.\n"
            for thing, supplier in zip(things, suppliers, strict=True)
        ]
        hidden += [
            f"# document: Address of {supplier}\nThe access code of {supplier} is {code}.\n"
            for supplier, code in zip(suppliers, codes, strict=True)
        ]
        head = (
            "The following documents name suppliers and their access codes. You will be asked for the code of a "
            "supplier, and who that is stands in another document.\n\n"
        )
        questions = [
            Question(
                text=f"Who is the supplier of {thing}, and what is the access code of that supplier?",
                begun=f"The supplier of {thing} is",
                expected=(supplier, code),
            )
            for thing, supplier, code in zip(things, suppliers, codes, strict=True)
        ]
        found = self.among(rng, split, head, hidden, "# document: ", [*drawn, *codes])
        return Puzzle(found.build, questions)


@dataclass(frozen=True, kw_only=True)
class Repository(_Among):
    """Files of a repository, some of which define one and the same name, and a last file that imports it from one.

    modules: files that define the name, each with another value. asked: questions of a context.
    """

    modules: int = 16
    asked: int = 4
    name: str = "repository"

    @property
    def form(self) -> str:
        return FORMS["numbers"]

    def title(self, name: str) -> str:
        return name.replace(".", "/") + ".py"

    def puzzle(self, rng: random.Random, split: Split) -> Puzzle:
        """One context's text and questions. UserError: more modules asked for than there are, or none."""
        if not 0 < self.asked <= self.modules:
            raise UserError(f"{self.name}: {self.asked} of {self.modules} modules cannot be asked for; use 1 or more")
        words = distinct(rng, "words", split, self.modules)
        values = distinct(rng, "numbers", split, self.modules)
        names = [word.replace("-", "_") for word in words]
        hidden = [f"# file: settings/{name}.py\nLIMIT = {value}\n" for name, value in zip(names, values, strict=True)]
        head = "Here are the files of a repository, and then the beginning of one more, which is to be completed.\n\n"
        questions = [
            Question(
                text=f"# file: tests/test_{name}.py\nfrom settings.{name} import LIMIT\n",
                begun="\nassert LIMIT ==",
                expected=(value,),
                line=document,
            )
            for name, value, document in zip(names[: self.asked], values, hidden, strict=False)
        ]
        return Puzzle(self.among(rng, split, head, hidden, "# file: ", [*names, *values]).build, questions)
