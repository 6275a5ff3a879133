"""Which tokens of a prompt's completions a visit scores."""

from __future__ import annotations

import pytest

from lowdft.data.batch import Batch, group_of, shared_prefix, visit_range


@pytest.mark.parametrize(
    "negative, completion, shared",
    [
        ([5, 6, 9], [5, 6, 7, 8], 2),
        ([4, 6], [5, 6], 0),
        ([5, 6], [5, 6, 7], 1),  # cut short: its last token is scored all the same
        ([5, 6, 7], [5, 6, 7], 2),
        ([5, 6, 7, 8], [5, 6], 2),
        ([5], [5], 0),
    ],
)
def test_shared_prefix(negative, completion, shared):
    assert shared_prefix(negative, completion) == shared


def test_negatives_are_scored_from_the_difference_or_there():
    """The completion itself is always scored whole; at the difference a negative ends there."""
    row = {"prompt_ids": [1], "completion_ids": [5, 6, 7], "negative_ids": [[5, 6, 9], [8]]}
    group = group_of(row, row["negative_ids"], negatives_scored="from_difference")
    assert group.unscored == [2, 0, 0] and group.scored_tokens == [1, 1, 3]
    alone = group_of(row, row["negative_ids"], completion=False, negatives_scored="from_difference")
    assert alone.scored_tokens == [1, 1]
    assert group_of(row, row["negative_ids"]).scored_tokens == [3, 1, 3]
    there = group_of(row, [[5, 6, 9, 9], [5, 8, 7, 7]], negatives_scored="at_difference")
    assert there.completions == [[5, 6, 9], [5, 8], [5, 6, 7]]
    assert there.unscored == [2, 1, 0] and there.scored_tokens == [1, 1, 3]


def test_visits_walk_through_the_pool():
    """Each visit takes the next two of six, then the first again."""
    assert [visit_range(v, 2, 6) for v in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_every_row_counts_its_own_visits():
    rows = [{"prompt_ids": [1], "completion_ids": [2], "negative_ids": [[n] for n in range(4)]} for _ in range(2)]
    assert Batch(None, rows).negatives([0, 1], 2) == [[[0], [1]], [[2], [3]]]
