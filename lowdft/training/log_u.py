"""The moving average of every training example, as a logarithm, and how often each example was visited.

One float and one count per example (arXiv 2502.18679, Algorithm 1), in the dataset's order. The visit count says which
negatives a prompt gets next, so that it always gets the next B, however the data was ordered or interrupted.
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

# what the order of examples and the optimizer's steps depend on; of most of it a checkpoint brings the old value back
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
        n: examples in the training set.
        init: the first value (the paper: 0), or "first_batch" to start each example at its own first mean.
    """

    def __init__(self, n: int, init: float | str = 0.0):
        start = float("nan") if init == "first_batch" else float(init)
        self.values = torch.full((n,), start, dtype=torch.float32)
        self.visits = torch.zeros(n, dtype=torch.int64)

    def update(self, index_M: Tensor, log_u_M: Tensor | None) -> None:
        """Counts one visit of each of M examples and, when given, stores their new averages.

        Raises:
            ValueError: an example stands twice in `index_M`; its two updates would have to be one.
        """
        index_M = index_M.cpu()
        if len(index_M.unique()) != len(index_M):
            raise ValueError(f"the same example twice in one micro-batch: {sorted(index_M.tolist())}")
        if log_u_M is not None:
            self.values[index_M] = log_u_M.detach().to("cpu", torch.float32)
        self.visits[index_M] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Both columns."""
        return {"values": self.values, "visits": self.visits}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over both columns."""
        self.values, self.visits = state["values"], state["visits"]


def table_identity(rows, args, reference: str, adapter: dict | None = None) -> dict:
    """What a training's state belongs to: the ids of all rows, and the settings that its numbers depend on.

    Args:
        rows: the training set, `EncodedRows`.
        args: its `DFTConfig`.
        reference: names the reference model by its content.
        adapter: what distinguishes the adapter from others (`models.adapters.config_identity`).
    """
    names = ("objective", "tau", "gamma", "objective_args", "reference_prompt", "train_sampling_strategy")
    settings = {name: getattr(args, name) for name in (*names, *TRAINED_WITH)}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}  # enumerations
    return {"data": rows.fingerprint(), "reference_model": reference, "adapter": adapter} | settings


def save_table(path: str | Path, tensors: Mapping[str, Tensor], fingerprint: dict) -> None:
    """Writes a training's state to one safetensors file, atomically.

    Args:
        fingerprint: what it belongs to (data, objective, tau, gamma, B); `load_table` accepts no other.
    """
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"fingerprint": json.dumps(fingerprint, sort_keys=True)})


def load_table(path: str | Path, fingerprint: dict) -> dict[str, Tensor]:
    """What `save_table` wrote.

    Raises:
        UserError: the file is missing, or was written with another fingerprint; lists the settings that differ.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: is missing, so this checkpoint cannot be resumed exactly. Train from the start.")
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["fingerprint"])
        differing = sorted(k for k in saved if saved[k] != fingerprint.get(k))
        if differing:
            found = "; ".join(f"{k} was {saved[k]}, is now {fingerprint.get(k)}" for k in differing)
            raise UserError(f"{path}: belongs to another run ({found}). Use the old settings, or another output_dir.")
        return {name: file.get_tensor(name) for name in file.keys()}
