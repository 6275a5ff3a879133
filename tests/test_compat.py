"""Canaries: what transformers keeps private and compat.py touches is still there, and still called when it must be."""

from __future__ import annotations

import inspect

import pytest
import torch
from helpers import make_llama, make_rows, make_trainer
from transformers import GPTJConfig, GPTJForCausalLM, Trainer, TrainingArguments
from transformers.integrations import deepspeed

from lowdft.compat import (
    checkpoint_layers,
    takes_other_attention,
    use_one_gpu,
    without_compiled_communication,
    without_deepspeed,
)


def test_hooks_are_called_in_their_order(tmp_path):
    """After the preparation, before any step; and before each optimizer step, with the gradient's norm."""
    trainer, seen = make_trainer(tmp_path, make_rows(4), max_steps=2), []
    prepared, before = trainer.after_preparation, trainer.before_optimizer_step
    trainer.after_preparation = lambda model, resuming: seen.append((resuming, model)) or prepared(model, resuming)

    def before_step(norm):
        seen.append(float(norm))
        assert trainer.state.global_step == len(seen) - 2
        before(norm)

    trainer.before_optimizer_step = before_step
    trainer.train()
    assert seen[0][0] is False and isinstance(seen[0][1], torch.nn.Module)
    assert len(seen) == 3 and all(norm > 0 for norm in seen[1:])


def test_private_methods_are_there():
    """With the parameters that are passed on."""
    wanted = {"_prepare_for_training": 3, "_get_grad_norm": 2, "_save_checkpoint": 2, "_get_output_dir": 1}
    for name, count in wanted.items():
        assert len(inspect.signature(getattr(Trainer, name)).parameters) == count + 1, name
    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)


@pytest.mark.parametrize("settings, layers", [({}, [True, True]), ({"every_n_layers": 2}, [True, False])])
def test_layers_are_checkpointed(settings, layers):
    model = make_llama()
    checkpoint_layers(model, {"use_reentrant": False} | settings)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == layers


def test_attention_that_transformers_can_exchange():
    assert takes_other_attention(make_llama())
    assert not takes_other_attention(GPTJForCausalLM(GPTJConfig(n_embd=8, n_layer=1, n_head=1, rotary_dim=4)))


def test_one_gpu(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0 and use_one_gpu(args) == 0
    args._n_gpu = 3
    assert use_one_gpu(args) == 3 and args.n_gpu == 1


def test_deepspeed_compiles_no_communication(monkeypatch):
    """Its table of operators has the one that it would compile, and its builder goes by this table."""
    operators = pytest.importorskip("deepspeed.ops")
    from deepspeed.comm.torch import build_shm_op

    assert "deepspeed_shm_comm" in operators.__compatible_ops__
    monkeypatch.setitem(operators.__compatible_ops__, "deepspeed_shm_comm", True)  # taken back at the end
    without_compiled_communication()
    assert build_shm_op() is None


def test_without_deepspeed(monkeypatch):
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", "anything")
    with without_deepspeed():
        assert deepspeed._hf_deepspeed_config_weak_ref is None
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed._hf_deepspeed_config_weak_ref == "anything"
