"""The model card of a checkpoint: README.md, for the hub and for whoever opens the folder.

It says where the model comes from, on what it was trained, how to run it, what was measured and what was not. A later
card takes over from the card of its source what only that knows: base, licence, earlier training. Those lie in the
front matter, under `tokensieve`. A README.md that is there already stays, and that of the base goes along under another
name.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from tokensieve.checkpoint import gguf
from tokensieve.checkpoint.export import exportable
from tokensieve.families import family_of, is_sparse, model_config
from tokensieve.files import write_text

log = logging.getLogger("tokensieve")

CARD, BASE_CARD = "README.md", "README-base.md"
OWN = "tokensieve"  # key of the front matter that a card of ours has
_HUB = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")  # a folder in the Hugging Face cache
_LICENCE = ("license", "license_name", "license_link")
ADAPTER = """## Use

This folder holds an adapter (PEFT) and the indexers, not the model. The command of its run writes the model with the
adapter merged into it, with `--resume --set lora.merge=true`."""
_NOT_STATED = "not stated: see the base"


def write_card(
    folder: Path,
    source: Path | None,
    replace: bool = False,
    trained: Path | None = None,
    adapted: dict[str, Any] | None = None,
) -> None:
    """Writes README.md into a checkpoint folder that is complete otherwise.

    `source`: the folder or file that the model was read from, if any. `trained`: the checkpoint of the run that made
    the model, `folder` itself unless given; if it is one, data and figures are those of the run so far. `replace`: also
    if there is a card, which otherwise stays. `adapted`: the config of the model whose adapter the folder holds, if it
    holds no model.
    """
    trained = trained or folder
    card = folder / CARD
    if card.exists() and not replace:
        log.info("%s stays as it is; remove it to get a new card with the next save", card)
        return
    raw, stage = adapted or _json(folder / "config.json"), _stage(trained)
    there = source.resolve() if source is not None and source.is_dir() else None
    before = _front_matter(there / CARD) if there is not None else {}
    if source is not None and gguf.is_gguf(source):
        before = {"license": gguf.read_licence(source)}
    known: dict[str, Any] = before[OWN] if isinstance(before.get(OWN), dict) else {}
    if replace and there != folder.resolve():
        (folder / BASE_CARD).unlink(missing_ok=True)  # of another base
    if there not in (None, folder.resolve()):
        _take_along(there / (BASE_CARD if known else CARD), folder / BASE_CARD)
    earlier = list(known.get("training") or ())
    beside = there is not None and there.parent == folder.resolve().parent
    if beside and stage and earlier and earlier[-1]["stage"] == stage["stage"]:
        earlier = earlier[:-1]  # an earlier checkpoint of the same run, whose steps are part of this one's
    begun = _json(trained.parent / "config.json").get("model")  # what pretraining went on with, if it did
    pretrained = stage is not None and stage["stage"] == "pretrain" and not begun
    own_run = there is not None and known and _stage(there)  # its checkpoint is no base: what it began from is one
    base = None if pretrained else known.get("base") or (None if own_run else _name_of(source))
    hub = None if pretrained else before.get("base_model") if known else base if base and "/" in base else None
    training = [*([] if pretrained else earlier), *([stage] if stage else [])]
    licence = {} if pretrained else _licence(before, folder)
    config = model_config(raw)
    reasons = exportable(config)
    front: dict[str, Any] = dict(
        **licence,
        base_model=hub,
        datasets=sorted({d.removeprefix("hf:") for t in training for d in t["data"] if d.startswith("hf:")}) or None,
        library_name="tokensieve" if any("transformers" in reason for reason in reasons) else "transformers",
        pipeline_tag="text-generation",
        tags=[raw["model_type"], *(["sparse-attention", "deepseek-sparse-attention"] if is_sparse(config) else [])],
        **{OWN: {"base": base, "training": training}},
    )
    run = trained if stage else there if there is not None and _stage(there) else None
    figures = _json(run.parent / "metrics.json") if run is not None else {}
    parts = [
        f"---\n{ModelCardData(**front).to_yaml()}\n---\n# {folder.resolve().name}",
        _what(raw, config, base, training),
        _origin(base, licence, training, (folder / BASE_CARD).exists()),
        _use(folder) if adapted is None else ADAPTER,
        _measured(figures),
        *([_others(reasons)] if adapted is None else []),
    ]
    write_text(card, "\n\n".join(parts) + "\n")


def add_to_card(folder: Path, title: str, lines: list[str]) -> None:
    """Adds a section to the end of a folder's card."""
    text = (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, f"{text}\n## {title}\n\n" + "".join(f"- {line}\n" for line in lines))


def _take_along(card: Path, target: Path) -> None:
    if card.is_file() and not target.exists():
        shutil.copyfile(card, target)


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except (OSError, ValueError, TypeError, YAMLError) as error:
        log.warning("%s: its metadata cannot be read (%s); the new card lacks them", path, " ".join(str(error).split()))
        return {}


def _name_of(source: Path | None) -> str | None:
    """owner/name of a model from the hub, else the name of the folder or file. Paths of a machine say nothing here."""
    if source is None or not (source.is_file() or (source / "config.json").is_file()):
        return None  # a tokenizer alone is no base
    cached = _HUB.search(str(source.resolve()) + "/") or _HUB.search(str(source) + "/")
    return f"{cached[1]}/{cached[2]}" if cached else source.resolve().name


def _licence(before: dict[str, Any], folder: Path) -> dict[str, str]:
    stated = {key: str(before[key]) for key in _LICENCE if before.get(key)}
    files = sorted(path.name for path in folder.glob("LICEN[SC]E*"))
    if not stated and files:
        stated = {"license": "other", "license_name": "see-license-file", "license_link": files[0]}
    return stated


def _stage(folder: Path) -> dict[str, Any] | None:
    """Stage, steps, tokens and data of the run that `folder` is a checkpoint of; None if it is of none."""
    run, step = _json(folder.parent / "config.json"), _json(folder / "state.json").get("step")
    if not isinstance(step, int) or not {"stage", "phases", "data"} <= run.keys():
        return None
    left, tokens = step, 0
    for phase in run["phases"]:
        steps = min(left, phase["steps"])
        left, tokens = left - steps, tokens + steps * phase["sequences"] * phase["context"]
    data = [_data_name(entry["source"]) for entry in run["data"]["sources"]]
    return {"stage": run["stage"], "steps": step, "tokens": tokens, "data": data}


def _data_name(source: str) -> str:
    return source if source.startswith("hf:") else Path(source).name


def _what(raw: dict[str, Any], config: Any, base: str | None, training: list[dict[str, Any]]) -> str:
    if not is_sparse(config):
        return f"A dense model of type `{raw['model_type']}`, {config.num_hidden_layers} layers."
    trained = {entry["stage"] for entry in training} & {"warmup", "adapt"}
    layers = config.num_hidden_layers
    owners = sum(family_of(config).has_indexer(config, layer) for layer in range(layers))
    lines = [
        f"A model of type `{raw['model_type']}` with DeepSeek Sparse Attention: in {owners} of its {layers} layers a "
        "lightning indexer chooses the keys that a query attends to."
        + ("" if owners == layers else " The others read the keys of the layer before."),
        "",
        "| | |",
        "|---|---|",
        f"| keys per query (k) | {_keys(config)} |",
        f"| index heads | {config.index_n_heads} of width {config.index_head_dim} |",
        f"| arithmetic of the index scores | {config.index_dtype} |" if hasattr(config, "index_dtype") else "",
    ]
    if not trained and base is not None:
        lines += ["", "No training of the indexers is recorded here. If they are new, they choose at random."]
    return "\n".join(line for place, line in enumerate(lines) if line or not place or lines[place - 1])


def _keys(config: Any) -> str:
    ks = family_of(config).top_k(config)
    if len({*ks}) == 1:
        return str(config.index_topk)
    return f"{config.index_topk} in the mean; by layer {', '.join(map(str, ks))}"


def _origin(base: str | None, licence: dict[str, str], training: list[dict[str, Any]], base_card: bool) -> str:
    name = "none: trained from nothing" if training and base is None else base or "not recorded"
    stated = " ".join(licence.values()) or (_NOT_STATED if base else "not stated")
    lines = ["## Origin", "", f"- Base: {name}" + (f", whose card is [{BASE_CARD}]({BASE_CARD})" if base_card else "")]
    lines += [f"- Licence: {stated}"]
    for entry in training:
        lines += [
            f"- Training, `{entry['stage']}`: {entry['steps']} steps, {entry['tokens']:,} tokens of "
            f"{', '.join(f'`{source}`' for source in entry['data'])}"
        ]
    return "\n".join(lines if training else [*lines, "- Training with tokensieve: none recorded; data: see the base"])


def _use(folder: Path) -> str:
    name = folder.resolve().name
    return "\n".join(
        [
            "## Use",
            "",
            "```console",
            f'$ tokensieve generate {name} --prompt "Once upon a time"',
            f"$ tokensieve serve {name}",
            f"$ tokensieve eval {name}",
            "```",
            "",
            "```python",
            "import tokensieve",
            "",
            f'model, tokenizer = tokensieve.load("{name}"), tokensieve.load_tokenizer("{name}")',
            "```",
        ]
    )


def _measured(figures: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _flat(figures)]
    table = ["| figure of its run (metrics.json) | |", "|---|---|", *rows] if rows else ["Nothing is recorded here."]
    return "\n".join(
        [
            "## Measured",
            "",
            *table,
            "",
            "Not measured: whatever is not listed, among it benchmarks, long contexts past those of training, other "
            "languages than those of the data, and safety. `tokensieve eval` measures what sparse attention costs.",
        ]
    )


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Names and values of the numbers and words in nested figures; lists and the machine are left out."""
    if isinstance(value, dict):
        return [
            pair for key, inner in value.items() if key != "run" for pair in _flat(inner, f"{name}.{key}".strip("."))
        ]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return [(name, shown)] if isinstance(value, str | int | float) else []


def _others(reasons: list[str]) -> str:
    lines = [f"- Cannot open it: {reason}" for reason in reasons]
    return "\n".join(["## Other programs", "", *(lines or ["transformers, vLLM and SGLang read this format."])])
