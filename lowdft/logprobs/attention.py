"""Attention of a packed row: every prompt over itself, every completion over its prompt and itself.

The row's linear layers see tokens only. Here queries and keys are gathered into one small batch for the prompts and one
for the completions, so that nothing attends, or pays, across them. In bfloat16 a sequence gets the same bits whatever
stands beside it (measured on CPUs: rows and tiles are aligned so that no kernel splits its sums otherwise), and so
policy and reference agree exactly.

Shape suffixes: T tokens of the packed row, N pieces (prompts or completions), Q queries, K keys, H query heads,
J key-value heads, E size of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "lowdft_packed"
QUERY_ALIGNMENT, KEY_ALIGNMENT = 16, 128


@dataclass(frozen=True)
class Part:
    """Pieces of a packed row that attend alike: piece n has `length` queries, and `before` more keys than those."""

    query_NQ: Tensor  # places in the packed row; what is beyond `length` is anything
    key_NK: Tensor
    before_N: Tensor
    length_N: Tensor
    place_X: Tensor  # the valid queries' places in the packed row, and in N * Q
    source_X: Tensor
    masks: dict = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> Part:
        """The same part on another device."""
        names = ("query_NQ", "key_NK", "before_N", "length_N", "place_X", "source_X")
        return replace(self, masks={}, **{name: getattr(self, name).to(device) for name in names})

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


def make_part(pieces: Sequence[tuple[int, int, int, int]]) -> Part:
    """A part from (start of what comes before, its length, start of the piece, its length) for each piece."""
    num_queries = _aligned(max(length for *_, length in pieces), QUERY_ALIGNMENT)
    num_keys = _aligned(max(before + length for _, before, _, length in pieces), KEY_ALIGNMENT)
    places = torch.cat([torch.arange(start, start + length) for *_, start, length in pieces])
    sources = torch.cat([torch.arange(n * num_queries, n * num_queries + p[3]) for n, p in enumerate(pieces)])
    before_start, before, start, length = (torch.tensor(column)[:, None] for column in zip(*pieces, strict=True))
    query, key = torch.arange(num_queries), torch.arange(num_keys)
    query_NQ = start + query.minimum(length - 1)
    key_NK = torch.where(key < before, before_start + key, start + (key - before).minimum(length - 1))
    return Part(query_NQ, key_NK, before[:, 0], length[:, 0], places, sources)


def _aligned(n: int, to: int) -> int:
    return -(-n // to) * to


@contextlib.contextmanager
def packed_attention(causal_lm: nn.Module) -> Iterator[None]:
    """While this lasts the model's layers take packed rows, also those that a checkpointed backward recomputes."""
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
    parts: tuple[Part, ...],
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
        raise ValueError("this model's attention is more than packed rows can tell")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    settings = dict(window=window, scale=scaling, dropout=dropout, softcap=softcap)
    out = torch.cat([_attend_part(q, k, v, part, **settings) for part in parts])
    places = torch.cat([part.place_X for part in parts])
    return torch.zeros_like(q).index_copy(0, places, out)[None], None


def _attend_part(q: Tensor, k: Tensor, v: Tensor, part: Part, window, scale, dropout, softcap) -> Tensor:
    """[valid queries, H, E]. Query heads that share a key-value head stand in one longer query, so no key is copied."""
    (n, num_queries), num_keys = part.query_NQ.shape, part.key_NK.shape[1]
    heads, size, shared = q.shape[1], q.shape[2], k.shape[1]
    each = heads // shared
    q = q.index_select(0, part.query_NQ.flatten()).view(n, num_queries, shared, each, size)
    q = q.permute(0, 2, 3, 1, 4).reshape(n, shared, each * num_queries, size)
    k, v = (x.index_select(0, part.key_NK.flatten()).view(n, num_keys, shared, -1).transpose(1, 2) for x in (k, v))
    mask = part.mask(window, q.dtype, each)
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    else:
        scores = (q @ k.transpose(2, 3)) * (size**-0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) + mask
        out = nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v
    out = out.view(n, shared, each, num_queries, -1).permute(0, 3, 1, 2, 4).reshape(n * num_queries, heads, -1)
    return out.index_select(0, part.source_X)


AttentionInterface.register(NAME, attend)
