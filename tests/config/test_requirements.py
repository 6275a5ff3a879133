"""What an objective requires, before a model is loaded."""

from __future__ import annotations

import pytest
from helpers import make_tokenizer

from lowdft import DFTConfig, objectives
from lowdft.config.requirements import check_datasets, check_proposal
from lowdft.config.sections import NegativesSection
from lowdft.data.encode import Encoder
from lowdft.data.example import Example
from lowdft.data.python_rows import encode_rows
from lowdft.errors import UserError


@pytest.mark.parametrize(
    "negatives, training, ready, said",
    [
        ({}, {}, True, "the rows have their own negatives"),
        (dict(stop=["\n"]), {}, False, "negatives.stop ends them early"),
        (dict(strategy="few_shot"), {}, False, "negatives.strategy few_shot ends them at a line break"),
        (dict(resample=1), {}, False, "negatives.resample replaces some"),
        (dict(temperature=0.0), {}, False, "negatives.temperature is 0, so nothing is sampled"),
        (dict(adapter="a"), {}, False, "they are sampled from negatives.adapter"),
        (dict(adapter="a"), dict(reference_model="adapter:b"), False, "they are sampled from negatives.adapter"),
        (dict(adapter="a"), dict(reference_model="adapter:a"), False, None),
        ({}, {}, False, None),
    ],
)
def test_2_a_proposal_is_that_of_the_sampler(tmp_path, negatives, training, ready, said):
    objective = objectives.get("dft")
    section = NegativesSection(**negatives)
    settings = dict(output_dir=str(tmp_path), use_cpu=True) | training
    check_proposal(section, DFTConfig(**settings), objective, [], ready)  # nothing to ask of other references
    args = DFTConfig(**settings, reference_prompt="proposal")
    if said is None:
        check_proposal(section, args, objective, [Example("0", "1?", "1", [])], ready)
    else:
        with pytest.raises(UserError, match=f"reference_prompt: proposal.*{said}.*training or sampling"):
            check_proposal(section, args, objective, [Example("0", "1?", "1", [])], ready)


def test_a_sampling_prompt_is_in_the_rows_or_refused(tmp_path):
    """Without it the training prompt would silently stand in."""
    tokenizer, objective = make_tokenizer(), objectives.get("dft")
    args = DFTConfig(output_dir=str(tmp_path), use_cpu=True, reference_prompt="sampling", num_train_epochs=1)
    row = {"prompt": "2+2=", "completion": "4", "negatives": ["5", "6"]}
    with pytest.raises(UserError, match="reference_prompt: sampling requires.*sampling_prompt"):
        check_datasets(encode_rows([row], Encoder(tokenizer)), [], objective, args, has_adapter=True)
    rows = encode_rows([row | {"sampling_prompt": "Be wrong. 2+2="}], Encoder(tokenizer))
    check_datasets(rows, [], objective, args, has_adapter=True)
    assert tokenizer.decode(rows[0]["sampling_prompt_ids"]) == "Be wrong. 2+2="
    scored = encode_rows([row | {"ref_negative_logps": [-1.0, -2.0]}], Encoder(tokenizer))
    check_datasets(scored, [], objective, args, has_adapter=True)
