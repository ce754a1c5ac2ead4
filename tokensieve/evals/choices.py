"""How a model chooses: the choice that it holds most likely after the prompt.

Legend: B prompts, T tokens of each; R choices of all of them, S tokens of the longest one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.evals.evaluation import Evaluation, Record, evaluating
from tokensieve.evals.progress import OnProgress
from tokensieve.model import LatentCache
from tokensieve.tasks import Answer, PlainEncoder, encoder
from tokensieve.tasks.short import ChoiceExample, Choices

TOGETHER = 32  # prompts that are read at once: one by one, a GPU waits for the host


def choose(
    model: Any,
    tokenizer: Any,
    task: Choices,
    examples: Sequence[ChoiceExample],
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """The answer to each example is the choice with the largest log-likelihood, summed over its tokens; of equals the
    first one. A prompt is read once, and up to `TOGETHER` prompts of one length are read at once.

    Raises:
        UserError: no examples.
    """
    if not examples:
        raise UserError(f"no examples of {task.name} to score; ask for at least one")
    encode, answers = encoder(tokenizer), dict[int, Answer]()
    alike: dict[tuple[int, int], list[int]] = {}
    for place, example in enumerate(examples):
        alike.setdefault((len(encode.prompt(example.prompt)), len(example.choices)), []).append(place)
    with evaluating(model), torch.inference_mode():
        for places in (group[i : i + TOGETHER] for group in alike.values() for i in range(0, len(group), TOGETHER)):
            for place, found in zip(places, likelihoods(model, encode, [examples[p] for p in places]), strict=True):
                answers[place] = Answer(examples[place].choices[found.index(max(found))])
            if on_progress is not None:
                on_progress(task.name, len(answers), len(examples))
    pairs = [(example, answers[place]) for place, example in enumerate(examples)]
    return Evaluation(tuple(Record(example, answer, task.score(example, answer)) for example, answer in pairs))


def likelihoods(model: Any, encode: PlainEncoder, examples: Sequence[ChoiceExample]) -> list[list[float]]:
    """The log-likelihood of each choice after its example's prompt, in nats.

    The prompts have one length in tokens, and equally many choices each: nothing is padded before a choice.
    """
    prompts_BT = [encode.prompt(example.prompt) for example in examples]
    choices = [encode(choice) for example in examples for choice in example.choices]
    width, count, device = max(map(len, choices)), len(examples[0].choices), next(model.parameters()).device
    ids_BT, cache = torch.tensor(prompts_BT, device=device), LatentCache()
    if ids_BT.shape[1] > 1:
        model(ids_BT[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(count)
    # Shorter choices are filled up at the end, which nothing before it sees.
    filled = torch.tensor([choice + choice[-1:] * (width - len(choice)) for choice in choices], device=device)
    before = ids_BT[:, -1:].repeat_interleave(count, 0)
    logits = model(torch.cat((before, filled[:, :-1]), 1), past_key_values=cache, use_cache=True).logits
    of_tokens_RS = logits.float().log_softmax(-1).gather(2, filled[..., None])[..., 0]
    found = [float(row[: len(choice)].sum()) for row, choice in zip(of_tokens_RS, choices, strict=True)]
    return [found[i : i + count] for i in range(0, len(found), count)]
