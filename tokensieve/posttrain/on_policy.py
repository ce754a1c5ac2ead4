"""On-policy distillation on TRL: the student answers, and at each of its tokens learns its specialist's distribution.

TRL has the algorithm, the divergence of DistillationTrainer between the two distributions. What is ours: the engine's
rollouts, the keys that they read, the indexers' loss, equation (4), and a teacher for each prompt.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer

from tokensieve.config import UserError
from tokensieve.engine import EngineConfig, Sampling
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.posttrain.grpo import check_adapters, check_generation, check_model, compare
from tokensieve.posttrain.replay import replaying
from tokensieve.posttrain.rollouts import Respond, Rollout, Rollouts
from tokensieve.tasks import encoder
from tokensieve.train.callbacks import indexers_learn

TEACHERS = ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs")  # TRL's options


class SparseDistillationTrainer(DistillationTrainer):
    """TRL's DistillationTrainer for a student and several teachers of tokensieve; it samples with the engine.

    The student's passes read the keys that its rollouts read. A teacher selects for itself, as it does when it answers.
    Metrics beside TRL's are those of `SparseGRPOTrainer`: `rollout/logp_difference` and `rollout/queries_past_k`.

    teachers: by name; of the student's vocabulary. All are in memory at once.
    prompts: the columns "prompt", as `SparseGRPOTrainer` takes it, and "teacher", the name of one.
    model, tokens, selection, config, at_once, respond, result_tokens: as `SparseGRPOTrainer` takes them. With "dense"
        teachers attend densely too.

    Raises:
        UserError: what this trainer cannot honour: rows that are trained together, since each has its own teacher and
            the indexers' loss is of one pass (per_device_train_batch_size above 1), a temperature that is not 1, vLLM
            and other options of generation, a teacher of another vocabulary, a prompt whose teacher is not there, and
            the adapters that `SparseGRPOTrainer` refuses.
    """

    def __init__(
        self,
        model: Any,
        teachers: Mapping[str, DecoderForCausalLM],
        tokenizer: Any,
        args: DistillationConfig,
        prompts: Dataset,
        *,
        tokens: int,
        selection: str = "indexer",
        config: EngineConfig | None = None,
        at_once: int | None = None,
        respond: Respond | None = None,
        result_tokens: int | None = None,
    ):
        decoder = model.get_base_model() if is_peft_model(model) else model
        check_model(decoder, selection, config)
        check_arguments(args)
        _check_teachers(decoder, teachers, prompts)
        self.selects = decoder.is_sparse and selection != "dense"
        check_adapters([*model.peft_config.values()] if is_peft_model(model) else [], args, self.selects)
        super().__init__(model=model, args=args, train_dataset=prompts, processing_class=tokenizer)
        self.teachers = {
            name: self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
            for name, teacher in teachers.items()
        }
        self.latest: list[Rollout] = []
        self._decoder, self._encode, self._respond = decoder, encoder(tokenizer), respond
        self._sampler = Rollouts(
            decoder,
            tokenizer,
            tokens,
            at_once=min(at_once or args.gradient_accumulation_steps, args.gradient_accumulation_steps),
            selector="indexer" if self.selects else "dense",
            keep_selection=self.selects,
            config=config,
            dtype=torch.bfloat16 if args.bf16 else decoder.dtype,
            result_tokens=result_tokens,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training, in which the student's indexers learn equation (4) on the keys that its rollouts read."""
        with self._reading(), indexers_learn(self) if self.selects else nullcontext():
            return super().train(*args, **kwargs)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.selects:
                stack.enter_context(replaying(self.model, lambda: self.latest))
            else:
                for model in (self._decoder, *self.teachers.values()):
                    if model.is_sparse:
                        stack.enter_context(selecting(model, "dense"))
            yield

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt", "teacher"]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [list(self._encode.prompt(prompt)) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> list[list[int]]:
        self._sampler.check_room(prompt_ids, self.max_completion_length)
        sampling = Sampling(
            max_tokens=self.max_completion_length, temperature=1.0, top_p=self.top_p, top_k=self.top_k or 0,
            min_p=self.min_p or 0.0, repetition_penalty=self.repetition_penalty,
        )  # fmt: skip
        seed = self.args.seed + self.state.global_step
        found = self._sampler.sample(prompt_ids, 1, sampling, seed, respond=self._respond)
        self.latest = [rollout for (rollout,) in found]
        return [list(rollout.answer) for rollout in self.latest]

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """As TRL's, with the rollouts' masks: results of tools are not learnt."""
        prompt_ids, completion_ids, _, images, tool_images = super()._generate(prompts)
        written = [[int(wrote) for wrote in rollout.mask] for rollout in self.latest]
        return prompt_ids, completion_ids, written, images, tool_images

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        names = [*self.teachers]
        places = torch.tensor([names.index(row["teacher"]) for row in inputs])
        return super()._generate_and_score_completions(inputs) | {"teacher": places}

    def _compute_loss(self, student: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Any:
        (place,) = inputs["teacher"].tolist()
        self.teacher_model = [*self.teachers.values()][place]
        return super()._compute_loss(student, inputs, num_items_in_batch)

    def _get_last_hidden_state(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **more: Any
    ) -> Tensor:
        with self.accelerator.autocast():  # TRL calls the trunk, which accelerate has not prepared
            hidden_BCD = super()._get_last_hidden_state(model, input_ids, attention_mask, logits_to_keep, **more)
        hidden_BCD = hidden_BCD.to(model.get_output_embeddings().weight.dtype)
        if model is not self.teacher_model:
            with torch.no_grad():
                logits_BCV = model.get_output_embeddings()(hidden_BCD).float()
                answers_BC1 = input_ids[:, -logits_to_keep:, None]
                logps_BC = F.log_softmax(logits_BCV, -1).gather(-1, answers_BC1).squeeze(-1)
            found = compare(self.latest, input_ids, attention_mask, logps_BC, self._decoder.top_k)
            for name, value in found.items():
                self._metrics["train"][name].append(value)
        return hidden_BCD


def _check_teachers(model: DecoderForCausalLM, teachers: Mapping[str, DecoderForCausalLM], prompts: Dataset) -> None:
    for name, teacher in teachers.items():
        if teacher.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"teacher {name} has {teacher.config.vocab_size} tokens, and the student {model.config.vocab_size}; "
                "give teachers that were trained from the student's base"
            )
    lacking = sorted(set(prompts["teacher"]) - set(teachers))
    if lacking:
        raise UserError(f"prompts name the teacher {lacking[0]}, which is not there; name one of {', '.join(teachers)}")


def check_arguments(args: DistillationConfig) -> None:
    """UserError for TRL's options that rollouts of the engine, or a teacher for each row, do not honour."""
    if args.per_device_train_batch_size != 1:
        raise UserError(
            f"per_device_train_batch_size is {args.per_device_train_batch_size}; every row has a teacher of its own, "
            "so set it to 1, and gradient_accumulation_steps to the rows of a step"
        )
    check_generation(args, "DistillationTrainer")
    for name in TEACHERS:
        if value := getattr(args, name, None):
            raise UserError(f"{name} is {value}; the teachers are the specialists; leave it out")
