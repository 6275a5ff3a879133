"""Texts from users and data inside Markdown, so that they show as they are and never as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: object) -> str:
    """A text on one line with every mark of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~$])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """A text as inline code, its own backticks included."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """A text as a fenced block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are Markdown already; the first column stands left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", str(cell)) for cell in line) + " |" for line in lines
    )
