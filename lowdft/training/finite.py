"""Errors that stop a training run with non-finite numbers; they name the step, the rows, magnitudes and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowdft.data.batch import Batch
from lowdft.errors import UserError

SLOWER = "Lower training.learning_rate or lengthen training.warmup_steps"
ADVICE = (
    f"Nothing of this step was applied or saved, and earlier checkpoints are intact. {SLOWER}; if this is the first "
    "step, check these rows and the base's dtype."
)
CERTAIN = 1e-3  # nats by which the log-probability of a certain completion may differ from 0
EVALUATION_ADVICE = "Check these rows, the base's weights and dtype, and, after training steps, the learning rate."


def require_rows(step: int, evaluating: bool, what: str, values: Tensor, batch: Batch) -> None:
    """Raises UserError unless all values of a micro-batch, [M] or [M, …], are finite; names the other rows.

    Args:
        step: the optimizer step; with `evaluating`, the last one before the evaluation.
    """
    finite_M = values.reshape(len(batch), -1).isfinite().all(1)
    if finite_M.all():
        return
    ids = _names(batch)
    bad = [name for name, good in zip(ids, finite_M.tolist(), strict=True) if not good]
    rest = values[values.isfinite()].abs()
    largest = f"; the largest finite one is {rest.max().item():.4g}" if len(rest) else ""
    where, advice = (f"evaluation after step {step}", EVALUATION_ADVICE) if evaluating else (f"step {step}", ADVICE)
    raise UserError(
        f"{where}: the {what} of {len(bad)} of {len(batch)} rows are not finite (example_id {_some(bad)}{largest}). "
        f"{advice}"
    )


def bad_gradient(step: int, norm: float, batches: Sequence[Batch], largest: float) -> UserError:
    """The error for a step whose gradient is not finite although its losses are.

    Args:
        batches: the micro-batches of the step.
        largest: the largest absolute log-probability of the step.
    """
    ids = [name for batch in batches for name in _names(batch)]
    return UserError(
        f"step {step}: the gradient's norm is {norm}, although every loss is finite (example_id {_some(ids)}; the "
        f"lowest log-probability is -{largest:.4g}). {ADVICE}"
    )


def acts(logps_MK: Tensor, surrogate: Callable[[Tensor], Tensor]) -> bool:
    """Whether a loss of log-probabilities has a gradient for a completion that is not certain already.

    A certain completion's tokens pass no gradient on to the weights.
    """
    leaf_MK = logps_MK.clone().requires_grad_()
    (pull_MK,) = torch.autograd.grad(surrogate(leaf_MK), leaf_MK)
    return bool((pull_MK[logps_MK < -CERTAIN] != 0).any())


def no_gradient(step: int, batch: Batch, largest: float) -> UserError:
    """The error for a step whose gradient is zero although its log-probabilities should change; see `bad_gradient`."""
    return UserError(
        f"step {step}: the gradient is zero, although the objective still acts on these rows (example_id "
        f"{_some(_names(batch))}; the lowest log-probability is -{largest:.4g}). The weights have become so large that "
        f"a layer overflows, or no trainable weight takes part. {SLOWER}, and train from the beginning."
    )


def bad_weights(step: int, row: dict, largest: float) -> UserError:
    """The error for a step after which the model gives `row` no finite score; `largest` as in `bad_gradient`."""
    return UserError(
        f"step {step}: after this update the weights give no finite log-probability (example_id "
        f"{row.get('example_id', 0)}; before it the lowest was -{largest:.4g}). They are not saved, and earlier "
        f"checkpoints are intact. {SLOWER}."
    )


def _names(batch: Batch) -> list[str]:
    return [str(row.get("example_id", i)) for i, row in zip(batch.index_M.tolist(), batch.rows, strict=True)]


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
