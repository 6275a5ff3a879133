"""Collective operations: every rank knows all updates of `log_u`, and gradients are the same as on one process.

With one process, all functions are no-ops.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def from_all(value: object) -> list:
    """Every rank's `value`, in the order of ranks."""
    if world_size() == 1:
        return [value]
    found: list = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def updates_from_all(
    index_M: Tensor, values_M: Tensor, visits_M: Tensor, at_most: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' updates of a table, concatenated: int64 positions, float32 values, int64 visits, on the CPU.

    Args:
        at_most: the maximum number of updates on a rank; M may differ. Each takes 24 bytes of the message, as float64,
            which holds all values exactly.
        device: the device of training, which determines how ranks communicate.
    """
    mine = torch.full((at_most, 3), -1.0, dtype=torch.float64)
    mine[: len(index_M)] = torch.stack([index_M.double(), values_M.double(), visits_M.double()], 1)
    mine = mine.to(device)
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    index, values, visits = torch.cat([part[part[:, 0] >= 0] for part in torch.stack(every).cpu()]).unbind(1)
    return index.long(), values.float(), visits.long()


def total(values: Sequence[int], device: torch.device) -> list[int]:
    """The sums of every rank's numbers."""
    if world_size() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(found)
    return found.tolist()


def largest(value: int, device: torch.device) -> int:
    """The largest of every rank's numbers."""
    if world_size() == 1:
        return int(value)
    found = torch.tensor(int(value), dtype=torch.int64, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank."""
    return bool(largest(flag, device))


def wait() -> None:
    """Waits until all ranks are here."""
    if world_size() > 1:
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages every trainable parameter's gradient over ranks, in place; a missing gradient counts as zero."""
    if world_size() == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_kind: dict[tuple, list[Tensor]] = {}
    for parameter in parameters:
        by_kind.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for gradients in by_kind.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
