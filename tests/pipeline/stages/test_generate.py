"""What is said of generated negatives."""

from __future__ import annotations

from lowdft.pipeline.stages.generate import mostly_cut


def test_negatives_that_mostly_hit_the_length_cap_are_warned_of():
    warning = mostly_cut({"negatives": 512, "cut_at_max_new_tokens": 473}, 320)
    assert warning.startswith("473 of 512 negatives were cut at negatives.max_new_tokens=320")
    assert mostly_cut({"negatives": 512, "cut_at_max_new_tokens": 256}, 320) is None
    assert mostly_cut({"negatives": 0, "cut_at_max_new_tokens": 0}, 320) is None
