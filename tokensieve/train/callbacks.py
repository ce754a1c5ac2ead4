"""The indexers' KL under trainers that are not ours: Hugging Face `Trainer` and trainers built on it (TRL).

Legend: B rows, S tokens a row.

These trainers scale the loss in several ways (transformers 5, TRL 1). If a batch has labels, the loss is a sum over its
tokens divided by the tokens of the whole step, and is not divided again. Without labels it is divided by the number of
micro-batches. Across processes it may be multiplied by their number. TRL computes the loss itself from the trunk's
hidden states. None of these is the KL's scale, so its gradient depends on none of them: it is injected in the backward
pass with a weight of its own, which this callback maintains.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokensieve.config import UserError
from tokensieve.model import ForwardOptions, KLScale, Objective, Trunk
from tokensieve.model.transformer import DecoderLayer
from tokensieve.train.learning import check_indexers, is_indexer, learning
from tokensieve.train.resuming import make_resumable


@contextmanager
def training(
    model: nn.Module, objective: Literal["warmup", "adapt"], clip: float | None = None
) -> Iterator["KLCallback"]:
    """Within the block `model` trains its indexers, whatever loop calls it. Afterwards only its weights have changed.

    "warmup": only the indexers learn, on equation (3); `loss` is the KL and no logits are computed. "adapt": the
    indexers learn on equation (4), whose gradient is injected in the attention's backward pass, and everything else
    that requires gradients learns on the trainer's own loss.

        with tokensieve.training(model, "adapt") as kl:
            Trainer(model, ..., callbacks=[kl]).train()      # or TRL's SFTTrainer

    Hugging Face trainers need the callback, which maintains the KL's scale; in a loop of your own the KL is the mean
    over each call's valid queries. `model` may be wrapped (PEFT). UserError for a model without indexers. Source:
    equations (3) and (4).

    clip: the largest gradient norm of the indexers together, and that of all other parameters together, as in our own
    loop. The trainer, which clips all of them together, must then not clip: max_grad_norm=0. None: only it clips.
    """
    trunk = next((m for m in model.modules() if isinstance(m, Trunk)), None)
    if trunk is None:
        raise UserError(f"{type(model).__name__} is no model of tokensieve; load it with tokensieve.load")
    check_indexers(model, objective)
    callback = KLCallback(trunk, objective, clip)
    with learning(model, "indexers" if objective == "warmup" else "all"):
        hook = trunk.register_forward_pre_hook(callback.before_forward, prepend=True, with_kwargs=True)
        try:
            yield callback
        finally:
            callback.close()
            hook.remove()


@contextmanager
def indexers_learn(trainer: Trainer) -> Iterator[None]:
    """Within the block the indexers of a trainer's model learn by equation (4). UserError as `training` raises it."""
    with training(trainer.model, "adapt") as callback:
        trainer.add_callback(callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control, trainer.model)
        try:
            yield
        finally:
            trainer.remove_callback(callback)


class KLCallback(TrainerCallback):
    """Makes the indexers' gradients those of the mean KL over the valid queries of the optimizer step.

    They do not depend on how the step is cut up. `training` creates the callback. Micro-batches may hold different
    numbers of valid queries (padding, several processes), so the mean is a running one: each call is weighted by its
    share of the queries so far, and the gradients that are already there by the rest. `kl`, in nats per query and
    layer over all processes, is added to the logs; in warm-up it is their `loss` too.

    Under FSDP2 every micro-batch's gradients are reduced at once, since those that wait unreduced cannot be weighted.

    Raises UserError, when the trainer is made or begins, for a setting under which it cannot be exact: a model without
    indexers to train, float16 (its gradient scaler would divide a gradient that was never multiplied), several GPUs in
    one process, FSDP's version 1 and DeepSpeed (they keep gradients elsewhere), FSDP2 that casts what it hands to a
    layer (the KL's weights and the positions' rotations would be rounded), or that loads on one process a model with
    buffers, accelerate's parallelism_config, torch_compile, label smoothing (transformers smooths this model's labels
    unshifted), a router's auxiliary loss, and clipping by both. Raises UserError, while training, for two forward
    passes before one backward pass.
    """

    def __init__(self, trunk: Trunk, objective: Literal["warmup", "adapt"], clip: float | None = None) -> None:
        self._trunk, self._objective, self._clip = trunk, objective, clip
        self._scale: KLScale | None = None  # None: no trainer has begun
        self._hooks: list[Any] = []
        self._indexers: list[torch.nn.Parameter] = []
        self._sharded: FSDPModule | None = None  # the model, if it is sharded
        self._device = torch.device("cpu")
        self._seen = 0.0  # valid queries of the step so far, over all processes
        self._waiting = False  # a forward pass has been weighted, its backward pass has not come yet
        self._kl: Tensor | float = 0.0  # sum over the queries since the last log, mean over layers
        self._queries = 0.0

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """UserError for settings of accelerate that end in no model, or another one, before training begins."""
        accelerator = _accelerator()
        sharded = accelerator.distributed_type == "FSDP" and accelerator.fsdp_plugin
        if accelerator.parallelism_config is not None:
            raise UserError("KLCallback: parallelism_config is not supported; use data parallelism")
        if sharded and sharded.cpu_ram_efficient_loading and list(model.buffers()):
            raise UserError(
                "KLCallback: accelerate cannot hand out this model's buffers; set fsdp_cpu_ram_efficient_loading to "
                "false"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        indexers = [x for name, x in self._trunk.named_parameters() if is_indexer(name) and x.requires_grad]
        if model is not None and all(module is not self._trunk for module in model.modules()):
            raise UserError("KLCallback: the trainer's model is another one; give training() the same")
        for wrong, reason in (
            (not indexers, "every indexer is frozen; let its parameters require gradients"),
            (args.n_gpu > 1, "several GPUs in one process are not supported; start one process per GPU with torchrun"),
            (args.fp16, "float16 scales the loss and would not scale the KL; use bf16=True"),
            (bool(args.deepspeed), "DeepSpeed is not supported; use tokensieve's own loop (tokensieve warmup, adapt)"),
            (args.torch_compile, "torch_compile is not supported here; set it to False"),
            (args.label_smoothing_factor > 0, "labels would be smoothed unshifted; set label_smoothing_factor to 0"),
            (
                getattr(self._trunk.config, "output_router_logits", False),
                "the router has no auxiliary loss here; set router_aux_loss_coef to 0 (TRL), or config's "
                "output_router_logits to False",
            ),
            (self._clip and args.max_grad_norm, "clip is given, and the trainer clips too; set max_grad_norm to 0"),
        ):
            if wrong:
                raise UserError(f"KLCallback: {reason}")
        self.close()
        self._indexers, self._device = indexers, args.device
        self._sharded = sharded_model(model, bool(args.fsdp))
        if self._sharded is not None and self._objective == "warmup":
            keep_lent_indexers(self._trunk)
        self._kl, self._queries, self._seen, self._waiting = 0.0, 0.0, 0.0, False
        across = args.world_size if args.average_tokens_across_devices else 1
        self._scale = KLScale(divisor=args.gradient_accumulation_steps * across)
        self._hooks = [
            self._trunk.register_forward_hook(self._after_forward),
            indexers[0].register_post_accumulate_grad_hook(self._after_backward),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen, self._waiting = 0.0, False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._clip is None:
            return
        for indexers in (True, False):
            apart = [x for name, x in model.named_parameters() if is_indexer(name) == indexers and x.grad is not None]
            torch.nn.utils.clip_grad_norm_(apart, self._clip)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        kl, queries = _over_processes([float(self._kl), self._queries], self._device)
        self._kl, self._queries = 0.0, 0.0
        if not queries:
            return
        figures = {"kl": kl / queries}
        if self._objective == "warmup":  # the trainer's own figure is a mean of micro-batches' means
            figures["loss"] = figures["kl"]
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.should_save:
            make_resumable(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the hooks and forgets the trainer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._scale, self._sharded = [], None, None

    def before_forward(
        self, trunk: Trunk, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sets the pass's objective, with the KL's weight in the step, unless the call brings an objective."""
        from_call = kwargs.get("options") or ForwardOptions()
        if from_call.objective is not None:
            return args, kwargs
        scale = None if self._scale is None else self._weighed(kwargs)
        options = from_call.over(ForwardOptions(objective=Objective(self._objective, scale)))
        return args, kwargs | {"options": options}

    def _weighed(self, inputs: dict[str, Any]) -> KLScale:
        assert self._scale is not None
        if not _trains(self._trunk):
            return self._scale
        if self._waiting:
            raise UserError(
                "KLCallback: two forward passes before a backward pass; the KL's scale is exact only if each loss "
                "is one pass"
            )
        here = _valid_queries(inputs)
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(True)  # accelerate postpones it to the step's last micro-batch
        everywhere, processes = _over_processes([here, 1.0], self._device)
        before, self._seen = self._seen, self._seen + everywhere
        if before:
            for parameter in self._indexers:
                if parameter.grad is not None:
                    parameter.grad.mul_(before / self._seen)
        self._waiting = True
        # The factor `processes` is there because processes average their gradients.
        return replace(self._scale, share=processes * here / max(1.0, self._seen))

    def _after_forward(self, trunk: Trunk, args: tuple[Any, ...], output: Any) -> None:
        scale = None if output.objective is None else output.objective.scale
        if _trains(trunk) and output.kl is not None and scale is not None and scale.share:
            count = scale.share * max(1.0, self._seen)
            self._kl = self._kl + output.kl.detach() / scale.share * count
            self._queries += count

    def _after_backward(self, parameter: Tensor) -> None:
        self._waiting = False


def sharded_model(model: nn.Module | None, wanted: bool) -> FSDPModule | None:
    """The model, if accelerate's FSDP2 has sharded it. UserError for FSDP under which the KL would not be exact.

    wanted: whether the trainer was told to use FSDP.
    """
    modules = [] if model is None else list(model.modules())
    if any(isinstance(module, FullyShardedDataParallel) for module in modules):
        raise UserError("KLCallback: FSDP's version 1 is not supported; set fsdp_version to 2")
    if not isinstance(model, FSDPModule):
        if wanted or any(isinstance(module, FSDPModule) for module in modules):
            raise UserError(
                "KLCallback: accelerate has not sharded the whole model, as it does on GPUs; leave fsdp out"
            )
        return None
    policy = _accelerator().fsdp_plugin.mixed_precision_policy
    if policy is not None and (policy.output_dtype or (policy.param_dtype and policy.cast_forward_inputs)):
        raise UserError(
            "KLCallback: FSDP2's mixed precision would round the KL's weights and the rotations; before train(), set "
            "trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy("
            "param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)"
        )
    return model


def keep_lent_indexers(trunk: Trunk) -> None:
    """Lets sharded layers keep their parameters gathered until the backward pass, if the next layer teaches theirs."""
    for layer in trunk.layers:
        if isinstance(layer, FSDPModule) and cast(DecoderLayer, layer).self_attn.lends:
            layer.set_reshard_after_forward(False)


def _accelerator() -> Any:
    """The settings that the trainer's Accelerator took from its arguments and from `accelerate launch`."""
    from accelerate.state import AcceleratorState  # comes with the trainers

    return AcceleratorState()


def _over_processes(values: list[float], device: torch.device) -> list[float]:
    """Each value's sum over all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def _trains(trunk: Trunk) -> bool:
    return trunk.training and torch.is_grad_enabled()


def _valid_queries(inputs: dict[str, Any]) -> float:
    mask = inputs.get("attention_mask")
    if mask is not None:
        return float(mask.sum())
    tokens = inputs.get("input_ids")
    shape = inputs["inputs_embeds"].shape if tokens is None else tokens.shape
    return float(shape[0] * shape[1])
