"""Every use of private parts of transformers, and of renamed ones, each with a canary in tests/test_compat.py.

pyproject.toml limits transformers to the versions that were tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed


class LoopHooks:
    """For a subclass of transformers' Trainer: two hooks at moments of its loop that have no callback.

    It also ends a loop that resumes after its last step: transformers counts steps only after one more.
    """

    def after_preparation(self, model: nn.Module, resuming: bool) -> None:
        """Called when model and optimizer are prepared and restored from a checkpoint, before the first step.

        Args:
            model: as the loop will pass it to `training_step`.
        """

    def before_optimizer_step(self, gradient_norm: object) -> None:
        """Called when the gradient of a step is complete and clipped. (DeepSpeed has already updated the weights.)

        Args:
            gradient_norm: before clipping.
        """

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.after_preparation(model, resume_from_checkpoint is not None)
        return model, dataloader

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self.before_optimizer_step(norm)
        return norm


def use_one_gpu(args: TrainingArguments) -> int:
    """Makes transformers use one GPU; without a launcher it would split batches over all of them (DataParallel).

    Returns how many GPUs are visible.
    """
    visible = args.n_gpu
    if visible > 1:
        args._n_gpu = 1
    return visible


@contextlib.contextmanager
def without_deepspeed() -> Iterator[None]:
    """A context in which models are loaded whole, even under ZeRO-3's launcher."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def without_compiled_communication() -> None:
    """On CPUs, DeepSpeed communicates through torch alone.

    Otherwise it compiles an operator when it is first used. That takes minutes, and a process killed meanwhile leaves
    a lock on which every later one waits forever.
    """
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False


def checkpoint_layers(model: PreTrainedModel, settings: dict) -> None:
    """Activation checkpointing of a model's layers, which transformers before 5.23 calls gradient checkpointing.

    Args:
        settings: as the trainer's `gradient_checkpointing_kwargs`: of torch's checkpoint, and `every_n_layers`.
    """
    settings = dict(settings)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    every = settings.pop("every_n_layers", 1)
    enable(settings, every_n_layers=every)


def takes_other_attention(model: PreTrainedModel) -> bool:
    """Does transformers set another attention for a model? For others `set_attn_implementation` does nothing."""
    return model._can_set_attn_implementation()


def unpacked_four_bit(data, state):
    """A 4-bit weight and its state as they were before bitsandbytes repacked them for CPU inference.

    bitsandbytes' own inverse leaves the scales of weights without double quantization in the packed order.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state
