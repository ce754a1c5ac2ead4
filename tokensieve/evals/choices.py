"""How a model chooses: the choice that it holds most likely after the prompt.

Legend: C choices, S tokens of the longest one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.evals.evaluation import Evaluation, Record, evaluating, repeated
from tokensieve.evals.progress import OnProgress
from tokensieve.model import LatentCache
from tokensieve.tasks import Answer, PlainEncoder, encoder
from tokensieve.tasks.short import ChoiceExample, Choices


def choose(
    model: Any,
    tokenizer: Any,
    task: Choices,
    examples: Sequence[ChoiceExample],
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """The answer to each example is the choice with the largest log-likelihood, summed over its tokens; of equals the
    first one. The prompt is read once.

    Raises:
        UserError: no examples.
    """
    if not examples:
        raise UserError(f"no examples of {task.name} to score; ask for at least one")
    encode, records = encoder(tokenizer), []
    with evaluating(model), torch.inference_mode():
        for done, example in enumerate(examples, 1):
            found = likelihoods(model, encode, example)
            answer = Answer(example.choices[found.index(max(found))])
            records.append(Record(example, answer, task.score(example, answer)))
            if on_progress is not None:
                on_progress(task.name, done, len(examples))
    return Evaluation(tuple(records))


def likelihoods(model: Any, encode: PlainEncoder, example: ChoiceExample) -> list[float]:
    """The log-likelihood of each choice after the prompt, in nats."""
    prompt, choices = encode.prompt(example.prompt), [encode(choice) for choice in example.choices]
    width, device = max(map(len, choices)), next(model.parameters()).device
    cache = LatentCache()
    if len(prompt) > 1:
        model(torch.tensor([prompt[:-1]], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = repeated(cache, len(choices))
    # Shorter choices are filled up at the end, which nothing before it sees.
    filled = torch.tensor([choice + choice[-1:] * (width - len(choice)) for choice in choices], device=device)
    before = torch.full((len(choices), 1), prompt[-1], device=device)
    logits = model(torch.cat((before, filled[:, :-1]), 1), past_key_values=cache, use_cache=True).logits
    of_tokens_CS = logits.float().log_softmax(-1).gather(2, filled[..., None])[..., 0]
    return [float(row[: len(choice)].sum()) for row, choice in zip(of_tokens_CS, choices, strict=True)]
