"""Checkpoints of Hugging Face trainers, from which these can go on."""

import json
from pathlib import Path

from tokensieve.files import write_json


def make_resumable(checkpoint: Path) -> None:
    """Writes the rotary fields of a trainer's checkpoint in the form of transformers 5, which `load` reads too.

    A trainer that resumes reads config.json without the model's class, and fails on the published form of YaRN,
    `rope_scaling`, for want of the fields that only the class has. An adapter's checkpoint has no config.json, and
    needs none.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if rope := fields.pop("rope_scaling", None):
        write_json(path, fields | {"rope_parameters": rope | {"rope_theta": fields.pop("rope_theta")}})
