"""The logarithm of every training example's moving average, and how often each example was visited.

One float and one count per example (arXiv 2502.18679, Algorithm 1), in the order of the data set. The number of visits
determines which negatives a prompt gets, so it always gets its next B, in any order of the data and after any
interruption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowdft.errors import UserError
from lowdft.files import replacing

# the order of examples and the optimizer depend on these; a checkpoint would silently restore most of the old values
TRAINED_WITH = (
    "negatives_per_step",
    "log_u_init",
    "reference",
    "freeze_half",
    "prompts_per_step",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_drop_last",
    "seed",
    "data_seed",
)


class LogU:
    """`values`: float32 [n], `visits`: int64 [n], both on the CPU.

    Args:
        n: number of examples in the training set.
        init: the initial value (0 in the paper), or "first_batch" to start each example at the mean of its first visit.
    """

    def __init__(self, n: int, init: float | str = 0.0):
        start = float("nan") if init == "first_batch" else float(init)
        self.values = torch.full((n,), start, dtype=torch.float32)
        self.visits = torch.zeros(n, dtype=torch.int64)

    def update(self, index_M: Tensor, log_u_M: Tensor | None) -> None:
        """Counts one visit of each of M examples and stores their new averages, if given.

        Raises:
            ValueError: an example occurs twice in `index_M`; two updates at once are not defined.
        """
        index_M = index_M.cpu()
        if len(index_M.unique()) != len(index_M):
            raise ValueError(f"the same example twice in one micro-batch: {sorted(index_M.tolist())}")
        if log_u_M is not None:
            self.values[index_M] = log_u_M.detach().to("cpu", torch.float32)
        self.visits[index_M] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Both tensors, by name."""
        return {"values": self.values, "visits": self.visits}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces both tensors."""
        self.values, self.visits = state["values"], state["visits"]


def table_identity(rows, args, reference: str, adapter: dict | None = None, base: str | None = None) -> dict:
    """Identifies the state of a training: a hash of all rows, and the settings that its numbers depend on.

    Args:
        rows: the training set, `EncodedRows`.
        args: the `DFTConfig`.
        reference: identifies the reference model by its content.
        adapter: identifies the adapter's configuration (`models.adapters.identity_of`).
        base: identifies the frozen base (`models.base.base_digest`); None, also in `load_table`, is any base.
    """
    names = ("objective", "tau", "gamma", "objective_args", "reference_prompt", "train_sampling_strategy")
    settings = {name: getattr(args, name) for name in (*names, *TRAINED_WITH)}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # enumerations
    return {"data": rows.fingerprint(), "reference_model": reference, "adapter": adapter, "base": base} | settings


def save_table(path: str | Path, tensors: Mapping[str, Tensor], fingerprint: dict) -> None:
    """Writes the state of a training run to one safetensors file, atomically.

    Args:
        fingerprint: what it belongs to (data, objective, tau, gamma, B); `load_table` requires the same.
    """
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"fingerprint": json.dumps(fingerprint, sort_keys=True)})


def load_table(path: str | Path, fingerprint: dict) -> dict[str, Tensor]:
    """Reads what `save_table` wrote.

    Raises:
        UserError: the file is missing, or was written with a different fingerprint; lists the settings that differ.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing, so training cannot resume exactly from here. Train from the start.")
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["fingerprint"])
        any_base = None in (saved.get("base"), fingerprint.get("base"))
        compared = saved.keys() - ({"base"} if any_base else set())
        differing = sorted(k for k in compared if saved[k] != fingerprint.get(k))
        if differing:
            found = "; ".join(f"{k} was {saved[k]}, is now {fingerprint.get(k)}" for k in differing)
            raise UserError(f"{path} belongs to another run ({found}). Use the old settings, or another output_dir.")
        return {name: file.get_tensor(name) for name in file.keys()}
