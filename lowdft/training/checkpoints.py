"""A transformers Trainer whose checkpoints are whole or not there."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import WRITE_ERRORS, flush_to_disk, reason
from lowdft.training.preemption import on_sigterm, stop


class Notice(TrainerCallback):
    """A notice to quit: once given, the next step is the last, and is saved; all ranks agree on which it is.

    (transformers' own `enable_jit_checkpoint` also saves inside a step, when `log_u` is ahead of the weights, marks the
    folder before it is whole, and lets every rank decide for itself.)
    """

    def __init__(self):
        self.given = self.taken = False

    def give(self) -> None:
        self.given = True

    def on_step_end(self, args, state, control, **kwargs):
        """Stops and saves if the notice was given."""
        self.taken = collectives.anywhere(self.given, args.device)
        if self.taken:
            control.should_save = control.should_training_stop = True
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Every checkpoint comes with a log line, so that no line's means span it, and a resumed run has the same."""
        control.should_log |= control.should_save


class WholeCheckpoints(Trainer):
    """Writes a checkpoint beside its place and renames it, so that no half one is ever resumed from."""

    _writing_in: Path | None = None

    def train(self, *args, **kwargs):
        """transformers' `train`; after SIGTERM it saves a checkpoint at the step's end, and raises.

        Raises:
            Stopped: SIGTERM came (on any rank), and all that was done is saved.
        """
        notice = Notice()
        self.add_callback(notice)
        try:
            with on_sigterm(notice.give):
                out = super().train(*args, **kwargs)
        finally:
            self.remove_callback(notice)
        if notice.taken:
            done = f"step {self.state.global_step} of {self.state.max_steps}"
            stop(
                f"stopped by SIGTERM after {done}, which is saved; the same command goes on from here",
                tell=self.is_world_process_zero(),
            )
        if notice.given:  # after the last step: for whoever comes next
            signal.raise_signal(signal.SIGTERM)
        return out

    def save_beside(self, folder: Path) -> None:
        """Adds what a subclass needs to go on exactly to the checkpoint in `folder`."""

    def _save_checkpoint(self, model, trial) -> None:
        run_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        partial, first = run_dir / ".partial", self.args.should_save
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            self._writing_in = partial
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank adds the state of its random numbers
            if first:
                self.save_beside(partial / name)
                flush_to_disk(partial / name)
                if (run_dir / name).exists():  # deleting it in its place could leave a half one there
                    os.replace(run_dir / name, partial / "old")
                os.replace(partial / name, run_dir / name)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{self.state.best_global_step}")
        except (*WRITE_ERRORS, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            raise UserError(
                f"{run_dir / name}: the checkpoint could not be written ({reason(error)}). Earlier "
                "checkpoints are whole; free some space and run the same command again to go on from the last one."
            ) from error
        finally:
            self._writing_in = None
            if first:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if first:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _get_output_dir(self, trial) -> str:
        return str(self._writing_in) if self._writing_in else super()._get_output_dir(trial)
