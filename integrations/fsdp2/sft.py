"""Warm-up or adaptation by TRL's SFTTrainer, sharded over the processes that `accelerate launch` started.

    accelerate launch --config_file integrations/fsdp2/accelerate.yaml integrations/fsdp2/sft.py adapt \
        --model FOLDER --data FILE.jsonl --out runs/sft

A line of the data has a "text", or "messages" for the tokenizer's chat template.
"""

import argparse

import datasets
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from trl import SFTConfig, SFTTrainer

import tokensieve

# The weights of a layer are rounded for its pass; gradients are summed, and weights kept, in float32. Nothing else is
# cast, since the KL's weights and the rotations stay in float32.
BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("warmup", "adapt"))
    parser.add_argument("--model", required=True, help="a sparse checkpoint's folder")
    parser.add_argument("--data", required=True, help="JSON lines")
    parser.add_argument("--out", required=True, help="folder of the trained model and its checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row at most")
    parser.add_argument("--rows", type=int, default=1, help="rows of a micro-batch on each GPU")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step on each GPU")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --out")
    given = parser.parse_args()

    model = tokensieve.load(given.model, dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=given.out,
        max_steps=given.steps,
        max_length=given.length,
        per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=given.micro_batches,
        learning_rate=given.lr,
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        max_grad_norm=0,  # the callback clips, the indexers apart
        bf16=True,
        gradient_checkpointing=False,  # accelerate's config has it
        router_aux_loss_coef=0,
        save_steps=given.save_every,
        logging_steps=1,
        report_to=[],
    )
    with tokensieve.training(model, given.stage, clip=1.0) as kl:
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.load_dataset("json", data_files=given.data, split="train"),
            processing_class=tokensieve.load_tokenizer(given.model),
            callbacks=[kl],
        )
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = BFLOAT16
        trainer.train(resume_from_checkpoint=given.resume or None)
    trainer.save_model(given.out)


if __name__ == "__main__":
    main()
