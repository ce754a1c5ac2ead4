"""A stage of post-training under TRL: it continues from its last checkpoint, and leaves a model and its history.

OUT/checkpoint-N while it trains. Then OUT/model, with LoRA also OUT/adapter, and behind them OUT/history.json.
"""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DistillationConfig, GRPOConfig, SFTConfig, SFTTrainer

from tokensieve.config import LoraConfig, UserError
from tokensieve.files import write_json
from tokensieve.model import DecoderForCausalLM, selecting
from tokensieve.posttrain import on_policy
from tokensieve.posttrain.grpo import SparseGRPOTrainer, check_arguments, check_dropout
from tokensieve.posttrain.on_policy import SparseDistillationTrainer
from tokensieve.posttrain.outcomes import RewardFunction
from tokensieve.posttrain.rollouts import Respond
from tokensieve.posttrain_config import GrpoConfig, OnPolicyConfig, PosttrainConfig, SftConfig
from tokensieve.train.callbacks import indexers_learn
from tokensieve.train.lora import adapted, save_adapter
from tokensieve.train.resuming import make_resumable

log = logging.getLogger("tokensieve")

OnStep = Callable[[int, int, dict[str, float]], None]  # the step, all steps, and its figures
History = list[dict[str, float]]
HISTORY, MODEL, ADAPTER = "history.json", "model", "adapter"
NO_BALANCE = {"router_aux_loss_coef": 0.0}  # for TRL: our models compute no balance loss of their routers


def history(folder: Path) -> History | None:
    """The rows of a stage, one a step; None if it is not done."""
    path = folder / HISTORY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def check_options(config: PosttrainConfig) -> None:
    """UserError for options and adapters of any stage that TRL, or a trainer with the engine's rollouts, refuses."""
    for sft in (config.cold, config.distill.train):
        _sft_arguments(sft, config, Path(config.out))
    for grpo in (config.specialist, config.rl.train):
        args = _grpo_arguments(grpo, config, Path(config.out))
        check_arguments(args)
        check_dropout(0.0 if grpo.lora is None else grpo.lora.dropout, args)
    if (stage := config.distill.on_policy) is not None:
        given = _on_policy_arguments(stage, config, Path(config.out))
        on_policy.check_arguments(given)
        check_dropout(0.0 if stage.lora is None else stage.lora.dropout, given)


def fine_tune(
    model: DecoderForCausalLM,
    tokenizer: Any,
    rows: Dataset,
    stage: SftConfig,
    config: PosttrainConfig,
    folder: Path,
    on_step: OnStep | None = None,
) -> History:
    """TRL's SFTTrainer with the indexers' loss, or densely; leaves the model in `folder`.

    rows: as `demonstrations_of` makes them. UserError for options that SFTConfig does not take.
    """
    longest = max(map(len, rows["input_ids"]))
    args = _sft_arguments(stage, config, folder, max_length=longest)
    with _learner(model, stage.lora, config, folder) as learner:
        trainer = SFTTrainer(learner, args=args, train_dataset=rows, processing_class=tokenizer)
        with selecting(model, "dense") if config.selection == "dense" else indexers_learn(trainer):
            found = _run(trainer, folder, on_step)
    return _leave(model, found, folder)


def reinforce(
    model: DecoderForCausalLM,
    tokenizer: Any,
    prompts: Dataset,
    rewards: Sequence[RewardFunction],
    stage: GrpoConfig,
    config: PosttrainConfig,
    folder: Path,
    on_step: OnStep | None = None,
    respond: Respond | None = None,
    room: int = 0,
) -> History:
    """GRPO by `SparseGRPOTrainer`; leaves the model in `folder`. UserError for options that GRPOConfig refuses.

    respond: gives the results of tools, as in `Rollouts.sample`; room: tokens that they may take in an answer.
    """
    args, longest = _grpo_arguments(stage, config, folder), _longest(prompts, config, room)
    with _learner(model, stage.lora, config, folder) as learner:
        trainer = SparseGRPOTrainer(
            learner, tokenizer, rewards, args, prompts, tokens=longest, selection=config.selection, respond=respond,
            at_once=config.at_once, result_tokens=room,
        )  # fmt: skip
        found = _run(trainer, folder, on_step)
    return _leave(model, found, folder)


def distill_on_policy(
    model: DecoderForCausalLM,
    teachers: Mapping[str, DecoderForCausalLM],
    tokenizer: Any,
    prompts: Dataset,
    stage: OnPolicyConfig,
    config: PosttrainConfig,
    folder: Path,
    on_step: OnStep | None = None,
    respond: Respond | None = None,
    room: int = 0,
) -> History:
    """Distillation by `SparseDistillationTrainer`; leaves the model in `folder`.

    prompts, respond, room: as `reinforce` takes them, with the column "teacher". UserError for options that
    DistillationConfig refuses.
    """
    args = _on_policy_arguments(stage, config, folder)
    with _learner(model, stage.lora, config, folder) as learner:
        trainer = SparseDistillationTrainer(
            learner, teachers, tokenizer, args, prompts, tokens=_longest(prompts, config, room),
            selection=config.selection, respond=respond, at_once=config.at_once, result_tokens=room,
        )  # fmt: skip
        found = _run(trainer, folder, on_step)
    return _leave(model, found, folder)


def _longest(prompts: Dataset, config: PosttrainConfig, room: int) -> int:
    return max(map(len, prompts["prompt"])) + config.new_tokens + room


@contextmanager
def _learner(
    model: DecoderForCausalLM, lora: LoraConfig | None, config: PosttrainConfig, folder: Path
) -> Iterator[Any]:
    """What trains in the block: the model, or PEFT's wrapper of it, whose adapter is merged into the model behind it.

    The adapter is saved in `folder` first, but not if the block was stopped.
    """
    selects, base = config.selection == "indexer", str(getattr(model, "folder", None) or "")
    with _quiet(), adapted(model, lora, config.seed, base=base, indexers=selects) as adapter:
        yield model if adapter is None else adapter
        if adapter is not None:
            (folder / ADAPTER).mkdir(parents=True, exist_ok=True)
            save_adapter(adapter, folder / ADAPTER)


def _on_policy_arguments(stage: OnPolicyConfig, config: PosttrainConfig, folder: Path) -> DistillationConfig:
    arguments = _arguments(stage, config, folder, stage.prompts) | {"max_completion_length": config.new_tokens}
    return _made(DistillationConfig, arguments | stage.options)


def _sft_arguments(stage: SftConfig, config: PosttrainConfig, folder: Path, **more: Any) -> SFTConfig:
    arguments = _arguments(stage, config, folder, stage.rows) | NO_BALANCE | more
    arguments |= {"completion_only_loss": True}  # else TRL ignores the rows' completion_mask
    return _made(SFTConfig, arguments | stage.options)


def _grpo_arguments(stage: GrpoConfig, config: PosttrainConfig, folder: Path) -> GRPOConfig:
    arguments = _arguments(stage, config, folder, stage.prompts * stage.samples) | NO_BALANCE
    arguments |= {"num_generations": stage.samples, "max_completion_length": config.new_tokens, "beta": 0.0}
    return _made(GRPOConfig, arguments | stage.options)


def _arguments(
    stage: SftConfig | GrpoConfig | OnPolicyConfig, config: PosttrainConfig, folder: Path, rows: int
) -> dict[str, Any]:
    """What all trainers take. rows: of a step."""
    micro_batch = 1 if isinstance(stage, OnPolicyConfig) else stage.micro_batch
    return {
        "output_dir": str(folder),
        "max_steps": stage.steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": rows // micro_batch,
        "learning_rate": stage.lr,
        "seed": config.seed,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or stage.steps,
        "save_total_limit": 1,  # the older one goes when the new one is complete
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # `_Finite` is to see them
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": config.device == "cpu",
        "bf16": config.device != "cpu",  # of products; weights, gradients and moments stay float32
        _checkpointing(): config.activation_checkpointing,
    }


def _checkpointing() -> str:
    """The name that the installed transformers has for recomputing layers."""
    new = "activation_checkpointing"
    return new if any(field.name == new for field in fields(TrainingArguments)) else "gradient_checkpointing"


def _made(kind: Any, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"options of {kind.__name__}: {' '.join(str(error).split())}; correct them") from error


def _run(trainer: Any, folder: Path, on_step: OnStep | None) -> History:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Finite())
    if on_step is not None:
        trainer.add_callback(_Told(on_step))
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        log.info("%s: continues from %s", folder, checkpoint.name)
        make_resumable(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return [known_figures(row) for row in trainer.state.log_history if "train_runtime" not in row]


def known_figures(row: Mapping[str, float | None]) -> dict[str, float]:
    """A row of TRL's log without what it has no figure for, such as the reward of a step in which no answer has one."""
    return {name: value for name, value in row.items() if value is not None}


def _leave(model: DecoderForCausalLM, rows: History, folder: Path) -> History:
    shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a run that a kill stopped here
    model.save_pretrained(folder / MODEL)
    write_json(folder / HISTORY, rows)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block neither bars of datasets nor what transformers and TRL have to say to each other."""
    shown, of_rewards = not are_progress_bars_disabled(), logging.getLogger("trl.trainer.grpo_trainer")
    disable_progress_bars()
    of_rewards.addFilter(_is_told)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            yield
    finally:
        of_rewards.removeFilter(_is_told)
        if shown:
            enable_progress_bars()


def _is_told(record: logging.LogRecord) -> bool:
    """False for the line in which TRL shows a whole answer without a reward; the judge has said why there is none."""
    return "All reward functions returned None" not in record.getMessage()


class _Finite(TrainerCallback):
    """Ends training, before the step is saved, if its loss or gradient is not finite, as are then all weights."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise UserError(
                    f"{args.output_dir}: {name} of step {state.global_step} is {value}, and the step is not saved; "
                    "begin again in another folder with a lower learning rate"
                )


class _Told(TrainerCallback):
    """Calls a function with each step's figures."""

    def __init__(self, on_step: OnStep):
        self.on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "train_runtime" not in logs:
            self.on_step(state.global_step, state.max_steps, known_figures(logs))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint. Its trainer_state.json is written last: one without it was cut off by a kill."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step in sorted(found, reverse=True):
        try:
            json.loads((found[step] / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found[step]
    return None
