"""The command line: every command is a typed function, and what it does lies in the package.

A command imports what it needs when it runs, so that `--help` and refusals answer at once. Standard output carries
results, and standard error the log and the messages. Exit status: 0 done, 2 bad input (one line with the thing and the
remedy), 130 interrupted.
"""

from tokensieve.cli.missing import report_missing

# Each adds its commands, in the order in which --help shows them.
with report_missing():
    from tokensieve.cli import training  # noqa: I001
    from tokensieve.cli import posttraining
    from tokensieve.cli import checkpoints
    from tokensieve.cli import sharing
    from tokensieve.cli import profiling
    from tokensieve.cli import pricing
    from tokensieve.cli import planning
    from tokensieve.cli import reporting
    from tokensieve.cli import text
    from tokensieve.cli import serving
    from tokensieve.cli import bench
    from tokensieve.cli.program import app, main

__all__ = [
    "app", "bench", "checkpoints", "main", "planning", "posttraining", "pricing", "profiling", "reporting", "serving",
    "sharing", "text", "training",
]  # fmt: skip
