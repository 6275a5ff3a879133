"""The table of moving averages: updates, saving, and refusing another run's table."""

from __future__ import annotations

import pytest
import torch

from lowdft.errors import UserError
from lowdft.training.log_u import LogU, load_table, save_table


def test_update_touches_only_its_examples():
    table = LogU(4, init=0.5)
    table.update(torch.tensor([3, 1]), torch.tensor([-1.0, -2.0]))
    assert table.values.tolist() == [0.5, -2.0, 0.5, -1.0]
    assert table.visits.tolist() == [0, 1, 0, 1]


def test_first_batch_is_not_started():
    assert LogU(2, init="first_batch").values.isnan().all()


def test_same_example_twice_is_an_error():
    with pytest.raises(ValueError, match="twice"):
        LogU(4).update(torch.tensor([1, 1]), torch.tensor([0.0, 0.0]))


def test_round_trip(tmp_path):
    table, other = LogU(3), LogU(3)
    table.update(torch.tensor([0, 2]), torch.tensor([0.1, -700.0]))
    save_table(tmp_path / "log_u.safetensors", table.state_dict(), {"tau": 1.0})
    other.load_state_dict(load_table(tmp_path / "log_u.safetensors", {"tau": 1.0}))
    assert torch.equal(other.values, table.values) and torch.equal(other.visits, table.visits)


def test_another_runs_table_is_refused(tmp_path):
    save_table(tmp_path / "t", LogU(3).state_dict(), {"tau": 1.0, "data": "a"})
    with pytest.raises(UserError, match="tau was 1.0, is now 0.3"):
        load_table(tmp_path / "t", {"tau": 0.3, "data": "a"})
    with pytest.raises(UserError, match="is missing"):
        load_table(tmp_path / "absent", {})
