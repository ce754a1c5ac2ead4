"""What failed probes of `serving` point to: a table, read from above; the first row that fits is the diagnosis."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokensieve.evals.serving import FAR, ProbeResult


@dataclass(frozen=True)
class Fault:
    """A row: it fits if all probes of `failed` found something and none of `clean` did.

    Probes are named by kind and place as in `places`. known: reports with the same symptom.
    """

    failed: tuple[str, ...]
    clean: tuple[str, ...]
    cause: str
    known: str = ""


FAULTS = (
    Fault(
        ("dense ignored",),
        (),
        "k is ignored: past k tokens the model still attends to every key. Is index_topk read, and sparse attention "
        "switched on?",
    ),
    Fault(
        ("dense early",),
        (),
        "keys are left out before there are k of them: k is smaller than --k, or selection counts places that hold no "
        "token",
    ),
    Fault(
        ("cached below", "cached above"),
        (),
        "a prompt that the cache knows is answered otherwise, below k too: the prefix cache is at fault, not selection",
    ),
    Fault(
        ("cached above",),
        ("cached below",),
        "index keys are missing or wrong for prefixes from the cache: entries are restored, and the indexer's "
        "keys are not",
        "sglang #39692",
    ),
    Fault(
        ("pieces above",),
        ("decode above",),
        "a prompt that grows in pieces is answered otherwise than one read at once: index keys of earlier chunks",
    ),
    Fault(
        ("crowd below",),
        (),
        "an answer depends on what runs beside it, below k too: batching is at fault, not selection",
    ),
    Fault(
        ("crowd above",),
        ("crowd below",),
        "an answer depends on what runs beside it once keys are selected: indices, page tables or lengths of another "
        "sequence are read",
    ),
    Fault(
        ("ragged above",),
        ("crowd above",),
        "an answer depends on the length of its neighbours: the top-k runs over padding that is not masked",
    ),
    Fault(
        ("repeat above",),
        ("cached above",),
        "the same prompt is answered differently each time: the top-k is not deterministic, or memory is read that "
        "nobody wrote",
        "flashinfer #2584",
    ),
    Fault(
        ("decode below",),
        (),
        "generated tokens and the same tokens as a prompt differ, below k too: the decode path is at fault, not "
        "selection",
    ),
    Fault(
        ("decode crossing", "decode above"),
        (),
        "decoding selects other keys than reading a prompt does, from k tokens on: index keys of generated tokens, "
        "lengths, or the scores on pages",
        "vllm #47827",
    ),
    Fault(
        ("decode above",),
        (),
        "decoding selects other keys than reading a prompt does, from some length past k on: the scores on pages",
        "vllm #47827",
    ),
    Fault(
        ("boundary",),
        ("answers above",),
        "what lies across the border of two chunks of a prompt is lost: positions or ranges of a chunk",
    ),
    Fault(
        ("answers above",),
        (),
        "the wrong keys are selected, in every path: the RoPE layout of the indexer (half-split in DeepSeek-V3.2, "
        "interleaved in GLM-5), its LayerNorm or ReLU, or the query latent before its norm",
        "mlx-lm #1453, sglang #13495, vllm #28968, ik_llama.cpp #2099",
    ),
    Fault(
        ("answers far",),
        (),
        "answers fail from a length far past k on: positions past the original context (YaRN of the indexer), integers "
        "of 32 bits, or a buffer of scores that is too short. Or the model itself: compare with dense attention",
        "vllm #46856",
    ),
)


def failed_places(results: Sequence[ProbeResult], k: int) -> set[str]:
    """The names by which `Fault` calls probes that found something."""
    failed = set()
    for result in results:
        if not result.found:
            continue
        kind, _, place = result.name.partition("-")
        if kind == "answers":
            selected = result.tokens <= FAR * k or "dense" in result.details  # dense attention did answer
            failed.add("answers above" if selected else "answers far")
        elif kind == "dense":
            failed.add("dense early" if result.details["early"] else "dense ignored")
        else:
            failed.add(f"{kind} {place}".strip())
    return failed


def diagnose(results: Sequence[ProbeResult], k: int) -> Fault | None:
    """What is probably wrong; None if no probe found anything."""
    failed: Collection[str] = failed_places(results, k)
    if not failed:
        return None
    fits = (f for f in FAULTS if set(f.failed) <= set(failed) and not set(f.clean) & set(failed))
    unknown = Fault((), (), f"no known fault has these symptoms: {', '.join(sorted(failed))}")
    return next(fits, unknown)
