"""Agentic search: a question of several hops over a small corpus of invented works, people and towns.

Every item has a corpus of its own, so that nothing can be known without searching. The index is SQLite's (FTS5).
"""

import random
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.problem import Item
from tokensieve.tasks.problems.tools import Call, Step, Tool

SIZE = 8  # entities of each kind in a corpus
FOUND = 3  # documents in a result
MOST_WORDS = 32  # of a query; later ones are not looked up
SYLLABLES = {
    "en": "ba bel cor da dri fen gal ho il ka lor ma nev or pel qua ri sol ta um ven wi yor zan".split(),
    "zh": "安 白 川 丹 峰 光 海 江 岚 林 明 宁 平 青 山 松 棠 文 溪 雅 云 远 竹 子".split(),
}
# Kinds of entities, and what is told of each: the relation and the kind that it leads to.
RELATIONS = {
    "work": {"author": "person", "subject": "town"},
    "person": {"home": "town", "teacher": "person"},
    "town": {"mayor": "person", "anthem": "work"},
}
# By split: a fact about {x} and {y}, and a phrase for {y}. No phrasing is in both.
PHRASES: dict[str, dict[str, dict[Split, tuple[str, str]]]] = {
    "en": {
        "author": {
            "train": ("{x} was written by {y}.", "the author of {x}"),
            "test": ("{y} is the one who composed {x}.", "whoever composed {x}"),
        },
        "subject": {
            "train": ("{x} is about the town {y}.", "the town that {x} is about"),
            "test": ("The place described in {x} is {y}.", "the place described in {x}"),
        },
        "home": {
            "train": ("{x} lives in {y}.", "the town where {x} lives"),
            "test": ("{y} has been home to {x}.", "the place that is home to {x}"),
        },
        "teacher": {
            "train": ("{x} was taught by {y}.", "the teacher of {x}"),
            "test": ("{y} trained {x}.", "whoever trained {x}"),
        },
        "mayor": {
            "train": ("The mayor of {x} is {y}.", "the mayor of {x}"),
            "test": ("{y} governs {x}.", "whoever governs {x}"),
        },
        "anthem": {
            "train": ("The song of {x} is {y}.", "the song of {x}"),
            "test": ("In {x} they sing {y}.", "what they sing in {x}"),
        },
    },
    "zh": {
        "author": {"train": ("{x}的作者是{y}。", "{x}的作者"), "test": ("{x}由{y}撰写。", "撰写{x}的人")},
        "subject": {"train": ("{x}讲述城镇{y}。", "{x}讲述的城镇"), "test": ("{x}描写了{y}。", "{x}描写的地方")},
        "home": {"train": ("{x}住在{y}。", "{x}住的城镇"), "test": ("{x}定居于{y}。", "{x}定居的地方")},
        "teacher": {"train": ("{x}的老师是{y}。", "{x}的老师"), "test": ("{x}师从{y}。", "{x}师从的人")},
        "mayor": {"train": ("{x}的镇长是{y}。", "{x}的镇长"), "test": ("{x}由{y}治理。", "治理{x}的人")},
        "anthem": {"train": ("{x}的歌曲是{y}。", "{x}的歌曲"), "test": ("{x}传唱{y}。", "{x}传唱的歌")},
    },
}
ASKS: dict[str, dict[Split, str]] = {
    "en": {"train": "What is the name of {0}?", "test": "Find {0}."},
    "zh": {"train": "{0}叫什么名字？", "test": "请找出{0}。"},
}
TOOLS = (
    Tool(
        "search",
        ("query",),
        {"en": f"the {FOUND} documents that fit the query best", "zh": f"与查询最相符的{FOUND}篇文档"},
    ),
)
_WORD = re.compile(r"[a-z0-9]+|[^\W_a-z0-9]+")


@dataclass(frozen=True)
class Search:
    """Chains of relations between entities with invented names. Difficulty: hops, from 2 to 5.

    An answer is right if it names the entity at the end of the chain, and no other but the one that the question names.
    """

    name: str = "search"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (2, 2, 5)
    tools: tuple[Tool, ...] = TOOLS
    most_calls: int = 8

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        names = _names(rng, language)
        links = {
            (x, relation): rng.choice([y for y in names[other] if y != x])
            for kind, relations in RELATIONS.items()
            for x in names[kind]
            for relation, other in relations.items()
        }
        path, relations = _walk(rng, names, links, difficulty)
        phrases = PHRASES[language]
        space = " " if language == "en" else ""
        documents = [
            f"{x}\n{space.join(phrases[r][split][0].format(x=x, y=links[x, r]) for r in RELATIONS[kind])}"
            for kind, entities in names.items()
            for x in entities
        ]
        rng.shuffle(documents)
        wanted, facts, steps = path[0], [], []
        for x, relation, y in zip(path, relations, path[1:]):
            fact, phrase = phrases[relation][split]
            wanted = phrase.format(x=wanted)
            facts.append(fact.format(x=x, y=y))
            call = Call("search", {"query": x})
            steps.append(Step(phrase.format(x=x), call, "\n\n".join(_found(documents, x))))
        key = " ".join([path[0], *relations, path[-1]])
        question = ASKS[language][split].format(wanted)
        data = (path[-1], path[0], *documents)
        return Item(key, question, space.join(facts), path[-1], data, steps=tuple(steps))

    def respond(self, item: Item, calls: Sequence[Call]) -> str:
        return "\n\n".join(_found(item.data[2:], calls[-1].arguments["query"])) or "nothing found"

    def grade(self, item: Item, answer: str, calls: Sequence[Call] = ()) -> float:
        right, start, *documents = item.data
        names = {document.partition("\n")[0] for document in documents}
        named = {name for name in names if re.search(rf"(?<![A-Za-z]){name}(?![A-Za-z])", answer)}
        return float(named - {start} == {right})


def _names(rng: random.Random, language: str) -> dict[str, list[str]]:
    """Names of each kind, all different, and each of three syllables."""
    drawn: dict[str, None] = {}
    while len(drawn) < SIZE * len(RELATIONS):
        name = "".join(rng.sample(SYLLABLES[language], 3))
        drawn[name.capitalize()] = None
    names = iter(drawn)
    return {kind: [next(names) for _ in range(SIZE)] for kind in RELATIONS}


def _walk(
    rng: random.Random, names: dict[str, list[str]], links: dict[tuple[str, str], str], hops: int
) -> tuple[list[str], list[str]]:
    """A chain of different entities, and the relations between them."""
    kinds = {name: kind for kind, entities in names.items() for name in entities}
    while True:
        path, relations = [rng.choice([*kinds])], []
        for _ in range(hops):
            relations.append(rng.choice([*RELATIONS[kinds[path[-1]]]]))
            path.append(links[path[-1], relations[-1]])
        if len({*path}) == len(path):
            return path, relations


def _found(documents: Sequence[str], query: str) -> list[str]:
    """The best documents for a query, by BM25 in which a title counts for five; equals in their order."""
    words = [*dict.fromkeys(_terms(query))][:MOST_WORDS]
    if not words:
        return []
    with closing(sqlite3.connect(":memory:")) as index:
        index.execute("CREATE VIRTUAL TABLE documents USING fts5(title, body)")
        for document in documents:
            title, _, body = document.partition("\n")
            index.execute("INSERT INTO documents VALUES (?, ?)", (" ".join(_terms(title)), " ".join(_terms(body))))
        asked = " OR ".join(f'"{word}"' for word in words)
        rows = index.execute(
            "SELECT rowid FROM documents WHERE documents MATCH ? ORDER BY bm25(documents, 5.0, 1.0), rowid LIMIT ?",
            (asked, FOUND),
        ).fetchall()
    return [documents[row - 1] for (row,) in rows]


def _terms(text: str) -> list[str]:
    """What is indexed of a text: words, and of letters without spaces between words, as in Chinese, all neighbours."""
    terms = []
    for word in _WORD.findall(text.lower()):
        pairs = [] if word.isascii() else [word[at : at + 2] for at in range(len(word) - 1)]
        terms += pairs or [word]
    return terms
