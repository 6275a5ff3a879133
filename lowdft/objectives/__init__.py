"""The objectives: pure functions from log-probabilities to one loss per prompt. See `get(name)` and `names()`."""

from __future__ import annotations

from difflib import get_close_matches

from lowdft.objectives import dft, listwise, pairwise, sft
from lowdft.objectives.base import Losses, Objective, Scores

__all__ = ["Losses", "Objective", "Scores", "get", "names"]

_ALL = (*dft.OBJECTIVES, *listwise.OBJECTIVES, *sft.OBJECTIVES, *pairwise.OBJECTIVES)
_OBJECTIVES = {o.name: o for o in _ALL}


def names() -> list[str]:
    """The names that `get` knows."""
    return list(_OBJECTIVES)


def get(name: str) -> Objective:
    """The objective of that name; raises ValueError with the nearest known name if there is none."""
    if name not in _OBJECTIVES:
        near = get_close_matches(name, _OBJECTIVES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"objective {name!r} is unknown; known are {', '.join(_OBJECTIVES)}.{hint}")
    return _OBJECTIVES[name]
