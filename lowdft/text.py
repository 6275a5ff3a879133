"""Text for people."""

from __future__ import annotations

import re

# control characters but tab and line feed, and those that turn the direction of writing
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""`text` with what a terminal would obey instead of show written as escapes, such as \x1b.

    Everything that comes from data, models and files passes here before it is printed.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(text))
