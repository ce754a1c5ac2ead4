"""Markers in prompts and answers of DeepSeek's chat formats: thinking, and the notations of tool calls.

DeepSeek-V3.1 and V3.2-Exp write
`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>`.
DeepSeek-V3, V3-0324 and R1 write `function<｜tool▁sep｜>NAME`, a line's end and the arguments in a block of Markdown
between the same markers. DeepSeek-V3.2 (`encoding_dsv32.py` beside its weights) writes `<｜DSML｜function_calls>`
around `<｜DSML｜invoke name="NAME">`, and inside it, for each argument,
`<｜DSML｜parameter name="NAME" string="true|false">VALUE</｜DSML｜parameter>`.
"""

import re
from dataclasses import dataclass

THINK, END_THINK = "<think>", "</think>"
NO_THOUGHT = f"{THINK}\n\n{END_THINK}\n\n"  # as R1 writes it if it answers without a thought

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
KIND = "function"  # the only kind of tool; the notation of V3 names it
FENCE, FENCE_END = "```json", "```"
NAMED = re.compile(r"\s*(?P<name>[^\s`{]+)(?P<rest>[\s`{].*)", re.DOTALL)  # a name and its block

DSML = "｜DSML｜"
INVOKE, INVOKE_END = f'<{DSML}invoke name="', f"</{DSML}invoke>"
PARAMETER = re.compile(
    f'<{DSML}parameter name="(?P<name>[^"]*)" string="(?P<string>true|false)">(?P<value>.*?)</{DSML}parameter>',
    re.DOTALL,
)

# The marker that begins a block of calls, and the one that ends it, in all notations.
BLOCKS = {CALLS_BEGIN: CALLS_END, f"<{DSML}function_calls>": f"</{DSML}function_calls>"}


@dataclass(frozen=True)
class Notation:
    """A call as texts and markers: `before` NAME `between` ARGUMENTS `after`. apart: between two calls."""

    before: tuple[str, ...]
    between: tuple[str, ...]
    after: tuple[str, ...]
    apart: tuple[str, ...] = ()


# The notations whose arguments are JSON. Calls can be required in them, because a grammar can say what they are.
V31 = Notation((CALL_BEGIN,), (CALL_SEPARATOR,), (CALL_END,))
V3 = Notation((CALL_BEGIN, KIND, CALL_SEPARATOR), (f"\n{FENCE}\n",), (f"\n{FENCE_END}", CALL_END), ("\n",))
