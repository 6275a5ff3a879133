"""DFTTrainer computes what `examples/dft_in_one_file.py` does on one page: every loss, every log_u, all weights.

The page is plain: one row per forward pass, full logits, float64. Its schedule and clipping are written out. What both
follow are the facts of the paper and its authors' code: the reference scores the negatives under the training prompt,
every visit uses the next B negatives, u is updated before it divides, and a step's loss is the mean over its prompts.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import ROOT, make_llama, make_rows, make_trainer
from transformers import TrainerCallback

EPOCHS, STEP, BATCH, LEARNING_RATE = 3, 4, 2, 5e-3
SETTINGS = {  # the paper's Tables 5 and 6
    "UltraFeedback dft": dict(objective="dft", tau=1.0, gamma=0.85, negatives_per_step=2),
    "UltraFeedback dft2": dict(objective="dft2", tau=0.3, gamma=0.9, negatives_per_step=2),
    "MetaMathQA dft": dict(objective="dft", tau=1.0, gamma=0.95, negatives_per_step=4),
    "MetaMathQA dft2": dict(objective="dft2", tau=0.1, gamma=0.95, negatives_per_step=4),
    # a random model's tokens are so unlikely that those two's negatives hardly pull; here they do
    "dft2, tau 3": dict(objective="dft2", tau=3.0, gamma=0.9, negatives_per_step=2),
    "no moving average": dict(objective="dft", tau=1.0, gamma=1.0, negatives_per_step=2),
}


@pytest.fixture(scope="module")
def page():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("dft_in_one_file", ROOT / "examples" / "dft_in_one_file.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch(TrainerCallback):
    """Which examples each step took, and the table after it."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.tables = trainer, [[]], []
        step = trainer.training_step

        def training_step(model, inputs, *args):
            self.steps[-1] += inputs["batch"].index_M.tolist()
            return step(model, inputs, *args)

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([])
        self.tables.append(self.trainer.log_u.double().clone())


@pytest.mark.filterwarnings("ignore:the mean weight of the negatives")
@pytest.mark.parametrize("name", SETTINGS)
def test_trainer_follows_the_page(name, page, tmp_path, monkeypatch):
    """Three epochs of three steps in two micro-batches each."""
    settings, rows = SETTINGS[name], make_rows(12, negatives=EPOCHS * SETTINGS[name]["negatives_per_step"])
    monkeypatch.setattr("helpers.make_llama", lambda: make_llama().double())
    trainer = make_trainer(
        tmp_path,
        rows,
        peft=False,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=STEP // BATCH,
        learning_rate=LEARNING_RATE,
        reference_prompt="training",
        **settings,
    )
    watch = Watch(trainer)
    trainer.train()
    steps = [examples for examples in watch.steps if examples]
    assert [len(examples) for examples in steps] == [STEP] * 9
    model = make_llama().double()
    wanted = list(page.train(model, rows, steps, learning_rate=LEARNING_RATE, **settings))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for log, table, (value, surrogate, log_u) in zip(logs, watch.tables, wanted, strict=True):
        assert log["loss"] == pytest.approx(value, rel=1e-5)
        assert log["surrogate"] == pytest.approx(surrogate, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(table, log_u, rtol=1e-4, atol=1e-5)
    start, weights = make_llama().double().state_dict(), model.state_dict()
    for key, found in trainer.model.state_dict().items():
        assert (found - start[key]).norm() > 1e-3  # it moved, and to the same place
        torch.testing.assert_close(found, weights[key], rtol=1e-4, atol=1e-5)


def test_the_page_runs(page, tiny_folder, capsys):
    """From text: it samples negatives, and prints six steps; at the first, w = 1, so the objective is the mean NLL."""
    page.main(str(tiny_folder))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].endswith("log u [0.0, 0.0, 0.0, 0.0]")
