"""GRPO on TRL, with our engine's rollouts and the keys that they read.

TRL has the algorithm: advantages, clipping, the off-policy sequence mask (`off_policy_mask_threshold`) and the unbiased
KL (`use_bias_correction_kl`) of DeepSeek-V3.2. What is ours: rollouts, replay, and the indexers' loss, equation (4).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from tokensieve.config import UserError
from tokensieve.engine import EngineConfig, Sampling
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.posttrain.replay import replaying
from tokensieve.posttrain.rollouts import Rollout, Rollouts
from tokensieve.tasks import encoder
from tokensieve.train.callbacks import training


class SparseGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for a model of tokensieve: it samples with the engine, and trains on what the engine read.

    Metrics beside TRL's, logged in every step: `rollout/logp_difference`, the mean over the step's answer tokens of
    |log probability in training - in the rollout|, both under the same weights; `rollout/queries_past_k`, the share of
    the tokens that see more than k keys, for which selection means anything.

    prompts: a column "prompt" of texts or messages, and whatever the rewards need. tokens: of the longest prompt and
    answer together. selection: "indexer", or "dense" for the dense twin, as a dense model is: nothing is selected or
        replayed, and no indexer learns.
    replay: False leaves selection to the training pass, to see what that does. config: the engine's; its size follows
    from `tokens` and the batch unless given.

    Raises:
        UserError: a temperature that is not 1 (the rollout's log probabilities are those before it), vLLM or tools,
            which have other rollouts, or prompts too long for `tokens`.
    """

    def __init__(
        self,
        model: DecoderForCausalLM,
        tokenizer: Any,
        reward_funcs: Sequence[Callable[..., list[float | None]]],
        args: GRPOConfig,
        prompts: Dataset,
        *,
        tokens: int,
        selection: str = "indexer",
        replay: bool = True,
        config: EngineConfig | None = None,
    ):
        if args.temperature != 1:
            raise UserError(f"temperature is {args.temperature}; rollouts of the engine train at 1 alone")
        if args.use_vllm:
            raise UserError("use_vllm excludes the engine's rollouts; leave it out, or use TRL's own GRPOTrainer")
        self.selects = model.is_sparse and selection != "dense"
        self.replays = replay and self.selects
        self._encode, self._answers = encoder(tokenizer), args.max_completion_length
        self._longest = tokens
        self.latest: list[Rollout] = []
        self._sampled_at = -1
        self._sampler = Rollouts(
            model,
            tokenizer,
            tokens,
            at_once=args.generation_batch_size or 128,
            selector=selection if self.selects else "dense",
            keep_selection=self.replays,
            config=config,
        )
        super().__init__(
            model=model,
            reward_funcs=list(reward_funcs),
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            rollout_func=sample_for,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, in which the indexers learn equation (4) and every pass reads what the rollout read."""
        with ExitStack() as stack:
            if not self.selects:
                if self.model.is_sparse:
                    stack.enter_context(selecting(self.model, "dense"))
                return super().train(*args, **kwargs)
            callback = stack.enter_context(training(self.model, "adapt"))
            self.add_callback(callback)
            stack.callback(self.remove_callback, callback)
            if self.replays:
                stack.enter_context(replaying(self.model, lambda: self.latest))
            return super().train(*args, **kwargs)

    def sample(self, prompts: Sequence[Any]) -> list[Rollout]:
        """One rollout for each of the prompts; equal neighbours are samples of one."""
        groups: list[tuple[list[int], int]] = []
        for prompt in prompts:
            ids = list(self._encode.prompt(prompt))
            if groups and groups[-1][0] == ids:
                groups[-1] = ids, groups[-1][1] + 1
            else:
                groups.append((ids, 1))
        longest = max(len(ids) for ids, _ in groups)
        if longest + self._answers > self._longest:
            raise UserError(
                f"a prompt has {longest} tokens, and with {self._answers} of an answer more than the {self._longest} "
                "that rollouts have room for; give more tokens, or shorter prompts"
            )
        samples = {count for _, count in groups}
        sampling = Sampling(
            max_tokens=self._answers, temperature=1.0, top_p=self.args.top_p, top_k=self.args.top_k or 0,
            min_p=self.args.min_p or 0.0, repetition_penalty=self.args.repetition_penalty,
        )  # fmt: skip
        seed = self.args.seed + self.state.global_step
        found: list[Rollout] = []
        if len(samples) == 1:
            for group in self._sampler.sample([ids for ids, _ in groups], samples.pop(), sampling, seed):
                found += group
        else:
            for place, (ids, count) in enumerate(groups):
                found += self._sampler.sample([ids], count, sampling, seed + place)[0]
        self.latest, self._sampled_at = found, self.state.global_step
        return found

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, attention_mask: Tensor,
                                           logits_to_keep: int, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if model is not self.ref_model and self._sampled_at == self.state.global_step:
            self._compare(input_ids, attention_mask, found[0].detach(), logits_to_keep)
        return found

    def _compare(self, ids_BS: Tensor, mask_BS: Tensor, logps_BC: Tensor, answers: int) -> None:
        known = {(*rollout.prompt, *rollout.answer): rollout for rollout in self.latest}
        differences, past, total = [], 0, 0
        for ids, mask, logps in zip(ids_BS.tolist(), mask_BS.bool().tolist(), logps_BC, strict=True):
            rollout = known.get(tuple(token for token, real in zip(ids, mask, strict=True) if real))
            if rollout is None:  # a row that was masked as cut off
                continue
            told = torch.tensor(rollout.logprobs, device=logps.device)
            differences.append((logps[: len(told)].float() - told).abs())
            tokens = len(rollout.prompt) + len(rollout.answer)
            past, total = past + max(0, tokens - self.model.top_k), total + tokens
        if differences:
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics["rollout/logp_difference"].append(float(torch.cat(differences).mean()))
            metrics["rollout/queries_past_k"].append(past / total)


def sample_for(prompts: list[Any], trainer: SparseGRPOTrainer) -> dict[str, list[Any]]:
    """The rollouts in the form in which TRL takes them."""
    rollouts = trainer.sample(prompts)
    return {
        "prompt_ids": [list(rollout.prompt) for rollout in rollouts],
        "completion_ids": [list(rollout.answer) for rollout in rollouts],
        "logprobs": [list(rollout.logprobs) for rollout in rollouts],
    }
