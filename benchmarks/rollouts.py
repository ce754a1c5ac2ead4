"""Rollouts by the engine beside Hugging Face generate, and how far training agrees with them.

    python benchmarks/rollouts.py                    # 16 prompts x 8 samples, all 128 sequences in one batch
    python benchmarks/rollouts.py --quick --device cpu

Prints tokens per second of both, measured one after the other on the same prompts, and the mean and largest difference
of the log probabilities of answer tokens between training and rollout, with the rollout's selections replayed and
without.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import tokensieve
from tokensieve.data import read_documents
from tokensieve.engine import Sampling
from tokensieve.machine import choose_device
from tokensieve.model import DecoderForCausalLM
from tokensieve.posttrain import Rollout, Rollouts, replaying
from tokensieve.report import environment


def texts(tokenizer, count: int, tokens: int) -> list[tuple[int, ...]]:
    """The beginnings of `count` held-out Python sources that have so many tokens."""
    found: list[tuple[int, ...]] = []
    for document in read_documents("python", "test"):
        ids = tokenizer(document.text).input_ids
        if len(ids) >= tokens:
            found.append(tuple(ids[:tokens]))
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} sources have {tokens} tokens; ask for fewer or shorter ones")


def timed(device: torch.device, run):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begin


def differences(model: DecoderForCausalLM, rollouts: list[Rollout]) -> torch.Tensor:
    """|log probability in a pass of training - in the rollout| of every answer token; one row at a time."""
    found = []
    with torch.no_grad(), tokensieve.training(model.train(), "adapt"):
        for rollout in rollouts:
            ids = torch.tensor([[*rollout.prompt, *rollout.answer]], device=model.device)
            logits = model(ids).logits[0, len(rollout.prompt) - 1 : -1].float()
            told = torch.tensor(rollout.logprobs, device=model.device)
            taken = logits.log_softmax(-1).gather(1, ids[0, len(rollout.prompt) :, None])[:, 0]
            found.append((taken - told).abs().cpu())
    model.eval()
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="sparse")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--compared", type=int, default=16, help="rollouts whose log probabilities are compared")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="2 prompts x 2 samples of 700 tokens")
    parser.add_argument("--out", type=Path, default=Path("runs/rollouts.json"))
    sizes = parser.parse_args()
    if sizes.quick:
        sizes.prompts, sizes.samples, sizes.tokens, sizes.new, sizes.compared = 2, 2, 700, 8, 4
    device = torch.device(choose_device(sizes.device))
    model = tokensieve.load(sizes.model, device=device)
    tokenizer = tokensieve.load_tokenizer(sizes.model)
    prompts, rows = texts(tokenizer, sizes.prompts, sizes.tokens), sizes.prompts * sizes.samples
    sampling = Sampling(max_tokens=sizes.new, temperature=1.0, ignore_eos=True)
    engine = Rollouts(model, tokenizer, sizes.tokens + sizes.new, at_once=rows)
    figures: dict[str, dict[str, float]] = {}
    if device.type == "cuda":  # kernels are compiled and steps recorded once
        engine.sample(prompts, sizes.samples, sampling)
    groups, seconds = timed(device, lambda: engine.sample(prompts, sizes.samples, sampling))
    figures["engine"] = {"seconds": seconds, "tokens_per_second": rows * sizes.new / seconds}
    ids = torch.tensor([prompt for prompt in prompts for _ in range(sizes.samples)], device=device)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}
    if device.type == "cuda":
        model.generate(ids, max_new_tokens=4, **options)
    _, seconds = timed(device, lambda: model.generate(ids, max_new_tokens=sizes.new, **options))
    figures["generate"] = {"seconds": seconds, "tokens_per_second": rows * sizes.new / seconds}
    some = [rollout for group in groups for rollout in group][:: max(1, rows // sizes.compared)][: sizes.compared]
    with replaying(model, some):
        replayed = differences(model, some)
    free = differences(model, some)
    for name, found in (("replayed", replayed), ("not replayed", free)):
        figures[name] = {"mean": float(found.mean()), "largest": float(found.max()), "tokens": len(found)}
    print(f"{rows} sequences, {sizes.tokens} + {sizes.new} tokens, k = {model.top_k}, {model.dtype} on {device}")
    for name in ("engine", "generate"):
        print(f"{name:>12}  {figures[name]['tokens_per_second']:.1f} tokens/s, {figures[name]['seconds']:.1f} s")
    ratio = figures["engine"]["tokens_per_second"] / figures["generate"]["tokens_per_second"]
    print(f"{'':>12}  {ratio:.2f} times as fast")
    for name in ("replayed", "not replayed"):
        row = figures[name]
        print(f"{name:>12}  mean {row['mean']:.2e}, largest {row['largest']:.2e} nats over {row['tokens']} tokens")
    sizes.out.parent.mkdir(parents=True, exist_ok=True)
    sizes.out.write_text(json.dumps({"figures": figures, "run": environment()}, indent=1))


if __name__ == "__main__":
    main()
