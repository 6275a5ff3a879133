"""Attention of pieces of any length by torch's `varlen_attn`, if it runs here and its results are right.

It takes the queries and keys of all pieces in one row each, without padding or masks. In torch 2.10 it has neither
windows nor grouped key-value heads, in 2.11 it has windows, and from 2.12 on it has all that is used here. Its
documentation says that the result of a piece does not depend on the other pieces (`num_splits=1`). It does not say that
causality is aligned at the ends of queries and keys (bottom right), so this is tested once per device, dtype and head
size before the first use.

Shape suffixes: N pieces. Tensors are [tokens, heads, size of a head].
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowdft.errors import is_out_of_memory

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

LARGEST_HEAD = 256  # of flash attention
HALF = (torch.bfloat16, torch.float16)


class Ends(NamedTuple):
    """The ends of pieces: cumulative numbers of queries and keys, int32 [N + 1] from 0, and the longest of each."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


def takes_varlen(q: Tensor, v: Tensor, dropout: float, softcap: float | None) -> bool:
    """Whether `varlen_attention` can compute this: half precision, on a GPU of compute capability 8.0 or higher."""
    size = q.shape[-1]
    plain = not dropout and softcap is None and v.shape[-1] == size <= LARGEST_HEAD and size % 8 == 0
    return plain and varlen_is_right(q.device, _computed_in(q), size)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, ends: Ends, window: int | None, scale: float | None) -> Tensor:
    """Causal attention of every piece's queries over its keys, in the shape of `q`; the last query sees the last key.

    Args:
        window: how many keys a query sees at most, including its own.
        scale: the factor of the scores; None: one over the square root of the head size.
    """
    dtype = _computed_in(q)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    sees = (-1 if window is None else window - 1, 0)  # keys before and after a query's own
    shared = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, *ends, scale=scale, window_size=sees, enable_gqa=shared, num_splits=1)


def _computed_in(q: Tensor) -> torch.dtype:
    device = q.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype


@functools.cache
def varlen_is_right(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether `varlen_attn` runs here and is right, forward and backward, on two small pieces.

    Warns if it should run but fails or is wrong.
    """
    if device.type != "cuda" or dtype not in HALF or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if varlen_attn is None or not {"enable_gqa", "num_splits"} <= set(inspect.signature(varlen_attn).parameters):
        return False  # torch before 2.12
    problem = what_is_wrong(device, dtype, size)
    if problem:
        warnings.warn(f"attention does not use torch's varlen_attn here: {problem}", stacklevel=2)
    return problem is None


def what_is_wrong(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Why `varlen_attn` cannot be used: its error, or how much it differs from plain attention. None if it can."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    given = [draw(7, 4, size), draw(12, 2, size), draw(12, 2, size), draw(7, 4, size)]
    cumulative = ([0, 3, 7], [0, 8, 12])  # three queries after five keys, four after none
    ends = Ends(*(torch.tensor(c, dtype=torch.int32, device=device) for c in cumulative), 4, 8)
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # hides them from hooks outside
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), same:
        for window in (None, 3):
            try:
                found = _with_gradients(varlen_attention, given, device, dtype, ends, window)
            except (RuntimeError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                return f"it fails ({str(error).splitlines()[0][:160]})"
            wanted = _with_gradients(_plain_attention, given, torch.device("cpu"), torch.float64, ends, window)
            for name, a, b in zip(("output", "q", "k", "v"), found, wanted, strict=True):
                error = ((a - b).norm() / b.norm()).item()
                if not error < 0.05:
                    what = "its output" if name == "output" else f"its gradient of {name}"
                    return f"{what} differs by {error:.0%} from plain attention's (window {window})"
    return None


def _with_gradients(attention, given: list[Tensor], device, dtype, ends: Ends, window: int | None) -> list[Tensor]:
    """Output and gradients of q, k and v, in float64 on the CPU; the last of `given` is the output's gradient."""
    q, k, v, pull = (x.to(dtype).to(device, copy=True) for x in given)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, ends, window, None)
    return [x.double().cpu() for x in (out, *torch.autograd.grad((out * pull).sum(), inputs))]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, ends: Ends, window: int | None, scale: float | None) -> Tensor:
    """The same as `varlen_attention`, piece by piece."""
    out = []
    for n in range(len(ends.queries) - 1):
        rows, columns = (slice(*x[n : n + 2].tolist()) for x in (ends.queries, ends.keys))
        mine = [x.transpose(0, 1) for x in (q[rows], k[columns], v[columns])]
        after = mine[1].shape[1] - mine[0].shape[1]
        place = torch.arange(mine[0].shape[1])[:, None] + after - torch.arange(mine[1].shape[1])
        seen = (place >= 0) if window is None else (place >= 0) & (place < window)
        some = nn.functional.scaled_dot_product_attention(*mine, attn_mask=seen, scale=scale, enable_gqa=True)
        out.append(some.transpose(0, 1))
    return torch.cat(out)
