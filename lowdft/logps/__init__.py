"""The log-probability engine: prompt groups -> rows, mask, positions; hidden states -> log-probabilities."""

from lowdft.logps.engine import CompletionLogps, choose_layout, score
from lowdft.logps.head import Head, proposal_logps, token_logps, truncate
from lowdft.logps.rows import Group, lay_out

__all__ = [
    "CompletionLogps",
    "Group",
    "Head",
    "choose_layout",
    "lay_out",
    "proposal_logps",
    "score",
    "token_logps",
    "truncate",
]
