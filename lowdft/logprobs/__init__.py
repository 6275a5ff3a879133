"""The log-probability engine: turns prompt groups into rows, and hidden states into log-probabilities."""

from lowdft.logprobs.attention import packed_attention
from lowdft.logprobs.check import choose_layout
from lowdft.logprobs.engine import CompletionLogps, bare, layers_in, score
from lowdft.logprobs.head import Head, chunk_for, proposal_logps, token_logps, truncate
from lowdft.logprobs.rows import Group, lay_out

__all__ = [
    "CompletionLogps",
    "Group",
    "Head",
    "bare",
    "chunk_for",
    "choose_layout",
    "lay_out",
    "layers_in",
    "packed_attention",
    "proposal_logps",
    "score",
    "token_logps",
    "truncate",
]
