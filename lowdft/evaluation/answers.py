"""Checks whether a greedy answer is right: a number, a choice, a pattern, or mathematics."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from fractions import Fraction

from lowdft.errors import UserError

MINUS = str.maketrans("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-" * 7)  # minus signs, hyphens and dashes
DIGITS = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
# A minus is a sign only if it touches the number and nothing else: "10-5" and "10 - 5" end in 5.
WHOLE = r"(?:(\d+)\s(?=\d+\s?/\s?\d))?"  # of "3 1/2"
NUMBER = re.compile(rf"(?:(?<![\w.)\]%-])(-))?\\?\$?{WHOLE}({DIGITS})(?:\s?/\s?({DIGITS}))?")
FRACTIONS = str.maketrans({"½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4"})
LONGEST = 400  # digits, also of an exponent's value

_OPEN = "[\\s(\\[\"'`\u2018\u201c*_]*"
_LETTER = rf"{_OPEN}(?:option\s+|choice\s+)?{_OPEN}([A-Z])(?!\w|'\w)"
# "A" and "I" are words of a sentence, unless it ends there or continues with one of these
_ENDS = r"(?:(?<=[B-HJ-Z])|(?=[ \t]*\n|\s*(?:$|[^\w\s]|because\b|since\b|as\b|and\b|is\b)))"
STATED = re.compile(
    r"(?i:\b(?:answer|choice)\b(?:\s+(?:is|was|(?:would|must|should|has\s+to)\s+be)|\s*[:=])+)"
    + _LETTER
    + _ENDS
    + r"|(?i:\b(?:choose|chose|pick|picked|select|go\s+with))"
    + _LETTER
    + _ENDS
    + r"|(?<![\w'])([A-Z])[)\]\"'*_]*\s+(?i:is\s+(?:the\s+)?(?:correct|right|best|answer))\b"
    + r"|\\boxed\{[({\s]*(?:\\(?:text|mathrm|mathbf|textbf)\{)?\(?([A-Z])\b"
)
LEADING = re.compile(r"^[\s(\[\"'*_]*(?:([A-Z])[)\]\"'*_]*\s*$|([A-HJ-Z])(?:[).:,\]*_]|[ \t]*\n)|\(([A-Z])\))")
MARKED = re.compile(r"\(([A-Z])\)|\[([A-Z])\]|\*\*([A-Z])\*\*")
CLOSING = re.compile(r"(?<!not\s)(?<!n't\s)(?<![\w'])([A-HJ-Z])[\s).\]\"'*_!]*$")


def checker(kind: str, pattern: str | None = None) -> Callable[[str, str], bool]:
    """`check(answer, truth) -> bool` for kind "number", "choice", "regex" or "math".

    number: the first number after "####", if there is one, else the last number of the text. Commas and trailing zeros
    are ignored, 3/4 is one number, and answers with LaTeX are checked by `math-verify` (an optional package).
    choice: a capital letter given as the answer: stated ("the answer is B", "B is correct", a box), or at the beginning
    ("B.", "(B)"), else the last one in brackets or at the end.
    regex: the first group of the last match of `pattern`. math: checked by `math-verify`.

    Raises:
        UserError: kind "math" without `math-verify`, when the first answer is checked.
    """
    if kind == "math":
        return _math
    extract = extractor(kind, pattern)

    def check(answer: str, truth: str) -> bool:
        if kind == "number" and "\\" in answer.replace("\\$", "$") and importlib.util.find_spec("math_verify"):
            found = extract(truth)
            return found is not None and _math(answer, f"${found}$")
        wanted = extract(truth)
        if wanted is None and kind == "regex":
            wanted = truth.strip()  # a bare answer does not need to match the pattern
            wanted = wanted.casefold() if re.compile(pattern).flags & re.IGNORECASE else wanted
        return wanted is not None and extract(answer) == wanted

    return check


def extractor(kind: str, pattern: str | None = None) -> Callable[[str], object]:
    """The part of a text that is its answer; None if there is none."""
    if kind == "number":
        return _number
    if kind == "choice":
        return _choice
    compiled = re.compile(pattern)

    def extract(text: str) -> str | None:
        found = [m.group(1) if compiled.groups else m.group(0) for m in compiled.finditer(text)]
        last = found[-1].strip() if found else None
        return last.casefold() if last and compiled.flags & re.IGNORECASE else last

    return extract


def detect(truths: list[str]) -> str:
    """ "number" if every true answer has a number after "####" or is just a number; else "none"."""
    numbers = (NUMBER.fullmatch(truth.strip().translate(MINUS)) for truth in truths)
    if truths and all("####" in truth or number for truth, number in zip(truths, numbers, strict=True)):
        return "number"
    return "none"


def _number(text: str) -> Fraction | None:
    text = text.translate(MINUS).translate(FRACTIONS)
    found = list(NUMBER.finditer(text.rsplit("####", 1)[-1])) or list(NUMBER.finditer(text))
    if not found:
        return None
    sign, whole, above, below = found[0 if "####" in text else -1].groups()
    value, divisor, whole = (_fraction(part) for part in (above, below or "1", whole or "0"))
    if None in (value, divisor, whole) or not divisor:
        return None
    return (-1 if sign else 1) * (whole + value / divisor)


def _fraction(digits: str) -> Fraction | None:
    """The value of digits; None if there are so many that they can be no answer."""
    mantissa, _, exponent = digits.lower().partition("e")
    if len(mantissa) > LONGEST or abs(int(exponent[:9] or "0")) > LONGEST:
        return None
    return Fraction(digits.replace(",", ""))


def _choice(text: str) -> str | None:
    for form, which in ((STATED, -1), (LEADING, 0), (MARKED, -1), (CLOSING, -1)):
        found = [next(filter(None, match.groups())) for match in form.finditer(text)]
        if found:
            return found[which]
    return None


def _math(answer: str, truth: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError(
            'evaluation.answer is math, which needs the package math-verify: pip install "lowdft[eval]"'
        ) from None
    return bool(verify(parse(truth), parse(answer)))
