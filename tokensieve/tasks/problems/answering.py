"""General question answering: some facts of one of several places, told from their descriptions, with a rubric."""

import random
from dataclasses import dataclass

from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems.checks import CHECKS, met
from tokensieve.tasks.problems.problem import Item

PLACES = 3  # described in a question
SYLLABLES = {
    "en": "ar bro cal den el fir gor han is jor kel lun mar nol ost pra ren sil tor vel".split(),
    "zh": "北 长 东 丰 高 和 金 乐 龙 南 清 瑞 石 泰 西 新 永 玉".split(),
}
ENDINGS = {"en": ("ton", "burg", "ford"), "zh": ("镇", "城", "村")}
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "founded": tuple(map(str, range(1100, 1900))),
        "people": tuple(map(str, range(2000, 9000, 10))),
        "animal": tuple("bear beaver crane falcon fox goat hare heron horse lynx mole pike ram stag swan wolf".split()),
        "product": tuple("bells boats bread cheese clocks glass honey lace paper pottery salt silk soap tea".split()),
    },
    "zh": {
        "founded": tuple(map(str, range(1100, 1900))),
        "people": tuple(map(str, range(2000, 9000, 10))),
        "animal": tuple("白鹤 棕熊 狐狸 山羊 野兔 骏马 水獭 猫头鹰 天鹅 灰狼 雄鹰 梅花鹿".split()),
        "product": tuple("铜钟 木船 面包 奶酪 钟表 玻璃 蜂蜜 花边 纸张 陶器 食盐 丝绸 肥皂 茶叶".split()),
    },
}
# By split: a fact in a description, what is asked of it, and a fact in an answer. No phrasing is in both.
FACTS: dict[str, dict[str, dict[Split, tuple[str, str, str]]]] = {
    "en": {
        "founded": {
            "train": ("It was founded in {v}.", "the year of its founding", "It dates from {v}."),
            "test": ("Its charter is of the year {v}.", "how old its charter is", "The charter is of {v}."),
        },
        "people": {
            "train": ("It has {v} inhabitants.", "its number of inhabitants", "The inhabitants are {v}."),
            "test": ("The population is {v}.", "the size of the population", "{v} people make up the population."),
        },
        "animal": {
            "train": ("Its flag shows a {v}.", "the animal on its flag", "On the flag is a {v}."),
            "test": ("On the coat of arms stands a {v}.", "the beast of the coat of arms", "The arms have a {v}."),
        },
        "product": {
            "train": ("It is known for its {v}.", "what it is known for", "People know it for {v}."),
            "test": ("Merchants come there for {v}.", "why merchants come", "Merchants want the {v}."),
        },
    },
    "zh": {
        "founded": {
            "train": ("它建于{v}年。", "建立的年份", "建立于{v}年。"),
            "test": ("它的历史始于{v}年。", "历史从哪年开始", "历史从{v}年开始。"),
        },
        "people": {
            "train": ("它有{v}位居民。", "居民的数量", "居民共{v}位。"),
            "test": ("人口为{v}。", "人口多少", "那里的人口是{v}。"),
        },
        "animal": {
            "train": ("旗帜上画着{v}。", "旗帜上的动物", "旗上的动物是{v}。"),
            "test": ("徽章上是一只{v}。", "徽章上有什么", "徽章上有一只{v}。"),
        },
        "product": {
            "train": ("它以{v}闻名。", "闻名的物产", "闻名的是{v}。"),
            "test": ("商人来此买{v}。", "商人来买什么", "商人来买的是{v}。"),
        },
    },
}
# By language and split: how a description begins, the question, and what is between the things that are asked.
ASKS: dict[str, dict[Split, tuple[str, str, str]]] = {
    "en": {
        "train": ("About {x}:", "Tell about {x}: {asked}. Use at most {n} characters.", "; "),
        "test": ("{x} in brief:", "What do the notes say of {x} ({asked})? No more than {n} characters, please.", ", "),
    },
    "zh": {
        "train": ("关于{x}：", "请介绍{x}：{asked}。最多{n}个字符。", "；"),
        "test": ("{x}简介：", "资料中{x}的情况如何（{asked}）？请不要超过{n}个字符。", "，"),
    },
}


@dataclass(frozen=True)
class Answering:
    """Questions about one of three invented places that are described. Difficulty: facts that are asked, from 1 to 4.

    The rubric asks for these facts, for none of the other places', and for a short answer; a judge scores it. `grade`
    is the share of the facts that the answer states; 0 if it breaks any of the other criteria, so that a copy of the
    descriptions is worth nothing.
    """

    name: str = "answering"
    languages: tuple[str, ...] = ("en", "zh")
    difficulty: tuple[int, int, int] = (1, 2, 4)

    def draw(self, rng: random.Random, difficulty: int, language: str, split: Split) -> Item:
        facts, values = FACTS[language], VALUES[language]
        begin, ask, between = ASKS[language][split]
        places = _places(rng, language)
        drawn = {kind: dict(zip(places, rng.sample(values[kind], PLACES), strict=True)) for kind in facts}
        x, kinds = rng.choice(places), rng.sample([*facts], difficulty)
        space = " " if language == "en" else ""
        told = [
            space.join([begin.format(x=place), *(facts[kind][split][0].format(v=drawn[kind][place]) for kind in facts)])
            for place in places
        ]
        answer = space.join(facts[kind][split][2].format(v=drawn[kind][x]) for kind in kinds)
        most = 10 * (len(answer) // 10 + 2)
        asked = between.join(facts[kind][split][1] for kind in kinds)
        rubric = [CHECKS["states"].criterion(drawn[kind][x]) for kind in kinds]
        rubric += [CHECKS["omits"].criterion(drawn[kind][place]) for kind in kinds for place in places if place != x]
        rubric.append(CHECKS["most characters"].criterion(most))
        key = " ".join([x, *(f"{kind}={drawn[kind][x]}" for kind in kinds)])
        question = "\n".join([*told, ask.format(x=x, asked=asked, n=most)])
        thoughts = "\n".join(facts[kind][split][0].format(v=drawn[kind][x]) for kind in kinds)
        return Item(key, question, thoughts, answer, (str(difficulty), *rubric), tuple(rubric))

    def grade(self, item: Item, answer: str) -> float:
        asked = int(item.data[0])
        stated, others = item.rubric[:asked], item.rubric[asked:]
        if not all(met(criterion, answer) for criterion in others):
            return 0.0
        return sum(met(criterion, answer) for criterion in stated) / asked


def _places(rng: random.Random, language: str) -> list[str]:
    places: dict[str, None] = {}
    while len(places) < PLACES:
        places["".join([*rng.sample(SYLLABLES[language], 2), rng.choice(ENDINGS[language])]).capitalize()] = None
    return [*places]
