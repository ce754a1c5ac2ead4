"""The indexers' KL under trainers that are not ours: Hugging Face `Trainer` and what builds on it (TRL).

Legend: B rows, S tokens a row.

How these trainers scale (transformers 5, TRL 1): where a batch has labels the loss is a sum over its tokens divided by the tokens of the
whole step and is not divided again; without labels it is divided by the number of micro-batches; across processes it may be multiplied by
their number. TRL computes the loss itself from the trunk's hidden states. None of these is the KL's scale, so its gradient depends on none
of them: it is injected in the backward pass with a weight of its own, which this callback keeps.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokensieve.config import UserError
from tokensieve.model import KLScale, Trunk


class KLCallback(TrainerCallback):
    """Makes the indexers' gradients those of the mean KL over the valid queries of the optimizer step, however it is cut up.

    Call `model.train_for("warmup")` or `("adapt")`, then give the callback to `Trainer(..., callbacks=[KLCallback()])` or to TRL's
    `SFTTrainer`. Micro-batches may hold different numbers of valid queries (padding, several processes): the mean is kept as a running
    one, each call weighted by its share of the queries so far and the gradients that are already there by the rest. `kl`, in nats per query
    and layer, joins the logs. The trainer clips all gradients together; our own loop clips the indexers apart.

    Raises UserError when training begins for what it cannot make exact: a model without indexers to train, float16 (its gradient scaler
    would divide a gradient that was never multiplied), several GPUs in one process, FSDP and DeepSpeed (they keep gradients elsewhere),
    tensor and context parallelism, torch_compile, and label smoothing (transformers smooths this model's labels unshifted); while training,
    for two forward passes before one backward pass. Source: equations (3) and (4).
    """

    def __init__(self) -> None:
        self._trunk: Trunk | None = None
        self._hooks: list[Any] = []
        self._indexers: list[torch.nn.Parameter] = []
        self._seen = 0.0  # valid queries of the step so far, over all processes
        self._waiting = False  # a forward pass has been weighted and its backward pass has not come
        self._kl: Tensor | float = 0.0  # sum over the queries since the last log, mean over layers
        self._queries = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        trunk = next((m for m in model.modules() if isinstance(m, Trunk)), None)
        if trunk is None or trunk.objective == "none":
            raise UserError('KLCallback: no indexer loss to scale; call model.train_for("warmup") or ("adapt") first')
        indexers = [x for name, x in trunk.named_parameters() if ".indexer." in name and x.requires_grad]
        parallelism = getattr(args, "parallelism_config", None)
        for wrong, what in (
            (not indexers, "every indexer is frozen; let its parameters require gradients"),
            (args.n_gpu > 1, "several GPUs in one process are not supported; start one process per GPU with torchrun"),
            (args.fp16, "float16 scales the loss and would not scale the KL; use bf16=True"),
            (bool(args.fsdp), "FSDP is not supported; use tokensieve's own loop (tokensieve warmup, adapt)"),
            (bool(args.deepspeed), "DeepSpeed is not supported; use tokensieve's own loop (tokensieve warmup, adapt)"),
            (parallelism is not None, "parallelism_config is not supported; use data parallelism"),
            (args.torch_compile, "torch_compile is not supported here; set it to False"),
            (args.label_smoothing_factor > 0, "labels would be smoothed unshifted; set label_smoothing_factor to 0"),
        ):
            if wrong:
                raise UserError(f"KLCallback: {what}")
        self._close()
        self._trunk, self._indexers = trunk, indexers
        self._kl, self._queries, self._seen, self._waiting = 0.0, 0.0, 0.0, False
        across = args.world_size if args.average_tokens_across_devices else 1
        trunk.kl_scale = KLScale(divisor=args.gradient_accumulation_steps * across)
        self._hooks = [
            trunk.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            trunk.register_forward_hook(self._after_forward),
            indexers[0].register_post_accumulate_grad_hook(self._after_backward),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen, self._waiting = 0.0, False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._queries:
            return
        logs["kl"] = float(self._kl) / self._queries
        if state.log_history:
            state.log_history[-1]["kl"] = logs["kl"]
        self._kl, self._queries = 0.0, 0.0

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._close()

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._trunk is not None:
            self._trunk.kl_scale = None

    def _before_forward(self, trunk: Trunk, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert trunk.kl_scale is not None
        if not _trains(trunk):
            trunk.kl_scale = replace(trunk.kl_scale, share=1.0)
            return
        if self._waiting:
            raise UserError(
                "KLCallback: two forward passes before a backward pass; the KL's scale is exact only where each loss is one pass"
            )
        here = _valid_queries(kwargs)
        everywhere, processes = here, 1
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = torch.tensor(here, dtype=torch.float64, device=self._indexers[0].device)
            dist.all_reduce(total)
            everywhere, processes = float(total), dist.get_world_size()
        before, self._seen = self._seen, self._seen + everywhere
        if before:
            for parameter in self._indexers:
                if parameter.grad is not None:
                    parameter.grad.mul_(before / self._seen)
        # Processes average their gradients, hence the factor.
        trunk.kl_scale = replace(trunk.kl_scale, share=processes * here / max(1.0, self._seen))
        self._waiting = True

    def _after_forward(self, trunk: Trunk, args: tuple[Any, ...], output: Any) -> None:
        assert trunk.kl_scale is not None
        if _trains(trunk) and output.kl is not None and trunk.kl_scale.share:
            count = trunk.kl_scale.share * max(1.0, self._seen)
            self._kl = self._kl + output.kl.detach() / trunk.kl_scale.share * count
            self._queries += count

    def _after_backward(self, parameter: Tensor) -> None:
        self._waiting = False


def _trains(trunk: Trunk) -> bool:
    return trunk.training and torch.is_grad_enabled()


def _valid_queries(inputs: dict[str, Any]) -> float:
    mask = inputs.get("attention_mask")
    if mask is not None:
        return float(mask.sum())
    tokens = inputs.get("input_ids")
    shape = inputs["inputs_embeds"].shape if tokens is None else tokens.shape
    return float(shape[0] * shape[1])
