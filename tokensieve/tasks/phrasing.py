"""How a needle is said and how it is asked for: a small grammar with a held-out half.

A statement is opening + clause + ending, a question is opening + form + closing; each clause is filled with a noun
("access code"), a connective ("for"), a verb ("is"), a key ("amber-falcon") and a value ("493817"). Every pool is a
`Pool`: evaluation draws from `held_out` only and training never does, so a score measures use of the context and
not memory of a phrasing. Keys and values are split by a hash that is the same on every machine.
"""

import random
from dataclasses import dataclass

from tokensieve.tasks.documents import stable_fraction
from tokensieve.tasks.words import ADJECTIVES, SALAD, SYLLABLES, THINGS

HELD_OUT_SHARE = 0.1  # of keys and of values


@dataclass(frozen=True)
class Pool:
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def draw(self, rng: random.Random, held_out: bool) -> str:
        return rng.choice(self.held_out if held_out else self.train)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.replace("\n", " ").split(",") if item.strip())


NOUNS = Pool(
    _items("""access code, secret number, locker combination, badge id, door code, pin, pin code, passcode,
    vault number, ticket number, serial number, account number, order number, room number, flight number,
    licence number, phone extension, reference number, magic number, security code, activation code, unlock code,
    tracking number, customer id, user id, session id, build number, port, confirmation number, membership number,
    case number, invoice number, lot number, product id, safe combination, gate code, alarm code, part number,
    secret code, key code, lock code, launch code, special number, lucky number, code, number, secret, id, token,
    password, identifier, registration number, batch number, device id, station number, record number, seat number,
    patch level, timeout, limit, offset, checksum, quota"""),
    _items("""entry code, hidden number, employee id, docket number, voucher number, bin number, recovery code,
    parcel number, keypad combination, inventory number, approval code, contract number, meter reading, folder id,
    dial code"""),
)
OPENINGS = Pool(
    tuple(
        _items("""Note: , Remember: , Remember that, For the record: , Please note that, Important: , By the way: ,
    Keep in mind that, FYI: , Reminder: , Do not forget: , Attention: , Hint: , One more thing: , As agreed: ,
    Please remember that, It is known that, Be aware that, NB: , Warning: , Fact: , Info: , Memo: , NOTE: , Psst: ,
    To be clear: , Update: , As everyone knows: , It was decided that, We learned that, Secret: , Good to know: ,
    Please keep this: , Write this down: , The manual says that, It turns out that, Sidenote: , New: , Log: ,
    Correction: , Everyone should know that, Internal: """)
    ),
    tuple(
        _items("""Take note: , Bear in mind that, For later: , Heads up: , Notice: , Be advised that, Keep this handy: ,
    The team confirmed that, Just so you know: , Mark this: , It should be known that""")
    ),
)
CONNECTIVES = Pool(
    _items("""for, for, for, for, of, of, of, belonging to, assigned to, used by, given to, registered to,
    associated with, linked to, that goes with, chosen for, connected with, meant for, used for, stored for,
    known for, set for"""),
    _items("held by, issued to, tied to, reserved for, kept for, attached to"),
)
VERBS = Pool(
    _items("""is, is, is, is, is set to, equals, was changed to, is now, has been set to, reads, is recorded as,
    is still, will be, must be, turned out to be, is exactly, was, should be, has become, is defined as"""),
    _items("was fixed at, comes to, has to be, is given as, stands at, is known to be"),
)
CLAUSES = Pool(
    _lines("""the {n} {of} {k} {is} {v}
    the {n} {of} {k} {is} {v}
    the {n} {of} {k} {is} {v}
    the {n} {of} {k} {is} {v}
    the {n} {of} {k} {is} {v}
    the {n} {of} {k} {is} {v}
    the {n} {of} {k}: {v}
    {k} has the {n} {v}
    {k}'s {n} {is} {v}
    {k} uses {v} as its {n}
    for {k}, the {n} {is} {v}
    the {n} you need for {k} {is} {v}
    {k} was assigned the {n} {v}
    to unlock {k}, enter the {n} {v}
    when asked about {k}, give the {n} {v}
    {k}: the {n} {is} {v}
    anyone looking for the {n} {of} {k} should use {v}
    we set the {n} {of} {k} to {v}
    somebody wrote down the {n} {of} {k}: {v}
    {k} has {n} {v}
    {k} -> {n} {v}
    {n} ({k}) = {v}
    {n} [{k}]: {v}
    {k} | {n} | {v}
    {k} = {v}
    {k}: {v}
    {k} {is} {v}
    {k}.{n} = {v}
    if you see {k}, its {n} {is} {v}
    {k} carries the {n} {v}
    our {n} {of} {k} {is} {v}
    my {n} {of} {k} {is} {v}
    the correct {n} {of} {k} {is} {v}
    the {n} {is} {v} for {k}
    {v} is the {n} {of} {k}
    use {v} as the {n} {of} {k}
    the number {v} is the {n} {of} {k}"""),
    _lines("""{k} goes with the {n} {v}
    the {n} recorded {of} {k} {is} {v}
    in the case of {k}, the {n} {is} {v}
    the {n} listed under {k} {is} {v}
    {k} keeps {v} as its {n}
    the present {n} {of} {k} {is} {v}
    {k} received the {n} {v}
    as for {k}, its {n} {is} {v}
    it says here that the {n} {of} {k} {is} {v}"""),
)
ENDINGS = Pool(
    (".",) * 5
    + ("", "", "!", ";", " (checked).", ", as agreed.", " since Monday.", ", do not share it.")
    + (" until further notice.", ", please keep it.", " from now on.", ", no more and no less.", " as of today."),
    (", as noted.", " for the time being.", ", keep it safe.", " this week."),
)
FORMS = Pool(
    _lines("""What is the {n} {of} {k}?
    What is the {n} {of} {k}?
    What is the {n} {of} {k}?
    What's the {n} {of} {k}?
    What was the {n} {of} {k}?
    Which {n} belongs to {k}?
    Which {n} does {k} have?
    What {n} does {k} use?
    Tell me the {n} {of} {k}.
    Give the {n} {of} {k}.
    Give me the {n} {of} {k}, please.
    Find the {n} {of} {k}.
    Look up the {n} {of} {k}.
    The {n} {of} {k}?
    The {n} {of} {k} is
    State the {n} {of} {k}.
    Do you know the {n} {of} {k}?
    I need the {n} {of} {k}.
    I forgot the {n} {of} {k}. What is it?
    Please recall the {n} {of} {k}.
    Repeat the {n} {of} {k}.
    What is {k}'s {n}?
    For {k}, what is the {n}?
    {k}: which {n}?
    {k}?
    What number goes with {k}?
    What value does the text give for {k}?
    Which number is mentioned with {k}?
    What does the text say about {k}?
    Which {n} was given for {k}?
    Name the {n} {of} {k}.
    Complete: the {n} {of} {k} is"""),
    _lines("""Can you tell me the {n} {of} {k}?
    Could you read out the {n} {of} {k}?
    What {n} should I use for {k}?
    Show me the {n} {of} {k}.
    Remind me what the {n} {of} {k} was.
    Which {n} is listed for {k}?
    How does the {n} {of} {k} read?
    I am looking for the {n} {of} {k}.
    What does it say is the {n} {of} {k}?"""),
)
QUESTION_OPENINGS = Pool(
    ("",) * 10
    + tuple(
        _items("""Question: , Now: , According to the text above: , From the document above: , Q: , Quick question: ,
    Please answer: , Using the text: , Read the text above. , Back to the text: , Here is my question: , Hello! , Hi. ,
    Search the text. , About the file above: , In the text above: , Test: , So: , Okay. """)
    ),
    ("", "", "", "Based on the listing above: ", "One question: ", "Going by the file: ", "As stated above: "),
)
CLOSINGS = Pool(
    ("",) * 8
    + (" Answer with the number only.", " Reply with digits only.", " Just the number.", " Only the value, please.")
    + (" Be brief.", " Thanks!", " It is in the text.", " Answer:", " Write the number.", " No explanation."),
    ("", "", "", " Return only the number.", " Nothing but the digits, please.", " It was mentioned above."),
)
# What surrounds a key, in the statement and in the question alike.
FRAMES = Pool(
    ("{}",) * 40
    + ("project {}", "the {} team", "server {}", "customer {}", "agent {}", "the {} account", "user {}", "box {}")
    + ("the {} door", "the {} lab", "station {}", "service {}", "ship {}", "the {} file", "city {}"),
    ("{}",) * 20 + ("warehouse {}", "the {} cabinet", "group {}"),
)
# Lines that name a key and not its value.
MENTIONS = (
    "{k} was checked yesterday.",
    "Ask the office about {k}.",
    "{k} is described elsewhere.",
    "The owner of {k} has moved.",
    "Nobody has seen {k} since.",
    "See also {k}.",
    "The {n} of {k} must be kept secret.",
    "Do not confuse {k} with the others.",
    "{k} has no further entries.",
)
PREFIXES = ("# ",) * 10 + (
    "",
    "",
    "",
    "#: ",
    "## ",
    "// ",
    "* ",
    "- ",
    "; ",
    "-- ",
    "    # ",
    "        # ",
    "> ",
    "#   ",
)
GENERIC_NOUNS = ("number", "value", "code", "figure", "entry", "digits")

# A fixed set of phrasings can be learned by heart. Then an unseen one hides the key, or hides the value behind words
# that never stood before one. So much of training's text is word salad: as a whole line around the key (and the value),
# or in place of one part of a phrasing. Half of the salad's words do not exist. Then only the context tells which words
# are the key, and that the digits belong to it.
SALAD_SHARE = 0.3  # of training's lines and questions that are salad, and of the parts of the others


def salad(rng: random.Random, low: int, high: int) -> str:
    """`low` to `high` words that mean nothing."""

    def word() -> str:
        return rng.choice(SALAD) if rng.random() < 0.5 else "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3)))

    return " ".join(word() for _ in range(rng.randint(low, high)))


def part(rng: random.Random, split: Pool, held_out: bool, most: int) -> str:
    """One of `split`, or in training sometimes up to `most` words of salad in its place."""
    if not held_out and rng.random() < SALAD_SHARE:
        return salad(rng, 1, most)
    return split.draw(rng, held_out)


@dataclass(frozen=True)
class Key:
    """The name of a needle. `words` decide whether it is held out; `style` only decides how it is written."""

    words: tuple[str, ...]
    style: str
    frame: str

    def render(self, framed: bool = True) -> str:
        words, style = self.words, self.style
        if style in ("'", '"', "`"):
            text = f"{style}{'-'.join(words)}{style}"
        else:
            text = style.join(words)
        return self.frame.format(text) if framed else text


STYLES = ("-",) * 14 + ("_",) * 4 + (" ",) * 3 + ("'", '"', "`")


def is_held_out_key(words: tuple[str, ...]) -> bool:
    return stable_fraction("key " + " ".join(words)) < HELD_OUT_SHARE


def is_held_out_value(value: str) -> bool:
    return stable_fraction("value " + value) < HELD_OUT_SHARE


def draw_keys(rng: random.Random, count: int, held_out: bool) -> list[Key]:
    """`count` keys of distinct words; in one training draw of eight they share words, so that all of a key counts."""
    crowded = not held_out and count > 1 and rng.random() < 0.125
    adjectives = rng.sample(ADJECTIVES, 3 + count // 2) if crowded else ADJECTIVES
    things = rng.sample(THINGS, 3 + count // 2) if crowded else THINGS
    keys: dict[tuple[str, ...], Key] = {}
    while len(keys) < count:
        words: tuple[str, ...] = (rng.choice(adjectives), rng.choice(things))
        shape = rng.random()
        if shape < 0.1:
            words = (rng.choice(ADJECTIVES), *words)
        elif shape < 0.16:
            words = (words[-1], str(rng.randint(2, 99)))
        # "amber-falcon" beside "tall-amber-falcon" would make the question for the first ambiguous.
        taken = any(words[-2:] == other[-2:] for other in keys)
        if not taken and is_held_out_key(words) == held_out:
            keys[words] = Key(words, rng.choice(STYLES), FRAMES.draw(rng, held_out))
    return list(keys.values())


def draw_value(rng: random.Random, held_out: bool) -> str:
    """Digits without a leading zero: six of them in 7 draws of 10, otherwise four to eight."""
    while True:
        digits = 6 if rng.random() < 0.7 else rng.choice((4, 5, 7, 8))
        value = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if is_held_out_value(value) == held_out:
            return value


def statement(rng: random.Random, key: Key, noun: str, value: str, held_out: bool) -> str:
    """One line that tells the value of the key, newline included."""
    prefix = rng.choice(PREFIXES)
    if not held_out and rng.random() < SALAD_SHARE:
        words = f"{salad(rng, 0, 6)} {key.render()} {salad(rng, 0, 6)} {value}".strip()
        return f"{prefix}{' '.join(words.split())}{rng.choice(ENDINGS.train)}\n"
    clause = CLAUSES.draw(rng, held_out)
    bare = not held_out and rng.random() < 0.4
    opening = "" if bare else part(rng, OPENINGS, held_out, 4) + " "
    if clause[0] != "{" and (bare or (opening.endswith(": ") and rng.random() < 0.5)):
        clause = clause[0].upper() + clause[1:]
    of, is_ = part(rng, CONNECTIVES, held_out, 2), part(rng, VERBS, held_out, 3)
    text = clause.format(n=noun, k=key.render(), v=value, of=of, **{"is": is_})
    return f"{prefix}{opening}{text}{ENDINGS.draw(rng, held_out)}\n"


def question(rng: random.Random, key: Key, noun: str, held_out: bool) -> str:
    """A question for the value of the key, worded independently of the statement."""
    if not held_out and rng.random() < SALAD_SHARE:
        words = " ".join(f"{salad(rng, 0, 9)} {key.render(rng.random() < 0.8)} {salad(rng, 0, 6)}".split())
        return words + rng.choice(("?", "?", ".", "", ":"))
    framed = True
    if not held_out:
        if rng.random() < 0.15:
            noun = rng.choice(GENERIC_NOUNS)
        framed = rng.random() < 0.8
    form = FORMS.draw(rng, held_out)
    text = form.format(n=noun, k=key.render(framed), of=part(rng, CONNECTIVES, held_out, 2))
    opening = part(rng, QUESTION_OPENINGS, held_out, 4)
    opening += " " if opening and not opening.endswith(" ") else ""
    closing = "" if text[-1] not in ".?" else CLOSINGS.draw(rng, held_out)
    return opening + text + closing


def answer(key: Key, value: str) -> str:
    """What the assistant says: the key as the statement writes it, without its frame, and the value."""
    return f"{key.render(framed=False)}: {value}"


def mention(rng: random.Random, key: Key, noun: str) -> str:
    """One line that names the key and not its value, newline included."""
    return f"{rng.choice(PREFIXES)}{rng.choice(MENTIONS).format(k=key.render(), n=noun)}\n"
