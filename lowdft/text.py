"""Words for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name that `name` is most likely a misspelling of, or None."""
    by_lower = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence for the end of a message: the nearest known name, or else the first dozen of them."""
    known = list(known)
    near = nearest(name, known, cutoff=0.6)
    return f" Did you mean {near!r}?" if near else f" Known are: {', '.join(known[:12])}{', …' * (len(known) > 12)}"
