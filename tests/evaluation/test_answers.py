"""Answers that can be checked."""

from __future__ import annotations

import pytest

from lowdft.evaluation import answers


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("So she makes 9 * 2 = $18 every day.", "She makes 18.\n#### 18", True),
        ("#### 1,018", "1018", True),
        ("The answer is 18.0", "18", True),
        ("18 is less than 19", "18", False),
        ("no idea", "18", False),
        ("9.9 is bigger than 9.11, so 9.9.", "9.9", True),
        ("it falls by -3", "-3", True),
    ],
)
def test_numbers(answer, truth, right):
    assert answers.checker("number")(answer, truth) is right


def test_choices_and_patterns():
    assert answers.checker("choice")("I think (B).", "B") is True
    assert answers.checker("choice")("Because it is so", "B") is False
    check = answers.checker("regex", r"(\S+) is bigger")
    assert check("I say 9.9 is bigger than 9.11.", "9.9 is bigger") is True
    assert check("9.11 is bigger than 9.9.", "9.9 is bigger") is False


def test_math():
    check = answers.checker("math")
    assert check("so we get $\\frac{1}{2}$", "$0.5$") is True
    assert check("so we get $\\frac{1}{3}$", "$0.5$") is False


def test_detection():
    assert answers.detect(["x #### 4", "#### 5"]) == "number"
    assert answers.detect(["9.9", "-3"]) == "number"
    assert answers.detect(["Paris", "4"]) == "none"
    assert answers.detect([]) == "none"
