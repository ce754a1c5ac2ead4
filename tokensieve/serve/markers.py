"""Markers in prompts and answers of DeepSeek's chat formats: thinking, and the two notations of tool calls.

DeepSeek-V3.1 and V3.2-Exp write
`<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>`.
DeepSeek-V3.2 (`encoding_dsv32.py` beside its weights) writes `<｜DSML｜function_calls>` around
`<｜DSML｜invoke name="NAME">`, and inside it, for each argument,
`<｜DSML｜parameter name="NAME" string="true|false">VALUE</｜DSML｜parameter>`.
"""

import re

THINK, END_THINK = "<think>", "</think>"

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"

DSML = "｜DSML｜"
INVOKE, INVOKE_END = f'<{DSML}invoke name="', f"</{DSML}invoke>"
PARAMETER = re.compile(
    f'<{DSML}parameter name="(?P<name>[^"]*)" string="(?P<string>true|false)">(?P<value>.*?)</{DSML}parameter>',
    re.DOTALL,
)

# The marker that begins a block of calls, and the one that ends it, in both notations.
BLOCKS = {CALLS_BEGIN: CALLS_END, f"<{DSML}function_calls>": f"</{DSML}function_calls>"}
