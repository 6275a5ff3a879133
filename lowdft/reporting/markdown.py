"""Escapes texts from users and data for Markdown, so that they are shown literally and never as markup."""

from __future__ import annotations

import re
from collections.abc import Sequence


def plain(text: object) -> str:
    """A text on one line, with all markup of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~$])", r"\\\1", " ".join(str(text).split()))


def code(text: object) -> str:
    """A text as inline code, even if it has backticks."""
    line = " ".join(str(text).split())
    fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def block(text: str, language: str = "") -> str:
    """A text as a fenced block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table from cells that are already Markdown; the first column is aligned left."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(
        "| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", str(cell)) for cell in line) + " |" for line in lines
    )
