"""The time that one more token takes, by the length of the context.

Legend: B rows (1), T cached tokens, X width of a cache entry.
"""

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tokensieve import cost
from tokensieve.evals.evaluation import evaluating
from tokensieve.evals.progress import OnProgress
from tokensieve.model import DecoderForCausalLM, LatentCache
from tokensieve.model.positions import check_positions

CHUNK = 2048  # tokens of one prefill pass
NOISE = 0.01  # of a repeated entry, relative to the entries' spread
SPARE = 64  # tokens of room beyond the context, so that no timed step has to grow a buffer


@torch.no_grad()
def prefilled(model: DecoderForCausalLM, prompt_S: Tensor) -> LatentCache:
    """A cache of the prompt's tokens, read in chunks."""
    cache = LatentCache(reserve=len(prompt_S))
    for chunk in prompt_S.to(model.lm_head.weight.device)[None].split(CHUNK, dim=1):
        model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def stretched(real: LatentCache, tokens: int, seed: int = 0) -> LatentCache:
    """A cache of exactly `tokens` tokens: the entries of a real one (or its first ones), then the same again and again.

    The cost of a decode step depends on the number of entries, and through the selection a little on their values:
    equal scores are told apart by position, which takes longer. So the entries are real ones, and repeated ones get 1%
    of noise, because exact copies would tie.
    """
    cache = LatentCache(reserve=tokens + SPARE)
    cache.room_for(tokens)
    device = real.entries_BTW[0].device
    length = real.get_seq_length()
    place = torch.arange(tokens, device=device) % length
    generator = torch.Generator(device).manual_seed(seed)

    def copies(held_BTX: Tensor) -> Tensor:
        entries = held_BTX[:, place]
        noise = torch.randn(entries[:, length:].shape, generator=generator, device=device)
        entries[:, length:] += (NOISE * held_BTX[:, :length].float().std() * noise).to(entries.dtype)
        return entries

    for layer, (latent, index) in enumerate(zip(real.entries_BTW, real.index_BTD, strict=True)):
        cache.store(layer, copies(latent), None if index is None else copies(index))
    cache.advance(tokens)
    return cache


def decode_ms(
    models: Mapping[str, DecoderForCausalLM],
    prompt_S: Tensor,
    contexts: Sequence[int],
    rounds: int = 7,
    burst: int = 3,
    on_progress: OnProgress | None = None,
) -> dict[str, dict[str, float]]:
    """{model's name: {str(context): milliseconds to decode one token after `context` cached ones}}, batch 1.

    The models take turns, `burst` tokens each, so that a machine that slows down slows all of them. The figure is the
    median over `rounds` of a turn's mean. Every step starts from the same cache: what a step appends is cropped.
    `prompt_S`: tokens to fill the caches with (`stretched`).

    Raises:
        UserError: a context past a model's positions.
    """
    for name, model in models.items():
        what = f"{name}: decoding after {max(contexts)} tokens is"
        check_positions(model.config.max_position_embeddings, max(contexts) + 1, what, "time shorter contexts")
    results: dict[str, dict[str, float]] = {name: {} for name in models}
    real = {}
    for name, model in models.items():
        with evaluating(model):
            real[name] = prefilled(model, prompt_S[: max(contexts)])
    for done, tokens in enumerate(contexts, 1):
        caches = {name: stretched(cache, tokens) for name, cache in real.items()}
        turns: dict[str, list[float]] = {name: [] for name in models}
        for number in range(rounds + 1):
            for name, model in models.items():
                with evaluating(model):
                    taken = _decode(model, prompt_S[:1], caches[name], tokens, burst)
                if number:  # the first turn warms up
                    turns[name].append(taken)
        for name, seconds in turns.items():
            results[name][str(tokens)] = 1000 * statistics.median(seconds)
        if on_progress is not None:
            on_progress(f"decoding after {tokens:,} tokens", done, len(contexts))
    return results


def _decode(model: DecoderForCausalLM, token: Tensor, cache: LatentCache, tokens: int, steps: int) -> float:
    """Seconds per step."""
    ids = token.to(model.lm_head.weight.device)[None]
    _finish(ids)
    begin = time.perf_counter()
    for _ in range(steps):
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(tokens)
    _finish(ids)
    return (time.perf_counter() - begin) / steps


def _finish(on: Tensor) -> None:
    if on.device.type == "cuda":
        torch.cuda.synchronize(on.device)


def cache_reads(shape: cost.Shape, contexts: Sequence[int], layout: cost.Layout) -> dict[str, dict[str, int]]:
    """Bytes of cache that one token reads, of all layers, by the context: {"dense", "sparse": {str(context): bytes}}.

    "index_keys" are those of sparse that go to the index keys: one for each token of the context, and none as long as
    the context is at most k. shape: a sparse model's.
    """
    reads = {
        name: {str(c): cost.decode_cache_bytes(shape, c, layout, sparse=name == "sparse") for c in contexts}
        for name in ("dense", "sparse")
    }
    key = shape.layers * cost.index_bytes(shape, layout)
    return reads | {"index_keys": {str(c): c * key if c > shape.top_k else 0 for c in contexts}}
