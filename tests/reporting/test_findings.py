"""What a run's numbers warn of: each with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from lowdft.reporting import findings, samples
from lowdft.reporting.metrics import became_negligible, negligible


def test_only_the_last_quarter_of_the_weights_counts():
    """Of 8 steps the last two: (0.002 + 0.016) / 2 = 0.009 is under 0.01, (0.006 + 0.016) / 2 = 0.011 is not."""
    assert "9.0e-03" in negligible([1.0] * 6 + [0.002, 0.016])
    assert negligible([1.0] * 6 + [0.006, 0.016]) is None
    assert negligible([]) is None


def test_a_running_training_says_it_once():
    """At the fifth line under 0.01 in a row, not before and not again."""
    weights = [0.5, 1e-3, 0.5] + [1e-3] * 7
    said = [n for n in range(len(weights) + 1) if became_negligible(weights[:n])]
    assert said == [8]


@pytest.mark.parametrize("after, fell", [(-12.0, True), (-10.0, False), (-8.0, False)])
def test_completions_that_become_less_likely(after, fell):
    steps = [{"step": i, "logps/positive": -10.0 + (after + 10.0) * i / 40} for i in range(40)]
    found = [warning for warning in findings.of_steps(steps) if "completions themselves" in warning]
    assert bool(found) == fell


def test_noise_is_no_fall():
    """Quarters of +-3 nats whose means differ by 0.6: the standard error of the difference is about 1.4."""
    steps = [{"step": i, "logps/positive": -10.0 + (3 if i % 2 else -3) - 0.015 * i} for i in range(40)]
    assert not list(findings.of_steps(steps))


def test_averages_that_still_are_their_first_value():
    """gamma 0.5, two visits: the first value's share of the average is 0.25; u = 0.26 leaves 0.25/0.26 = 96% of it."""
    stuck, moved = math.log(0.26), math.log(0.5)
    assert "2 of 3 examples" in next(findings.of_log_u([stuck, stuck, moved, 0.0], [2, 2, 2, 0], 0.0, 0.5))
    assert not list(findings.of_log_u([stuck, moved, moved], [2, 2, 2], 0.0, 0.5))
    assert not list(findings.of_log_u([stuck], [2], "first_batch", 0.5)) + list(findings.of_log_u([0.0], [1], 0.0, 1.0))


def test_negatives_at_the_cap_and_equal_to_completions():
    facts = {"negatives": 512, "cut_at_max_new_tokens": 473, "equal_to_the_completion": 26, "empty": 25, "rows": 128}
    capped, equal = findings.of_negatives(facts)
    assert "473 of 512 negatives (92%) end at the length limit" in capped and "26 of 512" in equal
    assert not list(findings.of_negatives({"negatives": 512, "cut_at_max_new_tokens": 51}))


def test_repetition_counts_against_the_base():
    loop = "the answer is four " * 5
    found = [{"base": "short", "after": loop}, {"base": "short", "after": "fine"}]
    assert "1 of 2 answers of the trained model repeat" in next(findings.of_samples(found))
    assert not list(findings.of_samples([{"base": loop, "after": loop}]))


def test_what_the_filters_know_a_row_by():
    assert samples.outcome({"base": False, "after": True}) == "right changed fixed"
    assert samples.outcome({"base": True, "after": False}) == "wrong changed broken"
    assert samples.outcome({"base": True, "after": True}) == "right" and samples.outcome({}) == ""
