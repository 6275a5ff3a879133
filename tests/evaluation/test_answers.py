"""Answers that can be checked."""

from __future__ import annotations

import pytest

from lowdft.evaluation import answers


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("So she makes 9 * 2 = $18 every day.", "She makes 18.\n#### 18", True),
        ("#### 1,018", "1018", True),
        ("#### 7, and not 8", "7", True),
        ("The answer is 18.0", "18", True),
        ("18 is less than 19", "18", False),
        ("no idea", "18", False),
        ("9.9 is bigger than 9.11, so 9.9.", "9.9", True),
        ("it falls by -3", "-3", True),
        ("it falls by \u22123.5", "-3.5", True),
        ("x = -$5", "-5", True),
        ("10-5", "-5", False),
        ("10-5", "5", True),
        ("10 \u2212 5", "-5", False),
        ("10 - 5 = 5", "5", True),
        ("pages 3\u20135", "5", True),
        ("3/4", "4", False),
        ("It is 3/4.", "0.75", True),
        ("18/2 in all", "9", True),
        ("1, 2 and 3", "3", True),
        ("1,2", "12", False),
        ("1,234,567.50", "1234567.5", True),
        ("3/0", "3", False),
        ("we get $\\frac{1}{2}$", "0.5", True),
        ("we get $\\frac{1}{2}$", "2", False),
        ("so \\boxed{18}, of 20", "18", True),
        ("It costs \\$1,234", "1234", True),
        ("3 1/2 cups", "3.5", True),
        ("-3 1/2", "-3.5", True),
        ("3 1/2 cups", "1/2", False),
        ("half: \u00bd", "0.5", True),
        pytest.param("9" * 5000, "5", False, id="5,000 digits"),
        ("id 5e12345678", "5", False),
    ],
)
def test_18_numbers(answer, truth, right):
    assert answers.checker("number")(answer, truth) is right


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) 42", "B"),
        ("**B**", "B"),
        ("B\nC is a common error", "B"),
        ("B. A common error is C.", "B"),
        ("I think (B).", "B"),
        ("I think it is A", "A"),
        ("The answer is B, because I checked.", "B"),
        ("The answer is A because I checked.", "A"),
        ("The answer is B 42", "B"),
        ("Answer: B\nExplanation: C is wrong.", "B"),
        ("The correct answer: **C**", "C"),
        ("Let A be a set. The answer is C", "C"),
        ("A is wrong, B is right", "B"),
        ("I would say that A is the answer", "A"),
        ("I would choose option D.", "D"),
        ("First I said the answer is A. No: the answer is B.", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\mathrm{B}}", "B"),
        ("The answer is 'B'.", "B"),
        ("The answer is \u201cB\u201d", "B"),
        ("The answer is `B`", "B"),
        ("Because it is so", None),
        ("A cat sat here", None),
        ("I, for one, do not know", None),
        ("The answer is A cat", None),
        ("It's not B.", None),
        ("", None),
    ],
)
def test_18_choices(answer, letter):
    assert answers.extractor("choice")(answer) == letter
    assert answers.checker("choice")(answer, "B") is (letter == "B")


def test_patterns():
    check = answers.checker("regex", r"(\S+) is bigger")
    assert check("I say 9.9 is bigger than 9.11.", "9.9 is bigger") is True
    assert check("9.11 is bigger than 9.9.", "9.9 is bigger") is False
    assert answers.checker("regex", r"(?i)\b(yes|no)\b")("Yes!", "yes") is True


def test_math():
    check = answers.checker("math")
    assert check("so we get $\\frac{1}{2}$", "$0.5$") is True
    assert check("so we get $\\frac{1}{3}$", "$0.5$") is False


def test_detection():
    assert answers.detect(["x #### 4", "#### 5"]) == "number"
    assert answers.detect(["9.9", "-3", "\u22123", "3/4", "1,000"]) == "number"
    assert answers.detect(["10-5"]) == "none"
    assert answers.detect(["Paris", "4"]) == "none"
    assert answers.detect([]) == "none"
