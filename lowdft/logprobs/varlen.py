"""Attention of pieces of any lengths by torch's `varlen_attn`, where it runs and is found right.

It takes queries and keys of all pieces end to end, without padding or masks. Which versions of torch have it: 2.10
without windows or fewer key-value heads than heads, 2.11 with windows, 2.12 as it is used here. What it computes for a
piece is documented not to depend on the others (`num_splits=1`). That its causality is aligned at the ends of queries
and keys (bottom right) is not documented, so it is tried out once per device, dtype and size of a head.

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
    """Where pieces end: cumulative numbers of queries and keys, int32 [N + 1] from 0, and the longest of each."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


def takes_varlen(q: Tensor, v: Tensor, dropout: float, softcap: float | None) -> bool:
    """Is this attention one for `varlen_attention`? Half precision on a GPU of compute capability 8.0 or more."""
    size = q.shape[-1]
    plain = not dropout and softcap is None and v.shape[-1] == size <= LARGEST_HEAD and size % 8 == 0
    return plain and varlen_is_right(q.device, _computed_in(q), size)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, ends: Ends, window: int | None, scale: float | None) -> Tensor:
    """Causal attention of every piece's queries over its keys, the last query seeing the last key; shape of `q`.

    Args:
        window: how many keys a query sees at most, its own included.
        scale: of the scores; None: the root of a head's size.
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
    """Does `varlen_attn` run here, forward and backward, and is it right? Tried on two small pieces.

    Warns where it should run and does not, or is wrong.
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
    """What keeps `varlen_attn` from being used: its error, or how far it is from plain attention; None if nothing."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    given = [draw(7, 4, size), draw(12, 2, size), draw(12, 2, size), draw(7, 4, size)]
    cumulative = ([0, 3, 7], [0, 8, 12])  # three queries after five keys, four after none
    ends = Ends(*(torch.tensor(c, dtype=torch.int32, device=device) for c in cumulative), 4, 8)
    same = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # whoever counts saved tensors sees none
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
    """What `varlen_attention` is to compute, piece by piece."""
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
