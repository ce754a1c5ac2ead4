"""Groups: the problems of one domain in one mode, which are trained, sampled and measured together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tokensieve.config import UserError
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.tasks import PlainEncoder
from tokensieve.tasks.documents import Split
from tokensieve.tasks.problems import MODES, Domain, Mode, Problem, Problems


@dataclass(frozen=True)
class Group:
    """A domain's problems in one mode, in each of its languages in turn.

    by_language: at least one. The first scores the answers of all: scores do not depend on the task's language.
    """

    domain: str
    mode: Mode
    by_language: tuple[Problems, ...]
    difficulty: int

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.mode}"

    @property
    def task(self) -> Problems:
        return self.by_language[0]

    def at(self, difficulty: int) -> "Group":
        return replace(self, difficulty=difficulty)

    def examples(self, split: Split, count: int, seed: int) -> list[Problem]:
        """As those of a `Task`."""
        languages = len(self.by_language)
        drawn = [
            task.examples(split, len(range(place, count, languages)), self.difficulty, seed)
            for place, task in enumerate(self.by_language)
        ]
        return [drawn[place % languages][place // languages] for place in range(count)]


def groups_of(
    config: PosttrainConfig, domains: Sequence[Domain], encode: PlainEncoder, difficulties: Mapping[str, int]
) -> list[Group]:
    """The groups of these domains. difficulties: by group; the domain's usual one for a group that is not there.

    UserError for a domain that has none of the config's languages.
    """
    groups = []
    for asked in domains:
        languages = [language for language in config.languages if language in asked.languages]
        if not languages:
            raise UserError(
                f"{asked.name} has problems in {', '.join(asked.languages)}, none of them in languages; add one"
            )
        for mode in (mode for mode in MODES if mode in config.modes):
            tasks = tuple(Problems(asked, encode, mode, language, config.tokens) for language in languages)
            known = difficulties.get(f"{asked.name}-{mode}", asked.difficulty[1])
            groups.append(Group(asked.name, mode, tasks, known))
    return groups
