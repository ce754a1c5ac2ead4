"""Tasks: questions with a way to judge the answers, all under one contract (`contract.Task`).

One file per task: `retrieval` (needles in real text), `dialogue` (short turns about real functions), `completion`
(bodies of held-out functions), `short` (small questions with choices), `ruler/` for those with long contexts, and
`problems/` for those of post-training. What they share: documents and their split (`documents`), an encoder that never
mistakes text for a marker (`encoder`), and the ids around the texts of a conversation (`turns`).
"""

from tokensieve.tasks.contract import Answer, Example, Prompt, Score, Task
from tokensieve.tasks.documents import Document, Documents, Split, parse_python, stable_fraction
from tokensieve.tasks.encoder import PlainEncoder, encoder, end_tokens
from tokensieve.tasks.turns import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, Turns

__all__ = [
    "ASSISTANT",
    "BOS",
    "END_THINK",
    "EOS",
    "PAD",
    "THINK",
    "USER",
    "Answer",
    "Document",
    "Documents",
    "Example",
    "PlainEncoder",
    "Prompt",
    "Score",
    "Split",
    "Task",
    "Turns",
    "encoder",
    "end_tokens",
    "parse_python",
    "stable_fraction",
]
