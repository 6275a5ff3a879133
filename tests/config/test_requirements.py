"""What an objective requires, before a model is loaded."""

from __future__ import annotations

import pytest

from lowdft import DFTConfig, objectives
from lowdft.config.requirements import check_proposal
from lowdft.config.sections import NegativesSection
from lowdft.errors import UserError


@pytest.mark.parametrize(
    "negatives, training, ready, said",
    [
        ({}, {}, True, "the rows bring their own negatives"),
        (dict(stop=["\n"]), {}, False, "negatives.stop ends them early"),
        (dict(resample=1), {}, False, "negatives.resample replaces some"),
        (dict(temperature=0.0), {}, False, "negatives.temperature 0 draws nothing"),
        (dict(adapter="a"), {}, False, "negatives.adapter wrote them"),
        (dict(adapter="a"), dict(reference_model="adapter:b"), False, "negatives.adapter wrote them"),
        (dict(adapter="a"), dict(reference_model="adapter:a"), False, None),
        ({}, {}, False, None),
    ],
)
def test_a_proposal_is_that_of_the_sampler(tmp_path, negatives, training, ready, said):
    objective = objectives.get("dft")
    section = NegativesSection(**negatives)
    settings = dict(output_dir=str(tmp_path), use_cpu=True) | training
    check_proposal(section, DFTConfig(**settings), objective, ready)  # nothing to ask of other references
    args = DFTConfig(**settings, reference_prompt="proposal")
    if said is None:
        check_proposal(section, args, objective, ready)
    else:
        with pytest.raises(UserError, match=f"reference_prompt: proposal.*{said}.*training or sampling"):
            check_proposal(section, args, objective, ready)
