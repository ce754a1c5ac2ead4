"""A check of sparse serving from outside: probes of an OpenAI-compatible endpoint, whatever engine serves it.

Two kinds of probes. Questions with known answers below and above k, where selection begins, and at longer lengths. And
comparisons that hold for any model: the same tokens have the same log probabilities, whether they are generated or read
as a prompt, alone or in a crowd, with or without their beginning in a cache. `diagnosis` says what a failure points to.

k: keys that a query selects. Lengths are in tokens, differences in nats a token.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tokensieve.config import UserError
from tokensieve.evals.endpoint import Endpoint, Refused, Reply
from tokensieve.evals.known_answers import LINE, REST, Question, Writer
from tokensieve.evals.progress import OnProgress
from tokensieve.evaluate_config import ServingSizes

LENGTHS = (8192, 32768, 131072)  # that are asked for, beside those around k and the longest
FAR = 4  # times k, from where a model may fail by itself
SHORTEST = 160  # tokens that a question needs
CODES = 16  # hidden lines in a text, if there is room
CHUNKS = (512, 2048, 4096, 8192)  # where engines begin a new chunk of a prompt
CHANCE = 0.01  # that any length's answers are called worse, if nothing is wrong
EXACT = 1e-6  # nats: what is computed by the same kernels differs by less
TRIES = 6  # texts that are generated until one is split into the same tokens when it is read
FEWEST = 4  # tokens of an answer that are enough to compare


@dataclass(frozen=True)
class ProbeResult:
    """found: whether something is wrong; None if the endpoint or the model does not let it be measured."""

    name: str
    tokens: int
    found: bool | None
    line: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_difference(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """Mean absolute difference in nats over the places where both have a log probability; NaN if there is none."""
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    return sum(abs(x - y) for x, y in pairs) / len(pairs) if pairs else math.nan


def answers_differ(a: Reply, b: Reply) -> float:
    """Mean absolute difference of two answers' log probabilities, up to the first token that differs.

    At that token, b's log probability of a's token is compared, or the least of b's alternatives, which is more.
    Without alternatives it is unknown, and so is the difference: NaN.
    """
    differences = []
    for token, other, p, q, top in zip(a.tokens, b.tokens, a.logprobs, b.logprobs, b.top):
        if p is None or q is None:
            continue
        if token == other:
            differences.append(abs(p - q))
            continue
        if not top:
            return math.nan
        differences.append(abs(p - top.get(token, min([p, *top.values()]))))
        break
    return sum(differences) / len(differences) if differences else math.nan


def worse(right: int, asked: int, control: int, of: int, chance: float = CHANCE) -> bool:
    """Whether so few right answers are less likely than `chance`, if each is as likely as the control's.

    Fisher's exact test, one-sided.
    """
    total, ways = right + control, math.comb(asked + of, asked)
    less = sum(math.comb(total, i) * math.comb(asked + of - total, asked - i) for i in range(min(right, total) + 1))
    return less / ways < chance


class Checker:
    """The probes of one endpoint, in the order in which they run.

    dense: the id of the same model with dense attention at the same endpoint, if it is served. longest: tokens of a
    prompt and its answer. UserError if k is too small or the model too short for any question past it.
    """

    def __init__(
        self, endpoint: Endpoint, model: str, k: int, longest: int, sizes: ServingSizes, seed: int, dense: str = ""
    ):
        self.endpoint, self.model, self.dense, self.k, self.sizes = endpoint, model, dense, k, sizes
        self.margin = max(k // 8, sizes.answer_tokens + 8)
        self.below, self.above, self.longest = k - self.margin, 2 * k, longest - sizes.answer_tokens - 8
        if self.below < SHORTEST:
            raise UserError(f"k = {k} is too small for a question below it; it needs {SHORTEST + self.margin} keys")
        if self.above > self.longest:
            raise UserError(f"k = {k}: prompts of {self.above} tokens are needed, and there is room for {self.longest}")
        self.writer = Writer(random.Random(seed))
        self.results: dict[str, ProbeResult] = {}
        self.has_logprobs = self.has_echo = False

    def lengths(self) -> tuple[int, ...]:
        """Lengths of the questions past k. UserError for one that was asked for and cannot be."""
        most = min(self.longest, self.sizes.most or self.longest)
        for length in self.sizes.contexts:
            if not self.k < length <= most:
                raise UserError(f"serving.contexts: {length} is not above k = {self.k} and at most {most} tokens")
        asked = self.sizes.contexts or (self.k + self.margin, 4 * self.k, *LENGTHS, self.longest)
        return tuple(sorted({length for length in asked if self.k < length <= most} or {self.above}))

    def plan(self) -> list[tuple[str, int, Callable[[str, int], ProbeResult]]]:
        """(name, tokens, probe): names are "kind-where", and unique."""
        below, above, crossing = self.below, self.above, self.below + self.margin // 2
        boundary = [("boundary", above, self._boundary)] if min(CHUNKS) < above else []
        questions = [(f"answers-{length}", length, self._answers) for length in self.lengths()]
        probes = [
            ("answers-below", below, self._control),
            *(probe for probe in questions if probe[1] <= FAR * self.k),
            *boundary,
            ("repeat-above", above, self._repeat),
            ("cached-below", below, self._cached),
            ("cached-above", above, self._cached),
            ("crowd-below", below, self._crowd),
            ("crowd-above", above, self._crowd),
            ("ragged-above", above, self._ragged),
            ("decode-below", below - self.sizes.generated, self._decode),
            ("decode-crossing", crossing, self._decode),
            ("decode-above", above, self._decode),
            ("pieces-above", above, self._pieces),
            ("dense-above", above, self._dense),
            *(probe for probe in questions if probe[1] > FAR * self.k),
        ]
        return [probe for probe in probes if probe[0].partition("-")[0] in self.sizes.probes]

    def begin(self) -> None:
        """Finds out what the endpoint can do, and how many characters make a token.

        UserError if it has neither completions nor chats.
        """
        text = self.writer.plain(self.below)
        try:
            self.writer.learn(text, self._counted(text))
        except Refused as error:
            raise UserError(f"{error}; the check needs /completions or /chat/completions") from error
        self.has_logprobs = self._takes(lambda: self.endpoint.complete(self.model, "Once upon a", 1))
        self.has_echo = self.has_logprobs and self._takes(lambda: self.endpoint.score(self.model, "Once upon a time"))

    def _counted(self, text: str) -> int:
        try:
            return self.endpoint.complete(self.model, text, 1, logprobs=False).prompt_tokens
        except Refused:
            return self.endpoint.chat(self.model, text, 1).prompt_tokens

    def _takes(self, request: Callable[[], Reply]) -> bool:
        try:
            request()
        except Refused:
            return False
        return True

    # known answers

    def _control(self, name: str, tokens: int) -> ProbeResult:
        """The way of asking that the model answers better below k, where attention is dense."""
        scores = {}
        for way in ("chat", "completion"):
            try:
                scores[way] = self._ask(way, self.model, self._questions(tokens))
            except Refused:
                continue
            if 4 * scores[way] >= 3 * self.sizes.questions:
                break
        way = max(scores, key=lambda key: scores[key], default="")
        right, asked = scores.get(way, 0), self.sizes.questions
        details = {"way": way, "right": right, "asked": asked}
        if 2 * right < asked:
            line = f"not measurable with this model: {right} of {asked} right even below k"
            return ProbeResult(name, tokens, None, line, details)
        return ProbeResult(name, tokens, False, f"{right} of {asked} right ({way})", details)

    def _answers(self, name: str, tokens: int) -> ProbeResult:
        return self._judged(name, tokens, self._questions(tokens))

    def _boundary(self, name: str, tokens: int) -> ProbeResult:
        """Hidden lines that begin in one chunk of the prompt and end in the next."""
        places = [place for place in CHUNKS if place < tokens]
        depths = [(place - LINE // 2) / tokens for place in places]
        rounds = -(-self.sizes.questions // len(places))
        return self._judged(name, tokens, [q for _ in range(rounds) for q in self.writer.questions(tokens, depths)])

    def _judged(self, name: str, tokens: int, questions: Sequence[Question]) -> ProbeResult:
        """The answers beside those to all shorter prompts with which nothing is wrong.

        If these are better, beside those of dense attention.
        """
        below = self.results.get("answers-below")
        if below is None or below.found is None:
            return ProbeResult(name, tokens, None, "not measurable with this model: it does not answer below k either")
        shorter = [
            r.details
            for r in self.results.values()
            if r.name.startswith("answers") and r.tokens < tokens and r.found is False
        ]
        control, of = (sum(details[key] for details in shorter) for key in ("right", "asked"))
        chance = CHANCE / sum(probe in (self._answers, self._boundary) for *_, probe in self.plan())
        way, asked = below.details["way"], len(questions)
        right = self._ask(way, self.model, questions)
        details = {"right": right, "asked": asked}
        found, line = worse(right, asked, control, of, chance), f"{right} of {asked} right"
        if found and self.dense:
            details["dense"] = self._ask(way, self.dense, questions)
            found, line = (
                worse(right, asked, details["dense"], asked, chance),
                f"{line}, {details['dense']} by {self.dense}",
            )
        return ProbeResult(name, tokens, found, line, details)

    def _questions(self, tokens: int) -> list[Question]:
        """Half of a text's hidden lines are asked for, then those of another text."""
        codes = min(CODES, (self.below - REST) // LINE)
        questions: list[Question] = []
        while len(questions) < self.sizes.questions:
            depths = [(number + 0.5) / codes for number in range(codes)]
            questions += self.writer.questions(tokens, depths)[len(questions) % 2 :: 2]
        return questions[: self.sizes.questions]

    def _ask(self, way: str, model: str, questions: Sequence[Question]) -> int:
        """How many questions are answered right."""
        right = 0
        for question in questions:
            if way == "chat":
                reply = self.endpoint.chat(model, question.message, self.sizes.answer_tokens)
            else:
                reply = self.endpoint.complete(model, question.beginning, self.sizes.answer_tokens, logprobs=False)
            right += question.is_answered_by(reply.text)
        return right

    # comparisons

    def _repeat(self, name: str, tokens: int) -> ProbeResult:
        return self._compared(name, tokens, lambda text: (self._again(text), self._generate(text)))

    def _again(self, text: str) -> Reply:
        """The answer to a text that the cache knows."""
        self._generate(text)
        return self._generate(text)

    def _cached(self, name: str, tokens: int) -> ProbeResult:
        return self._compared(name, tokens, lambda text: (self._generate(text), self._generate(text)))

    def _crowd(self, name: str, tokens: int) -> ProbeResult:
        return self._compared(name, tokens, lambda text: self._among(text, [tokens] * self.sizes.crowd))

    def _ragged(self, name: str, tokens: int) -> ProbeResult:
        room = self.longest - 4 * self.sizes.generated
        lengths = [self.below if i % 2 else min(2 * tokens, room) for i in range(self.sizes.crowd)]
        return self._compared(name, tokens, lambda text: self._among(text, lengths))

    def _among(self, text: str, lengths: Sequence[int]) -> tuple[Reply, Reply]:
        """The answer alone and among others. All texts are known to the cache, so that they are generated together."""
        alone, others = self._again(text), [self.writer.plain(length) for length in lengths]
        for other in others:
            self._generate(other)
        return alone, self.endpoint.crowd(self.model, text, others, self.sizes.generated)

    def _compared(self, name: str, tokens: int, ask: Callable[[str], tuple[Reply, Reply]]) -> ProbeResult:
        if not self.has_logprobs:
            return ProbeResult(
                name, tokens, None, "not measurable: the endpoint's completions give no log probabilities"
            )
        differences = [answers_differ(*ask(self.writer.plain(tokens))) for _ in range(self.sizes.texts)]
        return self._differ(name, tokens, [d for d in differences if not math.isnan(d)])

    def _decode(self, name: str, tokens: int) -> ProbeResult:
        return self._read_again(name, tokens, lambda text: self._generate(text))

    def _pieces(self, name: str, tokens: int) -> ProbeResult:
        """A prompt that has come in pieces, each found in the cache by the next, as a chat grows."""

        def grown(text: str) -> Reply:
            for share in (0.3, 0.55, 0.8):
                self.endpoint.complete(self.model, text[: int(len(text) * share)], 1)
            return self._generate(text)

        return self._read_again(name, tokens, grown)

    def _read_again(self, name: str, tokens: int, generate: Callable[[str], Reply]) -> ProbeResult:
        """Generated tokens, and the same tokens read as the end of a prompt."""
        if not self.has_echo:
            return ProbeResult(
                name, tokens, None, "not measurable: the endpoint's completions have no echo with logprobs"
            )
        differences = []
        for _ in range(TRIES * self.sizes.texts):
            text = self.writer.plain(tokens)
            answer = generate(text)
            read = self.endpoint.score(self.model, text + answer.text)
            begin = answer.prompt_tokens
            same = [a == b for a, b in zip(answer.tokens, read.tokens[begin:-1])]
            count = same.index(False) if False in same else len(same)
            if count >= min(FEWEST, self.sizes.generated):
                differences.append(mean_difference(answer.logprobs[:count], read.logprobs[begin:][:count]))
            if len(differences) == self.sizes.texts:
                break
        return self._differ(name, tokens, differences)

    def _differ(self, name: str, tokens: int, differences: Sequence[float]) -> ProbeResult:
        if not differences:
            return ProbeResult(name, tokens, None, "not measurable: no answer could be compared token by token")
        most = max(differences)
        line = f"log probabilities differ by {most:.4f} nats a token"
        return ProbeResult(name, tokens, most > self.sizes.tolerance, line, {"differences": [*differences]})

    def _dense(self, name: str, tokens: int) -> ProbeResult:
        """A prompt's log probabilities beside those of dense attention: equal up to k tokens, and different after."""
        if not self.dense or not self.has_echo:
            why = "the endpoint's completions have no echo with logprobs" if self.dense else "no dense twin is served"
            return ProbeResult(name, tokens, None, f"not measurable: {why} (--set serving.dense=ID names it)")
        text = self.writer.plain(tokens)
        sparse, dense = (self.endpoint.score(model, text).logprobs for model in (self.model, self.dense))
        before, after = (mean_difference(sparse[part], dense[part]) for part in (slice(self.k), slice(self.k, None)))
        early, selects = before > self.sizes.tolerance, after > max(EXACT, 2 * before)
        details = {"before": before, "after": after, "early": early}
        line = f"differs from {self.dense} by {before:.4f} nats a token up to k, by {after:.4f} after"
        return ProbeResult(name, tokens, early or not selects, line, details)

    def _generate(self, text: str) -> Reply:
        return self.endpoint.complete(self.model, text, self.sizes.generated)


def check_serving(
    checker: Checker,
    finished: Sequence[Mapping[str, Any]] = (),
    on_progress: OnProgress | None = None,
    on_result: Callable[[ProbeResult], None] | None = None,
) -> list[ProbeResult]:
    """The results of all probes, in their order. finished: those of an earlier run, which are not asked again.

    on_result: called with each new result, so that a caller can keep what a broken run has measured. UserError if the
    endpoint is down, too slow, refuses after all retries, or answers nonsense.
    """
    plan, checker.results = checker.plan(), {one["name"]: ProbeResult(**one) for one in finished}
    if all(name in checker.results for name, *_ in plan):
        return [checker.results[name] for name, *_ in plan]
    checker.begin()
    for number, (name, tokens, probe) in enumerate(plan):
        if name in checker.results:
            continue
        if on_progress is not None:
            on_progress(f"{name} in {tokens:,} tokens", number, len(plan))
        try:
            result = probe(name, tokens)
        except Refused as error:
            result = ProbeResult(name, tokens, None, f"not measurable: {error}")
        checker.results[name] = result
        if on_result is not None:
            on_result(result)
    return [checker.results[name] for name, *_ in plan]
