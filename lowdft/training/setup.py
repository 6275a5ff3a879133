"""Prepares what a step engine needs: the model, its precision and layout, and its passes."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import nn

from lowdft.config.training import DFTConfig
from lowdft.files.process import return_freed_memory
from lowdft.logprobs import choose_layout
from lowdft.models.adapters import REFERENCE, make_policy
from lowdft.models.reference import is_trained
from lowdft.models.safeguards import guard_four_bit, switch_off_dropout, train_in_float32
from lowdft.objectives import Objective
from lowdft.training.support import check_model
from lowdft.training.token_budget import Passes


def ready_model(model: nn.Module | str, args: DFTConfig, peft_config) -> nn.Module:
    """The model to train, with its adapter, the base's dropout switched off and its 4-bit layers safeguarded.

    Raises:
        UserError: training would silently differ from what was asked for.
    """
    model = make_policy(model, args, peft_config)
    check_model(model, args)
    guard_four_bit(model)
    if (dropped := switch_off_dropout(model)) > 0:
        warnings.warn(f"the base's dropout of {dropped} is switched off; the adapter's stays on", stacklevel=3)
    if args.gradient_checkpointing and args.device.type == "cpu":
        return_freed_memory()
    return model


def choose_precision(model: nn.Module, args: DFTConfig, sharded: bool) -> torch.dtype | None:
    """The dtype in which the layers of a float32 model compute, if it is another one.

    Weights that would be trained in bfloat16 become float32 (except sharded ones).
    """
    if not sharded and (lifted := train_in_float32(model)):
        warnings.warn(
            f"{lifted:,} trained weights were in bfloat16, where small updates are lost; they are now float32 (which "
            "takes 8 more bytes each with AdamW), and layers still compute in bfloat16",
            stacklevel=3,
        )
        return torch.bfloat16
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def layout_of(model: nn.Module, wanted: str | None = None) -> str:
    """Returns "packed" if the model supports it, else "padded" with a warning; checked against the model's own logits.

    Args:
        wanted: the layout in the settings, or None.
    """
    layout = choose_layout(model, wanted)
    if layout == "padded" and wanted is None:
        warnings.warn(
            "this model's attention does not support packed rows: every completion gets its own row, and the prompt is "
            "computed once for each of them",
            stacklevel=3,
        )
    return layout


def make_passes(args: DFTConfig, objective: Objective, sharded: bool) -> Passes:
    """The `Passes` for these settings; the layout may be chosen later."""
    settings, weight = args.hyperparameters(), objective.token_weight
    return Passes(
        args.layout or "padded",
        args.logits_chunk_size,
        args.tokens_per_pass,
        knows_last=objective.linear,
        token_weight=weight and partial(weight, **settings),
        predicted_share=settings["predicted_share"] if objective.uses_predictions else 0.0,
        in_step=sharded,
        device=args.device,
    )


def starts_from_base(model: nn.Module) -> bool:
    """Whether the policy starts as the base, or as a copy of the frozen reference adapter."""
    return not hasattr(model, "peft_config") or REFERENCE in model.peft_config or not is_trained(model)


def starts_as_reference(model: nn.Module, args: DFTConfig) -> bool:
    """Whether policy and reference must agree before the first step: an adapter, scored under the training prompt."""
    return args.reference_prompt == "training" and hasattr(model, "peft_config") and starts_from_base(model)
