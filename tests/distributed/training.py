"""One training: its folder, how it is sharded, settings in JSON; run by every rank (`forked_ranks.run`)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import helpers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers import losses, make_rows, make_trainer
from transformers import TrainerCallback

from lowdft.models.base import ModelSection, load_base, locate

SHARDING = {
    "one": {},
    "ddp": {"ddp_backend": "gloo"},
    "fsdp": {
        "fsdp": True,
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}
for stage in (2, 3):
    automatic = dict.fromkeys(
        ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"], "auto"
    )
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    SHARDING[f"zero{stage}"] = {"deepspeed": {**automatic, "zero_optimization": zero}}


def allow_fsdp_on_cpu() -> None:
    """accelerate gives the CPU whole copies where FSDP was asked for; torch itself can do it there."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


class StopAfter(TrainerCallback):
    """Stops the training after a step, as if it had been killed there."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def main(folder: str, kind: str, settings: dict) -> None:
    allow_fsdp_on_cpu()
    if base := settings.pop("nf4", None):  # QLoRA: loaded as `lowdft train` loads it
        if kind == "fsdp":
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        section = ModelSection(name_or_path=base, load_in_4bit=True, dtype="bfloat16")
        helpers.make_llama = lambda: load_base(locate(section), section)
    stop = settings.pop("stop", None)
    common = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    trainer = make_trainer(folder, make_rows(14), **(common | settings | SHARDING[kind]))
    if stop:
        trainer.add_callback(StopAfter(stop))
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
    trainer.save_model(os.path.join(folder, "saved"))
    if trainer.args.process_index == 0:
        kept = {"losses": losses(trainer), "log_u": trainer.log_u.tolist(), "model": type(trainer.model).__name__}
        Path(folder, "result.json").write_text(json.dumps(kept | {"log": trainer.state.log_history}))
    if PartialState().num_processes > 1:  # without this gloo's threads may abort the process at its end
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
