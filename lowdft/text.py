"""Text for people: safe printing and suggestions for misspelled names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

# control characters except tab and line feed, and characters that change the direction of text
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""`text` with control characters, which a terminal would obey, written as escapes such as \x1b.

    Everything that comes from data, models and files passes through here before it is printed.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))


def nearest(name: str, known: Iterable[str], cutoff: float = 0.75) -> str | None:
    """The known name closest to `name`, or None if none is close."""
    by_lower = {k.lower(): k for k in known}
    found = get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence for the end of a message: the closest known name, or else the first dozen of them."""
    known = list(known)
    near = nearest(name, known, cutoff=0.6)
    return f" Did you mean {near!r}?" if near else f" Known are: {', '.join(known[:12])}{', …' * (len(known) > 12)}"
