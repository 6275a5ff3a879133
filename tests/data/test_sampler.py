"""Steps are the same on any number of processes, and no example comes twice in an epoch."""

from __future__ import annotations

import pytest

from lowdft.data.sampler import StepSampler


def steps(n: int, size: int, ranks: int, epoch: int = 0, **settings) -> list[list[int]]:
    """Every micro-batch of all ranks together, in their order."""
    samplers = [StepSampler(n, size, settings.get("seed", 7), rank, ranks) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    every = [list(sampler) for sampler in samplers]
    assert {len(own) for own in every} == {len(samplers[0])}
    return [[i for own in every for i in own[k]] for k in range(len(samplers[0]))]


@pytest.mark.parametrize("n", [12, 13, 17, 5])
def test_any_number_of_ranks_takes_the_steps_of_one(n):
    one = steps(n, 6, 1)
    assert sorted(i for step in one for i in step) == list(range(n))
    assert steps(n, 3, 2) == one and steps(n, 2, 3) == one and steps(n, 1, 6) == one


def test_every_epoch_has_its_order():
    assert steps(12, 6, 1, epoch=0) == steps(12, 6, 1, epoch=0) != steps(12, 6, 1, epoch=1)
    assert steps(5, 2, 1, seed=None) == [[0, 1], [2, 3], [4]]


def test_where_examples_run_out_ranks_come_away_empty():
    """Seven in micro-batches of two on three ranks: the second round has one, for the first rank."""
    assert [list(map(len, StepSampler(7, 2, 0, rank, 3))) for rank in range(3)] == [[2, 1], [2, 0], [2, 0]]
    assert [len(StepSampler(7, 2, 0, rank, 3, drop_last=True)) for rank in range(3)] == [1, 1, 1]
