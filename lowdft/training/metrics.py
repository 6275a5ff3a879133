"""Adds up what happens in a step and computes the numbers that are logged."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lowdft.data.batch import Batch
from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files.process import peak_bytes
from lowdft.objectives import Losses, Objective, Scores
from lowdft.reporting.metrics import became_negligible
from lowdft.training.token_budget import Scored


@dataclass
class Sums:
    """Sums since the last log line: values by name, prompts, tokens, and tokens of passes with and without padding."""

    values: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    tokens: int = 0
    computed: int = 0
    needed: int = 0


class StepMetrics:
    """Collects the micro-batches between two log lines; `flush` returns means over their prompts and starts again."""

    def __init__(self):
        self._sums, self._since = Sums(), time.perf_counter()

    def add(
        self, scores: Scores, losses: Losses, objective: Objective, batch: Batch, scored: Scored | None = None
    ) -> None:
        """Adds one micro-batch. The objective determines the score of the margin, and whether tokens have weights."""
        positive_M, lengths_M = scores.policy_logps_M.detach(), scores.completion_tokens_M
        self._sums.prompts += len(batch)
        self._sums.tokens += int(lengths_M.sum()) + sum(len(row["prompt_ids"]) for row in batch.rows)
        self._add("surrogate", losses.surrogate_M.detach())
        self._add("logps/positive" + ("_weighted" if objective.token_weight else ""), positive_M)
        if scores.policy_negative_logps_MB is not None:
            negative_MB, tokens_MB = scores.policy_negative_logps_MB.detach(), scores.negative_tokens_MB
            self._sums.tokens += int(tokens_MB.sum())
            self._add("logps/negative", negative_MB.mean(1))
            margin_M = (
                positive_M / lengths_M - (negative_MB / tokens_MB).mean(1)
                if objective.per_token
                else positive_M - negative_MB.mean(1)
            )
            self._add("margin", margin_M)
        if scores.mismatched_gain_M is not None:
            self._add("reference/mismatched_gain", scores.mismatched_gain_M)
        if losses.weights_MB is not None:
            omega_MB = losses.weights_MB
            self._add("weights/mean", omega_MB.mean(1))
            squares_M = omega_MB.square().sum(1).clamp_min(torch.finfo(omega_MB.dtype).tiny)
            self._add("weights/ess", omega_MB.sum(1).square() / squares_M)
        if scored is not None:
            self._sums.computed += scored.computed
            self._sums.needed += scored.needed

    def gap(self, scores: Scores) -> None:
        """|policy - reference| per sequence, for the negatives of the first step, when both are the same model."""
        if scores.ref_negative_logps_MB is not None:
            difference_MB = scores.policy_negative_logps_MB - scores.ref_negative_logps_MB
            self._add("reference/gap", difference_MB.abs().mean(1))

    def flush(self, log_u: Tensor | None) -> dict[str, float]:
        """The means and the speed over all ranks, and this rank's peak memory, since the last flush."""
        every = collectives.from_all(self._sums)
        prompts, tokens, computed, needed = (
            sum(getattr(sums, name) for sums in every) for name in ("prompts", "tokens", "computed", "needed")
        )
        names = dict.fromkeys(name for sums in every for name in sums.values)
        out = {name: sum(sums.values.get(name, 0.0) for sums in every) / max(1, prompts) for name in names}
        if log_u is not None and not math.isnan(mean := finite_mean(log_u)):
            out["log_u/mean"] = mean
        out["tokens_per_second"] = tokens / max(1e-9, time.perf_counter() - self._since)
        if computed:
            out["padding"] = 1 - needed / computed
        out["peak_memory_gb"] = peak_memory_gb()
        if torch.cuda.is_available():
            out["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        self._sums, self._since = Sums(), time.perf_counter()
        return out

    def _add(self, name: str, values_M: Tensor) -> None:
        self._sums.values[name] = self._sums.values.get(name, 0.0) + values_M.sum().item()


def names_in_evaluation(objective: Objective, hyperparameters: Mapping[str, object]) -> list[str]:
    """What evaluation logs of the rows with this objective (as `eval_NAME`), besides speed and memory."""
    names = ["loss", "surrogate", "logps/positive" + ("_weighted" if objective.token_weight else "")]
    if objective.uses_negatives:
        names += ["logps/negative", "margin"]
    if objective.uses_mismatched:
        names.append("reference/mismatched_gain")
    if objective.try_out(hyperparameters).weights_MB is not None:
        names += ["weights/mean", "weights/ess"]
    return names + ["log_u/mean"] * objective.uses_log_u


GAPS = {torch.float32: (0.02, 0.02)}  # what rounding can cause, in nats per scored token: mean of rows, largest row
HALF_PRECISION = (0.2, 1.0)  # seen on a CPU with AMX, where negatives have 1 to 5 unlikely tokens: 0.05, 0.14


def check_gap(scores: Scores, batch: Batch, dtype: torch.dtype) -> None:
    """Stops before the first optimizer step if the reference is not the model that training starts from.

    If they are the same model and score the same prompts, their scores of the negatives differ only by rounding.
    Otherwise the reference was scored on other negatives, with another base or with other settings. Call it only if
    policy and reference should start as the same model.

    Args:
        scores: policy and reference log-probabilities of the negatives, [M, B].
        batch: the M prompts, to name the worst.
        dtype: the dtype in which the model computes.

    Raises:
        UserError: the gap is more than rounding.
    """
    if scores.ref_negative_logps_MB is None:
        return
    difference_MB = scores.policy_negative_logps_MB.detach() - scores.ref_negative_logps_MB
    gap_M = difference_MB.abs().sum(1) / scores.negative_tokens_MB.sum(1)
    worst, (usual, largest) = int(gap_M.argmax()), GAPS.get(dtype, HALF_PRECISION)
    if not (gap_M.mean() <= usual and gap_M[worst] <= largest):
        raise UserError(
            f"the reference log-probabilities are not those of the model that training starts from: row "
            f"{batch.rows[worst].get('example_id')} differs by {gap_M[worst]:.3g} nats per token of its negatives. "
            "They were scored on other negatives, with another base or with other settings. Score them again: in a run "
            "folder, delete reference.parquet and its manifest and run the command again."
        )


def finite_mean(values: Tensor) -> float:
    """The mean of the finite values, or NaN if there are none."""
    mean = values.mean().item()  # takes milliseconds for ten million values; the mask takes a hundred times as long
    return mean if math.isfinite(mean) else values[values.isfinite()].mean().item()


class Faded:
    """Warns once if the negatives contribute almost nothing: DFT then costs more than SFT for the same result."""

    def __init__(self):
        self._weights: list[float] = []

    def see(self, mean_weight: float | None) -> None:
        """Adds the mean weight of a log line (None if it has none)."""
        if mean_weight is None:
            return
        self._weights.append(mean_weight)
        if warning := became_negligible(self._weights):
            warnings.warn(warning, stacklevel=3)


def peak_memory_gb() -> float:
    """Peak memory in GB (10^9 bytes) of the GPU, or of this process without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_bytes() / 1e9


def hardware() -> str:
    """The hardware of a training run: every rank's GPU by name, or the CPU with its threads."""
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    names = collectives.from_all(torch.cuda.get_device_name())
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def reset_peak_memory() -> None:
    """Resets the peak, for the next training run in the same process; does nothing if the system cannot."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of resident memory (proc(5))
