"""What people and trackers see during training: the progress bar, sample answers, and a warning at the trackers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import ProgressCallback, Trainer, TrainerCallback

from lowdft.reporting.metrics import became_negligible
from lowdft.sampling import Request, SamplingSettings, get_sampler

SHOWN = {"loss": "objective", "margin": "margin", "weights/mean": "weight", "tokens_per_second": "tokens/s"}
TITLE = "negatives contribute almost nothing"


class Progress(ProgressCallback):
    """transformers' progress bar with the numbers to watch, instead of printing a dictionary per step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows the last step's objective, margin, mean weight and tokens per second."""
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix({name: f"{logs[key]:.3g}" for key, name in SHOWN.items() if key in logs})


class SampleAnswers(TrainerCallback):
    """Every `every` steps, writes the model's greedy answers to a few prompts to the terminal, a file and the trackers.

    This does not change training: it uses none of its random numbers and leaves the model as it was.

    Args:
        trainer: the trainer that this callback is added to.
        rows: encoded rows; their `prompt_ids` are answered.
        path: a JSON-lines file; one line `{"step", "answers"}` is appended each time.
        decode: maps token ids to text.
        end_ids, max_new_tokens: where an answer ends.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Sequence[dict],
        every: int,
        path: Path,
        decode: Callable[[list[int]], str],
        end_ids: Sequence[int],
        max_new_tokens: int,
    ):
        self.trainer, self.rows, self.every, self.path = trainer, rows, every, path
        self.decode, self.end_ids = decode, end_ids
        self.settings = SamplingSettings(temperature=0.0, max_new_tokens=max_new_tokens)

    def on_step_end(self, args, state, control, **kwargs):
        """Writes answers if this step is due."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        sampler = get_sampler("padded", model, self.end_ids, self.settings, len(self.rows))
        samples = sampler.sample([Request(row["prompt_ids"], 0) for row in self.rows])
        answers = [self.decode(sample.token_ids).strip() for sample in samples]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "answers": answers}, ensure_ascii=False) + "\n")
        for number, answer in enumerate(answers, 1):
            line = " ".join("".join(c if c.isprintable() else " " for c in answer).split())
            tqdm.write(f"step {state.global_step}, answer {number}: {line[:200]}")
        tell(self.trainer, "sample answers", "\n\n".join(answers), state.global_step, warning=False)


class NegligibleNegatives(TrainerCallback):
    """Alerts the trackers if the negatives contribute almost nothing (the trainer itself warns on the terminal)."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.weights: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Checks the mean weight."""
        if "weights/mean" in (logs or {}):
            self.weights.append(logs["weights/mean"])
            warning = became_negligible(self.weights)
            if warning and state.is_world_process_zero:
                tell(self.trainer, TITLE, warning, state.global_step)


def tell(trainer: Trainer, title: str, text: str, step: int, warning: bool = True) -> None:
    """Sends a text to every tracker of `report_to` that supports texts; a warning as an alert, if it has alerts."""
    trackers = {type(callback).__name__: callback for callback in trainer.callback_handler.callbacks}
    if "TensorBoardCallback" in trackers and trackers["TensorBoardCallback"].tb_writer is not None:
        trackers["TensorBoardCallback"].tb_writer.add_text(title, text, step)
    if "TrackioCallback" in trackers:
        import trackio

        level = trackio.AlertLevel.WARN if warning else trackio.AlertLevel.INFO
        with contextlib.redirect_stdout(None):  # the terminal already has this text
            trackio.alert(title=title, text=f"step {step}: {text}", level=level)  # trackio's own step counts log lines
    if "WandbCallback" in trackers and warning:
        import wandb

        wandb.run.alert(title=title, text=text)
