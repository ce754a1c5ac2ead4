"""Chat and completion: the examples, and how generated answers are scored."""

import pytest
import torch

from tests.support.models import TakesOptions
from tokensieve.config import UserError
from tokensieve.evals import evaluate
from tokensieve.tasks import Answer, Document, Documents, completion, dialogue
from tokensieve.tasks.completion import Completion
from tokensieve.tasks.dialogue import Chat

# chat

SOURCE = '''
def add(first, second=1):
    """Add two numbers and say so."""
    print("adding")
    return first + second

class Box:
    def open(self):
        """Open the box without a sound."""
        return self

def undocumented():
    return 1
'''


def test_chat_examples_come_from_documented_functions():
    made = list(dialogue.conversations([Document("box", SOURCE), Document("prose", "not python at all {")]))
    functions = [e for e in made if e.kind != "talk"]
    assert [e.name for e in functions] == ["box.add", "box.open"]
    for example in functions:
        if example.kind == "explain":
            assert example.answer in ("Add two numbers and say so.", "Open the box without a sound.")
        else:
            assert "add(first, second=1)" in example.question and dialogue.parses(example.answer)
    assert len(made) > 30 and all(e.question and e.answer for e in made)
    assert all(e.prompt == ({"role": "user", "content": e.question},) for e in made)


def test_chat_examples_are_framed(encode):
    for name, ids in dialogue.encoded_examples([Document("box", SOURCE)], encode):
        assert name and ids[:2] == [0, 3] and ids[-1] == 1 and ids.count(1) == 1 and ids.count(4) == 1


class Writer(torch.nn.Module):
    """Generates fixed ids after every prompt, padded to one width."""

    def __init__(self, answers, pad=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.model = TakesOptions()
        self.answers, self.pad, self.prompts = answers, pad, []

    def generate(self, ids, attention_mask=None, **_):
        rows = []
        for place, row in enumerate(ids.tolist()):
            real = row if attention_mask is None else [t for t, m in zip(row, attention_mask[place], strict=True) if m]
            self.prompts.append(real)
            rows.append(self.answers(real))
        width = max(map(len, rows))
        return torch.cat([ids, torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])], dim=1)


def test_chat_evaluation_counts_whole_answers(encode):
    kinds = {"explain": "What?", "write": "Write."}
    prompts = [dialogue._example(kind, kind, question, "") for kind, question in kinds.items()]
    task = Chat(Documents())

    def answered(*ids: int):
        return evaluate(Writer(lambda _: list(ids)), encode, task, prompts)

    assert answered(*encode("x = 1"), 1).value == 1.0
    broken = answered(*encode("def ("), 1)
    assert (broken.value, broken.part("ended"), broken.part("parsed")) == (0.5, 1.0, 0.0)
    assert [record.answer for record in broken.records] == [Answer("def (")] * 2
    endless = answered(*encode("endless"))
    assert endless.value == endless.part("ended") == 0.0 and endless.part("something") is None
    with pytest.raises(UserError, match="no chat prompts"):
        task.examples("test", 3)


def test_nothing_that_is_asked_for_has_its_own_reason(encode):
    boxes = Documents(test=[Document("box", SOURCE)])
    for task in (Chat(boxes), Completion(encode, boxes)):
        with pytest.raises(UserError, match=f"0 examples of {task.name} were asked for; ask for at least one"):
            task.examples("test", 0)
    with pytest.raises(UserError, match=r"no examples of difficulty 0; use 1 to 2, or Chat\(talk=True\)"):
        Chat(boxes).examples("test", 3, 0)
    with pytest.raises(UserError, match="no examples of difficulty -1; use 0 to 2"):
        Chat(boxes, talk=True).examples("test", 3, -1)
    assert {e.kind for e in Chat(boxes, talk=True).examples("test", 3, 0)} == {"talk"}


# completion

MODULE = '''"""A module."""
LIMIT = 3


def documented(
    first: int,
    second: dict[str, int] = {},
) -> int:
    """Say what it does.

    At length.
    """
    return first


class Thing:
    def long(self):
        # a comment of the body
        a = 1
        b = 2
        return a + b

    def short(self):
        return 1

    def one_line(self): return """x"""
'''


def test_completion_examples_split_functions_before_their_body():
    made = {e.name: e for e in completion.functions([Document("m", MODULE), Document("prose", "{")])}
    assert list(made) == ["m.documented", "m.long"]
    assert made["m.documented"].head.endswith('    At length.\n    """\n')
    assert made["m.long"].head == "    def long(self):\n" and made["m.long"].indent == 4
    for example in made.values():
        assert MODULE.startswith(example.before + example.head)


def test_a_completion_ends_where_the_function_ends():
    example = next(e for e in completion.functions([Document("m", MODULE)]) if e.name == "m.long")
    text = "        a = 1\n\n        return a\n\n    def next(self):\n        pass\n"
    assert completion.finish(example, text, complete=True) == "        a = 1\n\n        return a\n"
    assert completion.finish(example, "        a = 1\n        b = (", complete=False) == "        a = 1"
    assert completion.parses(example.head, "        a = 1")
    assert not completion.parses(example.head, "        a = (")
    assert not completion.parses(example.head, "")
    assert not completion.parses('def f():\n    """Doc."""\n', "")
    assert completion.parses('def f():\n    """Doc."""\n', "    return '''\nx\n'''")


LOOP = "            'x', 'x',\n" * 20


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ("        a = 1\n        b = [\n" + LOOP, "        a = 1"),
        ("        if a:\n            b = 1\n        else:\n            c = '", "        if a:\n            b = 1"),
        ("        for a in b:\n            c()\n            d(", "        for a in b:\n            c()"),
        ("        a = 1\n        b = 2\n", "        a = 1\n        b = 2"),
        ("        return [\n" + LOOP, ""),  # the first statement never ends
        ('        """A docstring."""\n        return (\n', ""),  # no statement beside the docstring
        ("        # comments alone\n        # are nothing\n        x", ""),
        ("        return 1", ""),  # no whole line
    ],
)
def test_a_completion_that_the_budget_cut_is_judged_to_its_last_whole_statement(body: str, cut: str):
    example = next(e for e in completion.functions([Document("m", MODULE)]) if e.name == "m.long")
    assert completion.finish(example, body, complete=False) == cut
    assert completion.parses(example.head, cut) == bool(cut)


def test_a_completion_that_the_model_ended_is_judged_whole():
    example = next(e for e in completion.functions([Document("m", MODULE)]) if e.name == "m.long")
    broken = "        a = 1\n        b = (\n"
    assert completion.finish(example, broken, complete=True) == broken  # by the end marker
    assert completion.finish(example, broken + "    x = 2\n", complete=False) == broken.rstrip("\n")  # by a dedent
    assert not completion.parses(example.head, broken)


def test_real_bodies_parse(corpus):
    texts = {d.name: d.text for d in corpus}
    made = list(completion.functions(corpus))
    bodies = [(e, texts[e.name.split(".")[0]][len(e.before) + len(e.head) :]) for e in made]
    good = [completion.parses(e.head, completion.finish(e, body, complete=True)) for e, body in bodies]
    assert len(made) > 200 and sum(good) / len(good) > 0.98


def test_prompts_fit_and_begin_with_a_line(encode, corpus):
    for example in list(completion.functions(corpus))[::20]:
        ids = completion.prompt_ids(encode, example, 400)
        text = encode.decode(ids[1:])
        assert ids[0] == 0 and (example.before + example.head).endswith(text)
        assert len(ids) <= max(400, 1 + len(encode(example.head)))
        before = (example.before + example.head).removesuffix(text)
        assert not before or before.endswith("\n")


def test_completion_evaluation(encode):
    bodies = {"m.documented": "    return 2\n\n\nx = 1\n", "m.long": "        return (\n"}

    def answer(prompt: list[int]) -> list[int]:
        text = encode.decode(prompt)
        return encode(bodies["m.long" if "long" in text else "m.documented"])

    model, task = Writer(answer), Completion(encode, Documents(test=[Document("m", MODULE)]), prompt_tokens=300)
    examples = sorted(task.examples("test", 9), key=lambda example: example.name)
    result = evaluate(model, encode, task, examples, batch_size=16)
    assert result.value == 0.5
    judged = [completion.finish(r.example, r.answer.text, r.answer.ended) for r in result.records]
    assert judged == ["    return 2\n\n", "        return ("]
    assert sorted(model.prompts) == sorted(completion.prompt_ids(encode, e, 300) for e in examples)
    assert [len(task.examples("test", 9, lines)) for lines in (1, 4)] == [1, 2]
    with pytest.raises(UserError, match="no functions"):
        task.examples("train", 9)
