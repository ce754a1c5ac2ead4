"""GRPO on TRL, with our engine's rollouts and the keys that they read.

TRL has the algorithm: advantages, clipping, and the off-policy sequence mask of DeepSeek-V3.2
(`off_policy_mask_threshold`). What is ours: rollouts, replay, and the indexers' loss, equation (4).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tokensieve.config import UserError
from tokensieve.engine import EngineConfig, Sampling
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.posttrain.replay import replaying
from tokensieve.posttrain.rollouts import Respond, Rollout, Rollouts
from tokensieve.tasks import encoder
from tokensieve.train.callbacks import indexers_learn

# Options of TRL's own generation, of which neither the engine nor our prompts hear.
UNHEARD = (
    "generation_kwargs chat_template_kwargs cache_implementation max_tool_calling_iterations "
    "use_transformers_continuous_batching"
).split()

MOST_AT_ONCE = 128  # answers that run together, unless another number is given


class SparseGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for a model of tokensieve: it samples with the engine, and trains on what the engine read.

    Metrics beside TRL's, logged in every step: `rollout/logp_difference`, the mean over the step's answer tokens of
    |log probability in training - in the rollout|, both under the same weights; `rollout/queries_past_k`, the share of
    the tokens that see more than k keys, for which selection means anything.

    prompts: a column "prompt" of texts, messages or token ids, and whatever the rewards need; held_out: the same, to
        evaluate on.
    tokens: of the longest prompt and answer together.
    selection: "indexer", or "dense" for the dense twin, as a dense model is: nothing is selected or replayed, and no
        indexer learns.
    replay: False leaves selection to the training pass, to see what that does.
    config: the engine's; its size follows from `tokens` and the batch unless given.
    at_once: answers that run together, at most; None: all of a step, and no more than `MOST_AT_ONCE`.
    respond, result_tokens: the results of tools, as in `Rollouts`. `max_completion_length` is then for all turns of the
        model together. Rewards get each rollout's `mask` as "written".
    model, peft_config: LoRA adapters learn if PEFT's wrapper of a model is given (`tokensieve.train.lora.adapted`
        yields one), or a config for a new one. The engine runs their layers as training does. The indexers learn whole,
        so the adapter has to save them: modules_to_save=["indexer"].

    With `beta` TRL's loss has a KL towards a reference, which is logged as `reference/kl`: the model with its adapters
    switched off, or a copy as it was before training. The reference reads the keys that the rollout read, as the policy
    does. The KL then compares two sets of weights on equal inputs, and none of it comes from keys that only one of the
    two would select; what is selected is the indexers' part, which equation (4) trains. With replay=False each selects
    for itself.

    Raises:
        UserError: what these rollouts cannot honour: a temperature that is not 1 (their log probabilities are those
            before it), options of TRL's own generation, vLLM, a reference that follows the model (`sync_ref_model`), a
            reference beside adapters that are not zero, adapters of another kind, with dropout or without the indexers,
            another selection, another k in `config`, and prompts too long for `tokens`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        reward_funcs: Sequence[Callable[..., list[float | None]]],
        args: GRPOConfig,
        prompts: Dataset,
        *,
        tokens: int,
        held_out: Dataset | None = None,
        selection: str = "indexer",
        replay: bool = True,
        config: EngineConfig | None = None,
        peft_config: Any = None,
        at_once: int | None = None,
        respond: Respond | None = None,
        result_tokens: int | None = None,
    ):
        decoder = model.get_base_model() if is_peft_model(model) else model
        check_model(decoder, selection, config)
        check_arguments(args)
        self.selects = decoder.is_sparse and selection != "dense"
        adapters = [*model.peft_config.values()] if is_peft_model(model) else []
        check_adapters(adapters if peft_config is None else [*adapters, peft_config], args, self.selects)
        self.replays = replay and self.selects
        self._encode, self._answers = encoder(tokenizer), args.max_completion_length
        self._respond = respond
        self.latest: dict[str, list[Rollout]] = {"train": [], "eval": []}
        self._sampled_at = -1
        reference = copy.deepcopy(model) if args.beta and not adapters and peft_config is None else None
        # TRL would open the reference by its config, as another class, so TRL's set-up sees a beta of 0.
        without = copy.copy(args)
        without.beta = 0.0
        super().__init__(
            model=model,
            reward_funcs=list(reward_funcs),
            args=without,
            train_dataset=prompts,
            eval_dataset=held_out,
            processing_class=tokenizer,
            rollout_func=sample_for,
            peft_config=peft_config,
        )
        self._set_reference(reference, args.beta)
        # Behind TRL's own set-up, which moves the model to its device.
        self._decoder = decoder
        self._sampler = Rollouts(
            decoder,
            tokenizer,
            tokens,
            at_once=min(at_once or MOST_AT_ONCE, args.generation_batch_size or MOST_AT_ONCE),
            selector="indexer" if self.selects else "dense",
            keep_selection=self.replays,
            config=config,
            dtype=torch.bfloat16 if args.bf16 else decoder.dtype,
            result_tokens=result_tokens,
        )

    def _set_reference(self, reference: DecoderForCausalLM | None, beta: float) -> None:
        """Sets the reference; None: the model without its adapters. UserError if these change the model already."""
        self.beta = self.args.beta = beta
        if reference is not None:
            add_fused_lm_head(reference, self.temperature, self.args.cast_lm_head_to_fp32)
            self.ref_model = self.accelerator.prepare_model(reference.eval(), evaluation_mode=True)
        elif beta and any(".lora_B." in name and bool(x.any()) for name, x in self.model.named_parameters()):
            raise UserError(
                f"beta is {beta}, and the adapters are not zero: the reference, which is the model without them, is "
                "not where training begins; merge them (PEFT: merge_and_unload) and begin with new ones"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, in which the indexers learn equation (4) and every pass reads what the rollout read."""
        with self._reading(), indexers_learn(self) if self.selects else nullcontext():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's evaluation, whose passes read what the rollouts read too."""
        with self._reading():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Within the block passes of the model read the keys that rollouts read: replayed, all, or selected anew."""
        with ExitStack() as stack:
            for model in [self.model] if self.ref_model is None else [self.model, self.ref_model]:
                if self.replays:
                    stack.enter_context(replaying(model, lambda: [*self.latest["train"], *self.latest["eval"]]))
                elif self._decoder.is_sparse and not self.selects:
                    stack.enter_context(selecting(model, "dense"))
            yield

    def sample(self, prompts: Sequence[Any]) -> list[Rollout]:
        """One rollout for each of the prompts; equal neighbours are samples of one."""
        groups: list[tuple[list[int], int]] = []
        for prompt in prompts:
            ids = list(self._encode.prompt(prompt))
            if groups and groups[-1][0] == ids:
                groups[-1] = ids, groups[-1][1] + 1
            else:
                groups.append((ids, 1))
        self._sampler.check_room([ids for ids, _ in groups], self._answers)
        samples = {count for _, count in groups}
        sampling = Sampling(
            max_tokens=self._answers, temperature=1.0, top_p=self.args.top_p, top_k=self.args.top_k or 0,
            min_p=self.args.min_p or 0.0, repetition_penalty=self.args.repetition_penalty,
        )  # fmt: skip
        seed = self.args.seed + self.state.global_step
        found: list[Rollout] = []
        if len(samples) == 1:
            for group in self._sampler.sample(
                [ids for ids, _ in groups], samples.pop(), sampling, seed, respond=self._respond
            ):
                found += group
        else:
            for place, (ids, count) in enumerate(groups):
                found += self._sampler.sample([ids], count, sampling, seed + place, respond=self._respond)[0]
        mode = "train" if self.model.training else "eval"
        self.latest[mode], self._sampled_at = found, self.state.global_step
        return found

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Tensor, attention_mask: Tensor,
                                           logits_to_keep: int, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if self._sampled_at == self.state.global_step and not self._is_reference(model):
            self._compare(input_ids, attention_mask, found[0].detach())
        return found

    def _is_reference(self, model: Any) -> bool:
        """Whether a pass of `model` is one of the reference, now."""
        if self.ref_model is not None:
            return model is self.ref_model
        return any(getattr(module, "disable_adapters", False) is True for module in model.modules())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, which calls the KL towards the reference "kl", as we call the indexers'."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        if "kl" in metrics:
            metrics["reference/kl"] = metrics.pop("kl")
        super().log(logs, start_time)

    def _compare(self, ids_BS: Tensor, mask_BS: Tensor, logps_BC: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in compare(self.latest[mode], ids_BS, mask_BS, logps_BC, self._decoder.top_k).items():
            self._metrics[mode][name].append(value)


def compare(
    rollouts: Sequence[Rollout], ids_BS: Tensor, mask_BS: Tensor, logps_BC: Tensor, top_k: int
) -> dict[str, float]:
    """`rollout/logp_difference` and `rollout/queries_past_k` of the rows of a pass; nothing if none is a rollout.

    logps_BC: log probabilities of the answers' tokens in training. A row that was masked as cut off is left out.
    """
    known = {(*rollout.prompt, *rollout.answer): rollout for rollout in rollouts}
    differences, past, total = [], 0, 0
    for ids, mask, logps in zip(ids_BS.tolist(), mask_BS.bool().tolist(), logps_BC, strict=True):
        rollout = known.get(tuple(token for token, real in zip(ids, mask, strict=True) if real))
        if rollout is None:
            continue
        told = torch.tensor(rollout.logprobs, device=logps.device)
        wrote = torch.tensor(rollout.mask, device=logps.device)
        differences.append((logps[: len(wrote)][wrote].float() - told).abs())
        tokens = len(rollout.prompt) + len(rollout.answer)
        past, total = past + max(0, tokens - top_k), total + tokens
    if not differences:
        return {}
    return {
        "rollout/logp_difference": float(torch.cat(differences).mean()),
        "rollout/queries_past_k": past / total,
    }


def check_model(model: Any, selection: str, config: EngineConfig | None) -> None:
    """UserError for a model, a selection or a k with which the engine's rollouts and training would not agree."""
    if not isinstance(model, DecoderForCausalLM):
        raise UserError(
            f"rollouts of the engine take a model of tokensieve, or PEFT's wrapper of one, not {type(model).__name__}; "
            "load it with tokensieve.load"
        )
    if selection not in ("indexer", "dense"):
        raise UserError(f"selection {selection!r}: rollouts and training select by the indexer, or not at all: 'dense'")
    if config is not None and config.top_k not in (0, model.top_k):
        raise UserError(f"the engine's top_k is {config.top_k}, and training selects {model.top_k}; leave it out")


def check_generation(args: Any, trainer: str) -> None:
    """UserError for options of a trainer that the engine's rollouts do not honour. trainer: TRL's own, by name."""
    for name in UNHEARD:
        if value := getattr(args, name, None):
            raise UserError(f"{name} is {value}; rollouts of the engine do not take it; leave it out")
    if args.temperature != 1:
        raise UserError(f"temperature is {args.temperature}; rollouts of the engine train at 1 alone")
    if args.use_vllm:
        raise UserError(f"use_vllm excludes the engine's rollouts; leave it out, or use TRL's own {trainer}")


def check_arguments(args: GRPOConfig) -> None:
    """UserError for TRL's options that `SparseGRPOTrainer` does not honour."""
    check_generation(args, "GRPOTrainer")
    if args.sync_ref_model:
        raise UserError("sync_ref_model: the reference stays as training began; set it to False")


def check_dropout(dropout: float, args: Any) -> None:
    """UserError for adapters whose training drops what the engine's rollouts do not."""
    if dropout and not args.disable_dropout:
        raise UserError(
            f"lora_dropout is {dropout}, and rollouts drop nothing: they would be another model's; set it to 0"
        )


def check_adapters(adapters: Sequence[Any], args: Any, selects: bool) -> None:
    """UserError for adapters (PEFT's configs) that `SparseGRPOTrainer` does not honour."""
    for adapter in adapters:
        if adapter.peft_type != "LORA":
            raise UserError(
                f"the adapters are {adapter.peft_type.value}'s, and the engine runs LoRA's; use peft.LoraConfig"
            )
        check_dropout(adapter.lora_dropout, args)
        if selects and "indexer" not in (adapter.modules_to_save or ()):
            raise UserError("the indexers learn, and the adapter would not save them; add modules_to_save=['indexer']")


def sample_for(prompts: list[Any], trainer: SparseGRPOTrainer) -> dict[str, list[Any]]:
    """The rollouts in the form in which TRL takes them."""
    rollouts = trainer.sample(prompts)
    return {
        "prompt_ids": [list(rollout.prompt) for rollout in rollouts],
        "completion_ids": [list(rollout.answer) for rollout in rollouts],
        "logprobs": [padded_logprobs(rollout) for rollout in rollouts],
        "env_mask": [[int(wrote) for wrote in rollout.mask] for rollout in rollouts],
        "written": [list(rollout.mask) for rollout in rollouts],  # for rewards: TRL keeps env_mask to itself
        "ended": [rollout.ended for rollout in rollouts],
    }


def padded_logprobs(rollout: Rollout) -> list[float]:
    """A log probability for each token of the answer: 0 for those that the model did not write, which TRL masks."""
    told = iter(rollout.logprobs)
    return [next(told) if wrote else 0.0 for wrote in rollout.mask]
