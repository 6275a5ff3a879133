"""Raises errors, with the reason, for what `DFTTrainer` does not support, instead of ignoring it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowdft.compat import use_one_gpu
from lowdft.config.loop import check_best_model, check_loop
from lowdft.config.requirements import check_precision
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError
from lowdft.logprobs import bare
from lowdft.models.adapters import trained_beside

ARGUMENTS = {
    "compute_metrics": "evaluation never computes full logits. Use the logged eval_* metrics, or a callback",
    "preprocess_logits_for_metrics": "evaluation never computes full logits",
    "compute_loss_func": "training.objective determines the loss",
    "compute_loss": "an overridden compute_loss would not be called; training.objective determines the loss",
    "tokenizer": "pass it as processing_class",
    "ref_model": "the reference is the model that training starts from, or training.reference_model: adapter:PATH",
    "formatting_func": "map the rows to prompt and completion beforehand",
    "model_init": "pass the model itself",
    "data_collator": "rows become micro-batches of prompts with their negatives",
}


def check_arguments(args: object, given: Mapping[str, object], eval_dataset: object) -> None:
    """Checks everything that needs no model. Without a launcher it uses one of several visible GPUs.

    Args:
        args: the training arguments.
        given: the model, further arguments of transformers' Trainer, and `compute_loss` if a subclass overrides it.
        eval_dataset: the rows for evaluation, a dictionary of several sets, or None.

    Raises:
        UserError: something is not supported; says what to do.
    """
    if not isinstance(args, DFTConfig):
        raise UserError(
            f"args is a {type(args).__name__}; DFTTrainer requires a lowdft.DFTConfig, which has the same fields, and "
            "objective, tau, gamma and others"
        )
    if given["model"] is None:
        raise UserError("model is None; wanted a causal language model, or its name or folder")
    check_precision(args)
    for name, reason in ARGUMENTS.items():
        if given.get(name) is not None:
            raise UserError(f"DFTTrainer does not support {name}: {reason}.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise UserError(
            f"training.eval_strategy is {args.eval_strategy.value}, but there are no rows to evaluate on. Pass "
            "eval_dataset, or set eval_strategy: no; a recipe evaluates its held-out rows after training."
        )
    check_best_model(args, eval_dataset.keys() if isinstance(eval_dataset, dict) else ())
    check_loop(args, own_optimizer=bool(given.keys() & {"optimizers", "optimizer_cls_and_kwargs"}))
    if (visible := use_one_gpu(args)) > 1:
        warnings.warn(
            f"{visible} GPUs are visible, but only the first is used. To use all of them, start training with "
            "`accelerate launch` (for a recipe, --launch ddp); to use another one, set CUDA_VISIBLE_DEVICES.",
            stacklevel=3,
        )


def check_peft(peft_config: object, args: DFTConfig, needs_base: bool) -> None:
    """Raises UserError for adapters that cannot work: soft prompts, and trained biases if the base is the reference.

    Args:
        peft_config: the adapter's configuration, or None.
        needs_base: the reference is the base with its adapter switched off during training.
    """
    if peft_config is None:
        return
    if not isinstance(peft_config, PeftConfig):
        found = type(peft_config).__name__
        raise UserError(f"peft_config is a {found}; wanted a configuration of peft (LoraConfig, …)")
    if getattr(peft_config, "is_prompt_learning", False):
        raise UserError(
            f"the adapter is {peft_config.peft_type.value}: soft prompts (prompt tuning, prefix tuning, p-tuning) "
            "change the input, which packed rows do not support. Use LoRA or another adapter on the layers."
        )
    if needs_base and getattr(peft_config, "bias", "none") != "none":
        raise UserError(
            f"the adapter has bias={peft_config.bias!r}, which trains biases of the base: they stay changed with "
            'the adapter off, so the reference drifts. Use bias="none", or reference: precomputed.'
        )


def check_model(model: nn.Module, args: DFTConfig) -> None:
    """Raises UserError for a model for which training would silently differ from what was asked for."""
    config = getattr(model, "config", None)
    causal_lm = bare(model)
    if getattr(config, "is_encoder_decoder", False) or causal_lm.get_output_embeddings() is None:
        raise UserError(
            f"the model is a {type(causal_lm).__name__}; wanted a causal language model with its output head. Load it "
            "with AutoModelForCausalLM."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "the model has no trainable weights. Load an adapter to train on with PeftModel.from_pretrained(…, "
            "is_trainable=True), pass peft_config for a new one, or set requires_grad for the weights to train."
        )
    if any(layer.merged or layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
        raise UserError(
            "the model's adapter is merged into its weights or switched off, so training it would change nothing. Call "
            "model.unmerge_adapter(), or model.enable_adapter_layers()."
        )
    if names := [name for name in trained_beside(model) if not _saved_bias(name, model)]:
        raise UserError(
            f"{len(names)} parameters of the base itself are trained next to the adapter (the first: {names[0]}). peft "
            "does not save them, and switching the adapter off does not undo their changes. Freeze them "
            "(requires_grad_(False)), or name their modules in the adapter's modules_to_save."
        )
    if getattr(config, "output_router_logits", False):
        raise UserError(
            "the model's output_router_logits is on, which adds a loss that balances experts; lowdft does not have it. "
            "Set model.config.output_router_logits = False to train without it."
        )
    if not args.fp16 and any(p.dtype == torch.float16 for p in model.parameters()):
        raise UserError(
            "the model is in float16, whose gradients vanish without loss scaling. Load it in bfloat16 or float32, or "
            "set fp16: true with a float32 adapter (GPU only)."
        )
    if args.fp16 and any(p.dtype == torch.float16 for p in model.parameters() if p.requires_grad):
        raise UserError("fp16: true needs trained weights in float32, but they are in float16; load them in float32")


def _saved_bias(name: str, model: PeftModel) -> bool:
    return name.endswith("bias") and getattr(model.active_peft_config, "bias", "none") != "none"


def peft_config_of(model: object, peft_config: object) -> object:
    """The configuration of the new adapter, or of the one that the model already has."""
    return model.active_peft_config if peft_config is None and isinstance(model, PeftModel) else peft_config
