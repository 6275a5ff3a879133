"""Attention of a packed row: every prompt over itself, every completion over its prompt and itself.

The linear layers process the row token by token. Attention keeps the pieces apart, so that no piece attends to another
or costs time for it, in one of two ways. Where `varlen_attn` runs (`varlen.py`; GPUs in half precision), queries
stay in place and keys are gathered for each piece, those of the prompt before those of the completion. Elsewhere
queries and keys are gathered into small batches of pieces of similar length.

On a CPU without AMX a sequence gets the same bits in bfloat16 whatever else is in its row (measured: rows and tiles
are aligned so that kernels always split their sums in the same way), so policy and reference agree exactly. On a GPU,
and on a CPU with AMX, matrix products choose their kernels by the number of tokens, and the bits may differ.

Shape suffixes: T tokens of the packed row, N pieces (prompts or completions), Q queries, K keys, H query heads,
J key-value heads, E size of a head.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lowdft.logprobs.cpu_attention import cpu_attention, takes_cpu
from lowdft.logprobs.varlen import Ends, takes_varlen, varlen_attention

NAME = "lowdft_packed"
QUERY_ALIGNMENT, KEY_ALIGNMENT, FEWEST_KEYS = 16, 128, 32
Piece = tuple[int, int, int, int]  # start of what comes before, its length, start of the piece, its length
# How the backward pass of a gather adds up: (indices into the packed row, indices into the gathered batch), one turn
# after the other. Within a turn no index of the row occurs twice, so the order of additions is fixed.
Turns = tuple[tuple[Tensor, Tensor], ...]


class Pieces:
    """The pieces of a packed row on a device, in the layouts that attention needs, each computed when first used.

    Args:
        prompts, completions: the pieces in any order; together they fill the row, except for padding at its end.
        length: tokens of the row.
    """

    def __init__(self, prompts: Sequence[Piece], completions: Sequence[Piece], length: int, device="cpu"):
        self.prompts, self.completions, self.length, self.device = prompts, completions, length, device

    def to(self, device: torch.device) -> Pieces:
        """The same pieces for another device."""
        return Pieces(self.prompts, self.completions, self.length, device)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """Prompts, then completions, in batches of like length."""
        return tuple(part.to(self.device) for some in (self.prompts, self.completions) for part in make_parts(some))

    @functools.cached_property
    def gathered(self) -> tuple[Tensor, Turns, Ends]:
        """For `varlen_attn`: the indices [K] of all pieces' keys into the row, their turns, and the ends of pieces."""
        pieces = sorted([*self.prompts, *self.completions], key=lambda piece: piece[2])
        end = sum(length for *_, length in pieces)
        if end < self.length:  # the row's padding attends to itself
            pieces.append((0, 0, end, self.length - end))
        sizes = [before + length for _, before, _, length in pieces]
        key_ends = [0, *accumulate(sizes)]
        query_ends = [*(start for _, _, start, _ in pieces), self.length]
        keys_K = torch.cat([torch.arange(a, a + n) for p in pieces for a, n in (p[:2], p[2:])])
        turns = [index for turn in _key_turns(pieces, key_ends[:-1]) for index in turn]
        tensors = [torch.tensor(query_ends), torch.tensor(key_ends), keys_K, *turns]
        moved = torch.cat(tensors).to(self.device).split([len(tensor) for tensor in tensors])  # one copy for all
        ends = Ends(moved[0].int(), moved[1].int(), max(length for *_, length in pieces), max(sizes))
        return moved[2], tuple(zip(moved[3::2], moved[4::2], strict=True)), ends


@dataclass(frozen=True)
class Part:
    """A batch of pieces of similar length: piece n has `length` queries, and `before` more keys than queries."""

    query_NQ: Tensor  # indices into the packed row; those beyond `length` are padding
    key_NK: Tensor
    before_N: Tensor
    length_N: Tensor
    place_X: Tensor  # indices of the queries that are no padding into the packed row
    source_X: Tensor  # the same queries' indices into N * Q
    key_turns: Turns  # the same for keys, with indices into N * K
    masks: dict = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> Part:
        """The same part on another device."""
        names = ("query_NQ", "key_NK", "before_N", "length_N", "place_X", "source_X")
        turns = tuple((place.to(device), source.to(device)) for place, source in self.key_turns)
        return replace(self, masks={}, key_turns=turns, **{name: getattr(self, name).to(device) for name in names})

    def mask(self, window: int | None, dtype: torch.dtype, times: int) -> Tensor:
        """Additive [N, 1, times * Q, K]: may a query see a key, within a sliding window of `window` positions?"""
        if (window, dtype, times) not in self.masks:
            query = torch.arange(self.query_NQ.shape[1], device=self.query_NQ.device)[:, None]
            key = torch.arange(self.key_NK.shape[1], device=self.key_NK.device)[None, :]
            position_NQ1 = query + self.before_N[:, None, None]
            end_N11 = (self.before_N + self.length_N)[:, None, None]
            seen = (key <= position_NQ1) & (key < end_N11)
            if window is not None:
                seen = seen & (position_NQ1.minimum(end_N11 - 1) - key < window)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
            self.masks[window, dtype, times] = mask.repeat(1, times, 1)[:, None]
        return self.masks[window, dtype, times]


def make_parts(pieces: Sequence[Piece]) -> tuple[Part, ...]:
    """Parts of pieces.

    Pieces share a part when neither their queries nor their keys are more than twice as long as the others', so one
    long completion does not pad the short ones to its length.
    """
    alike: dict[tuple[int, int], list] = {}
    for piece in pieces:
        _, before, _, length = piece
        size = _doubling(length, QUERY_ALIGNMENT), _doubling(before + length, FEWEST_KEYS)
        alike.setdefault(size, []).append(piece)
    return tuple(make_part(some) for some in alike.values())


def make_part(pieces: Sequence[Piece]) -> Part:
    """One part of all pieces, padded to the longest; see `make_parts`."""
    num_queries = _aligned(max(length for *_, length in pieces), QUERY_ALIGNMENT)
    num_keys = max(before + length for _, before, _, length in pieces)
    num_keys = _doubling(num_keys, FEWEST_KEYS) if num_keys < KEY_ALIGNMENT else _aligned(num_keys, KEY_ALIGNMENT)
    places = torch.cat([torch.arange(start, start + length) for *_, start, length in pieces])
    sources = torch.cat([torch.arange(n * num_queries, n * num_queries + p[3]) for n, p in enumerate(pieces)])
    before_start, before, start, length = (torch.tensor(column)[:, None] for column in zip(*pieces, strict=True))
    query, key = torch.arange(num_queries), torch.arange(num_keys)
    query_NQ = start + query.minimum(length - 1)
    key_NK = torch.where(key < before, before_start + key, start + (key - before).minimum(length - 1))
    turns = _key_turns(pieces, range(0, len(pieces) * num_keys, num_keys))
    return Part(query_NQ, key_NK, before[:, 0], length[:, 0], places, sources, turns)


def _key_turns(pieces: Sequence[Piece], firsts: Sequence[int]) -> Turns:
    """In turn 0 every piece's keys are used by the piece itself, in turn n by the n-th later piece that attends to it.

    Args:
        firsts: for each piece, the index of its first key among the gathered keys.
    """
    turns, seen = [[]], Counter(start for *_, start, _ in pieces)
    for first, (_, before, start, length) in zip(firsts, pieces, strict=True):
        turns[0].append((torch.arange(start, start + length), torch.arange(first + before, first + before + length)))
    for first, (before_start, before, _, _) in zip(firsts, pieces, strict=True):
        if not before:
            continue
        if seen[before_start] == len(turns):
            turns.append([])
        places = torch.arange(before_start, before_start + before)
        turns[seen[before_start]].append((places, torch.arange(first, first + before)))
        seen[before_start] += 1
    return tuple(tuple(torch.cat(column) for column in zip(*turn, strict=True)) for turn in turns)


def _aligned(n: int, to: int) -> int:
    return -(-n // to) * to


def _doubling(n: int, least: int) -> int:
    """The first of least, 2 * least, 4 * least, … that is at least n."""
    return least << (-(-n // least) - 1).bit_length()


class _Gather(torch.autograd.Function):
    """x[index] along the first dimension, with gradients added in a fixed order, in float32 or better.

    On a GPU the backward pass of `index_select` uses atomic additions, in a different order every time and, in
    bfloat16, with different rounding.
    """

    @staticmethod
    def forward(ctx, x, index, turns):
        """`turns`: which part of the result has a gradient, as (indices into x, indices into the result)."""
        ctx.length, ctx.turns = len(x), turns
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        """Adds turn by turn."""
        shape = (ctx.length, *grad.shape[1:])
        if len(ctx.turns) == 1:
            place, source = ctx.turns[0]
            return grad.new_zeros(shape).index_copy_(0, place, grad.index_select(0, source)), None, None
        total = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for place, source in ctx.turns:
            total.index_add_(0, place, grad.index_select(0, source).to(total.dtype))
        return total.to(grad.dtype), None, None


@contextlib.contextmanager
def packed_attention(causal_lm: nn.Module) -> Iterator[None]:
    """A context in which the model's layers accept packed rows, also when gradient checkpointing recomputes them."""
    config = causal_lm.config.get_text_config()
    original = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = original


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    pieces: Pieces,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface: query [1, H, T, E], key and value [1, J, T, E] -> [1, T, H, E].

    Raises:
        ValueError: the layer has something that is not handled here (attention sinks; a sliding window in its mask).
    """
    window = kwargs.get("sliding_window")
    if s_aux is not None or ("sliding_window" not in kwargs and getattr(module.config, "sliding_window", None)):
        raise ValueError("packed rows do not support this attention (sinks, or a sliding window in the mask)")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if takes_varlen(q, v, dropout, softcap):
        keys_K, turns, ends = pieces.gathered
        k, v = (_Gather.apply(x, keys_K, turns) for x in (k, v))
        return varlen_attention(q, k, v, ends, window, scaling)[None], None
    settings = dict(window=window, scale=scaling, dropout=dropout, softcap=softcap)
    out = torch.cat([_attend_part(q, k, v, part, **settings) for part in pieces.parts])
    places = torch.cat([part.place_X for part in pieces.parts])
    return torch.zeros_like(q).index_copy(0, places, out)[None], None


def _attend_part(q: Tensor, k: Tensor, v: Tensor, part: Part, window, scale, dropout, softcap) -> Tensor:
    """[queries without padding, H, E]. Query heads that share a key-value head are joined into one longer query, so
    that no key is copied."""
    (n, num_queries), num_keys = part.query_NQ.shape, part.key_NK.shape[1]
    heads, size, shared = q.shape[1], q.shape[2], k.shape[1]
    each = heads // shared
    q = _Gather.apply(q, part.query_NQ.flatten(), ((part.place_X, part.source_X),))
    q = q.view(n, num_queries, shared, each, size).permute(0, 2, 3, 1, 4).reshape(n, shared, each * num_queries, size)
    k, v = (_Gather.apply(x, part.key_NK.flatten(), part.key_turns) for x in (k, v))
    k, v = (x.view(n, num_keys, shared, -1).transpose(1, 2) for x in (k, v))
    mask = part.mask(window, q.dtype, each)
    if softcap is None and not dropout and takes_cpu(q):
        out = cpu_attention(q, k, v, mask, scale)
    elif softcap is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    else:
        scores = (q @ k.transpose(2, 3)) * (size**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) + mask
        out = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
    out = out.view(n, shared, each, num_queries, -1).permute(0, 3, 1, 2, 4).reshape(n * num_queries, heads, -1)
    return out.index_select(0, part.source_X)


AttentionInterface.register(NAME, attend)
