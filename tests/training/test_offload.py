"""Gradient checkpoints in CPU memory: the same numbers, and the right tensors."""

from __future__ import annotations

import pytest
import torch
from helpers import losses, make_trainer
from torch.autograd.graph import saved_tensors_hooks


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_offloaded_checkpoints_change_nothing(layout, tmp_path):
    """The same losses, and weights to the bit."""
    settings = dict(gradient_checkpointing=True, layout=layout)
    kept, offloaded = (make_trainer(tmp_path / str(on), offload_checkpoints=on, **settings) for on in (False, True))
    kept.train(), offloaded.train()
    assert losses(offloaded) == losses(kept)
    for a, b in zip(kept.model.parameters(), offloaded.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layer_inputs_are_what_is_offloaded(tmp_path, monkeypatch):
    """The input [1, 16, 32] of both layers goes; nothing from inside a layer (of width 48), no weight matrix."""
    seen = []

    def recording(pin_memory):
        assert not pin_memory  # there is no GPU to copy to
        return saved_tensors_hooks(lambda tensor: seen.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr("lowdft.training.trainer.save_on_cpu", recording)
    settings = dict(gradient_checkpointing=True, offload_checkpoints=True, max_steps=1, gradient_accumulation_steps=1)
    make_trainer(tmp_path, objective="sft", use_cpu=True, **settings).train()
    assert seen.count((1, 16, 32)) >= 2
    assert all(48 not in shape and shape[:-1] != (32,) for shape in seen)


def test_offloading_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ValueError, match="together with gradient_checkpointing: true"):
        make_trainer(tmp_path, offload_checkpoints=True)
