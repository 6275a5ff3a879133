"""Is a greedy answer right? For answers that can be checked: a number, a choice, a pattern, or mathematics."""

from __future__ import annotations

import re
from collections.abc import Callable

from lowdft.errors import UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
CHOICE = re.compile(r"\(?\b([A-Z])\b\)?")


def checker(kind: str, pattern: str | None = None) -> Callable[[str, str], bool]:
    """`check(answer, truth) -> bool` for kind "number", "choice", "regex" or "math".

    number: after "####" where it stands, else the last number of the text; commas and trailing zeros do not count.
    choice: a letter standing alone, the last of the text. regex: the first group of the last match of `pattern`.
    math: `math-verify` decides (an optional package).
    """
    if kind == "math":
        return _math
    extract = extractor(kind, pattern)

    def check(answer: str, truth: str) -> bool:
        wanted = extract(truth)
        if wanted is None and kind == "regex":
            wanted = truth.strip()  # a bare answer needs no pattern around it
        return wanted is not None and extract(answer) == wanted

    return check


def extractor(kind: str, pattern: str | None = None) -> Callable[[str], object]:
    """What of a text is its answer; None when there is none."""
    if kind == "number":
        return _number
    compiled = CHOICE if kind == "choice" else re.compile(pattern)

    def extract(text: str) -> str | None:
        found = [m.group(1) if compiled.groups else m.group(0) for m in compiled.finditer(text)]
        return found[-1].strip() if found else None

    return extract


def detect(truths: list[str]) -> str:
    """ "number" when every true answer has one after "####", or is nothing but a number; else "none"."""
    if truths and all("####" in truth or NUMBER.fullmatch(truth.strip()) for truth in truths):
        return "number"
    return "none"


def _number(text: str) -> float | None:
    found = NUMBER.findall(text.rsplit("####", 1)[-1]) or NUMBER.findall(text)
    if not found:
        return None
    first_or_last = found[0] if "####" in text else found[-1]
    return float(first_or_last.replace(",", ""))


def _math(answer: str, truth: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(
            'evaluation.answer is math, which needs the package math-verify: pip install "lowdft[eval]"'
        ) from None
    return bool(verify(parse(truth), parse(answer)))
