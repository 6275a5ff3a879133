"""Which negatives of a prompt a visit scores."""

from __future__ import annotations

from lowdft.data.batch import Batch, visit_range


def test_visits_walk_through_the_pool():
    """Each visit takes the next two of six, then the first again."""
    assert [visit_range(v, 2, 6) for v in range(4)] == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_every_row_counts_its_own_visits():
    rows = [{"prompt_ids": [1], "completion_ids": [2], "negative_ids": [[n] for n in range(4)]} for _ in range(2)]
    assert Batch(None, rows).negatives([0, 1], 2) == [[[0], [1]], [[2], [3]]]
