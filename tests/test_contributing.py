"""The worked example of CONTRIBUTING.md: taken from the page, registered as it says, computed, and trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import losses, make_rows, make_trainer

from lowdft import objectives
from lowdft.errors import UserError
from lowdft.objectives import Scores


@pytest.fixture
def hinge(monkeypatch):
    """The example's module, among the known objectives."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module: dict = {}
    exec(compile(code, "hinge.py", "exec"), module)
    for objective in module["OBJECTIVES"]:
        monkeypatch.setitem(objectives._OBJECTIVES, objective.name, objective)
    return objectives.get("hinge")


def test_example_by_hand(hinge):
    """P - RP = 2, N - RN = -1 and 12: H = 3 and -10, so 1 - H/10 = 0.7 and 2, mean 1.35; dL/dP = -0.1, dL/dN = 0.05."""
    positive = torch.tensor([-3.0], dtype=torch.float64, requires_grad=True)
    negative = torch.tensor([[-6.0, -8.0]], dtype=torch.float64, requires_grad=True)
    scores = Scores(
        positive,
        torch.tensor([4]),
        policy_negative_logps_MB=negative,
        negative_tokens_MB=torch.tensor([[4, 4]]),
        ref_logps_M=torch.tensor([-5.0], dtype=torch.float64),
        ref_negative_logps_MB=torch.tensor([[-5.0, -20.0]], dtype=torch.float64),
    )
    loss = hinge.compute(scores, **hinge.defaults).surrogate_M.sum()
    loss.backward()
    assert loss.item() == pytest.approx(1.35, abs=1e-12)
    assert positive.grad.tolist() == pytest.approx([-0.1]) and negative.grad.tolist()[0] == pytest.approx([0.05, 0.05])


def test_example_trains(hinge, tmp_path):
    """With its reference prepared: at the first step H = 0 and the loss is 1; then it falls."""
    settings = dict(objective="hinge", warmup_steps=0, lr_scheduler_type="constant", objective_args={"beta": 0.5})
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(1.0, abs=1e-4) and losses(trainer)[-1] < 0.9


def test_example_is_refused_without_what_it_needs(hinge, tmp_path):
    bare = [row | {"negative_ids": []} for row in make_rows(4)]
    with pytest.raises(UserError, match="too few negatives"):
        make_trainer(tmp_path, bare, objective="hinge")
    with pytest.raises(ValueError, match="hinge cannot be computed with"):
        make_trainer(tmp_path, objective="hinge", objective_args={"beta": "large"})
