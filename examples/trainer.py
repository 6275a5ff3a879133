"""Trains a LoRA adapter on rows of text with DFTTrainer, which replaces transformers' Trainer or TRL's SFTTrainer.

python examples/trainer.py [MODEL] [OUTPUT]
"""

from __future__ import annotations

import sys

from peft import LoraConfig

from lowdft import DFTConfig, DFTTrainer

ROWS = [
    {"prompt": f"{n} + {n} =", "completion": f" {2 * n}", "negatives": [f" {2 * n + 1}", f" {n}{n}"]}
    for n in range(2, 18)
]


def main(model: str = "HuggingFaceTB/SmolLM2-135M-Instruct", output: str = "runs/trainer", **settings) -> DFTTrainer:
    """Trains on `ROWS` and writes the adapter to `output`."""
    arguments = {
        "objective": "listwise",  # dft, sft, dpo, ...: docs, "Objectives"
        "negatives_per_step": 2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,  # prompts per optimizer step; tokens_per_pass limits the memory
        "learning_rate": 4e-4,
        "logging_steps": 1,
    }
    trainer = DFTTrainer(
        model,
        DFTConfig(output_dir=output, **(arguments | settings)),
        ROWS,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
