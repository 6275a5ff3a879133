"""Checks the settings of transformers' training loop, which would find them wrong only once the model is loaded."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import integration_utils

from lowdft import objectives
from lowdft.config.training import DFTConfig
from lowdft.errors import UserError
from lowdft.text import did_you_mean
from lowdft.training.metrics import names_in_evaluation

REPORTERS = tuple(integration_utils.INTEGRATION_TO_CALLBACK)
NOT_LOOKED_FOR = ("flyte",)  # transformers does not say whether its package is installed
MAKING_FAILS = (ImportError, ValueError, TypeError, AttributeError)


def check_loop(args: DFTConfig, own_optimizer: bool = False) -> None:
    """Checks that reporters, optimizer and schedule can be made.

    Args:
        own_optimizer: the trainer gets its optimizer ready-made.

    Raises:
        UserError: one of them cannot.
    """
    _check_reporters(args.report_to)
    if not own_optimizer and args.optim_target_modules is None:  # else the optimizer depends on the model's layers
        _try_optimizer(args)


def check_best_model(args: DFTConfig, sets: Collection[str] = ()) -> None:
    """Checks the settings that choose the best checkpoint.

    Args:
        sets: the names of the evaluation sets, if there are several.

    Raises:
        UserError: no evaluation, or none of its numbers, can choose it.
    """
    chooses = args.save_strategy == "best" or args.load_best_model_at_end
    if chooses and args.eval_strategy == "no":
        key = "save_strategy is best" if args.save_strategy == "best" else "load_best_model_at_end is true"
        raise UserError(
            f"training.{key}, but training.eval_strategy is no, so checkpoints cannot be compared. Set eval_strategy: "
            "steps or epoch (a recipe also needs data.eval or data.eval_rows), or remove the first."
        )
    metric = args.metric_for_best_model
    if metric is None and not chooses:
        return
    known = names_in_evaluation(objectives.get(args.objective), args.hyperparameters())
    known = [f"{name}_{metric}" for name in sets for metric in known] or known
    if metric is None or str(metric).removeprefix("eval_") not in known:
        hint = did_you_mean(str(metric), known) if metric else f" Known are: {', '.join(known)}"
        raise UserError(
            f"training.metric_for_best_model is {metric!r}; wanted a number that evaluation logs with objective "
            f"{args.objective}.{hint}"
        )


def _check_reporters(names: Collection[str]) -> None:
    for name in names:
        if name not in REPORTERS:
            hint = did_you_mean(str(name), [*REPORTERS, "none", "all"])
            raise UserError(f"training.report_to is {name!r}, which transformers does not know.{hint}")
    missing = set(names) - {*integration_utils.get_available_reporting_integrations(), *NOT_LOOKED_FOR}
    if missing:
        raise UserError(
            f"training.report_to has {', '.join(sorted(missing))}, whose package is not installed. Install it with pip "
            "(lowdft[track] has tensorboard and trackio), or set report_to: none; a run folder's metrics.jsonl has all "
            "numbers."
        )


def _try_optimizer(args: DFTConfig) -> None:
    """Makes the optimizer and the schedule of a single weight."""
    tried, keys = f"optim is {args.optim.value}", "optim, optim_args, adam_beta1, adam_beta2 and adam_epsilon"
    try:
        model = nn.Linear(1, 1, bias=False)
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            return  # transformers calls it with the model
        settings.pop("model", None)
        optimizer = kind(model.parameters(), **settings)
        tried, keys = f"lr_scheduler_type is {args.lr_scheduler_type.value}", "it and lr_scheduler_kwargs"
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    except MAKING_FAILS as error:
        raise UserError(
            f"training.{tried}, which cannot be made ({str(error).splitlines()[0]}); check {keys}"
        ) from error
