"""A transformers Trainer whose checkpoints are always complete, and which detects damaged ones.

A checkpoint lists its files with their sizes and hashes in `manifest.json`, which is written last. A run resumes from
the newest checkpoint whose files still match that list.
"""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from lowdft.distributed import collectives
from lowdft.errors import UserError
from lowdft.files import (
    checksum_of,
    contents_of,
    damage_in,
    flush,
    locked,
    make_folder,
    read_json,
    remove,
    sync_folder,
    write_error,
    write_json,
)
from lowdft.training.heartbeat import Heartbeat
from lowdft.training.preemption import on_sigterm, stop

MANIFEST = "manifest.json"
LINES_KEPT = 200  # log lines in a checkpoint, so that its size is the same at every step
UNNEEDED = "training_args.bin"  # a pickle that nothing in lowdft reads


class Notice(TrainerCallback):
    """A request to stop: after it, the next step is the last one and is saved; all ranks agree on which step that is.

    (transformers' `enable_jit_checkpoint` does not fit: it also saves inside a step, when `log_u` is ahead of the
    weights, it marks the folder before it is complete, and every rank decides for itself.)
    """

    def __init__(self):
        self.given = self.taken = False

    def give(self) -> None:
        self.given = True

    def on_train_begin(self, args, state, control, **kwargs):
        """Settings of saving, logging and evaluation take precedence over those stored in a checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Stops and saves if the notice was given."""
        self.taken = collectives.anywhere(self.given, args.device)
        if self.taken:
            control.should_save = control.should_training_stop = True
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Writes a log line before every checkpoint, so that no mean spans it and a resumed run has the same lines."""
        control.should_log |= control.should_save


# ---- which one to resume from --------------------------------------------------------------------------------------


def newest_whole(folder: str | Path) -> str | None:
    """The newest undamaged checkpoint of `folder`, as decided by the first rank; None if there is no checkpoint.

    Damaged checkpoints are reported in a warning and renamed to `checkpoint-N.damaged`.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    found: tuple[str | None, str | None] = (None, None)
    if collectives.rank() == 0:
        found = _newest_whole(Path(folder))
    checkpoint, error = collectives.from_all(found)[0]
    if error:
        raise UserError(error)
    return checkpoint


def _newest_whole(folder: Path) -> tuple[str | None, str | None]:
    every = sorted(folder.glob("checkpoint-*[0-9]"), key=step_of, reverse=True) if folder.is_dir() else []
    damages = []
    for checkpoint in every:
        damage = damage_of(checkpoint)
        if damage is None:
            for path in every[: len(damages)]:
                _set_aside(path)
            for text in damages:
                warnings.warn(f"{text}. {checkpoint.name} is intact and is used instead.", stacklevel=4)
            return str(checkpoint), None
        damages.append(damage)
    if not damages:
        return None, None
    return None, f"{'; '.join(damages)}. No intact checkpoint is left: delete {folder} to train from the start."


def damage_of(checkpoint: str | Path, file: str | None = None) -> str | None:
    """Why training cannot resume exactly from a checkpoint, or how one `file` in it is damaged; None if intact."""
    path = Path(checkpoint) / MANIFEST
    if not path.is_file():
        return f"{path} is missing (it was deleted, or another program wrote the checkpoint)"
    try:
        noted = read_json(path)
    except UserError:
        return f"{path} is damaged"
    files = noted.get("files")
    if not isinstance(files, dict) or noted.get("checksum") != checksum_of(files):
        return f"{path} is damaged"
    if file:
        return damage_in(checkpoint, {file: files[file]} if file in files else {})
    if not any("optim" in name for name in files):
        return f"{checkpoint} has no optimizer state (training.save_only_model leaves it out)"
    return damage_in(checkpoint, files)


def require_whole(checkpoint: str | Path) -> None:
    """Raises UserError, on every rank, when a checkpoint is damaged."""
    damage = collectives.from_all(damage_of(checkpoint) if collectives.rank() == 0 else None)[0]
    if damage:
        raise UserError(f"{damage}. Resume from another checkpoint, or train from the start.")


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(str(checkpoint).rsplit("-", 1)[1])


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(checkpoint.name + ".damaged")
    remove(aside)
    os.replace(checkpoint, aside)


# ---- writing -------------------------------------------------------------------------------------------------------


class WholeCheckpoints(Trainer):
    """Writes each checkpoint under a temporary name and renames it, so that no incomplete one is ever used."""

    trust_checkpoint = False  # resume even from a checkpoint whose pickles may run code
    _writing_in: Path | None = None

    def train(self, *args, **kwargs):
        """transformers' `train` with `output_dir` locked; after SIGTERM it saves a checkpoint and raises.

        Raises:
            UserError: another trainer is writing `output_dir`.
            Stopped: SIGTERM was received (on any rank), and everything up to that step is saved.
        """
        notice, heartbeat = Notice(), Heartbeat()
        self.add_callback(notice)
        self.add_callback(heartbeat)
        try:
            with locked(self.args.output_dir), on_sigterm(notice.give), heartbeat:
                out = super().train(*args, **kwargs)
        finally:
            self.remove_callback(notice)
            self.remove_callback(heartbeat)
        if self.args.should_save and self.state.global_step:  # a process that was killed before it did
            remove(Path(self.args.output_dir) / ".partial")
            self._rotate()
        if notice.taken:
            done = f"step {self.state.global_step} of {self.state.max_steps}"
            stop(
                f"stopped by SIGTERM after {done}, which is saved; run the same command again to resume",
                tell=self.is_world_process_zero(),
            )
        if notice.given:  # after the last step: for whoever comes next
            signal.raise_signal(signal.SIGTERM)
        return out

    def before_saving(self) -> None:
        """Hook for a subclass: raises, on every rank, if the weights must not be saved."""

    def save_beside(self, folder: Path) -> None:
        """Hook for a subclass: adds what it needs for an exact resume to the checkpoint in `folder`."""

    def _save_checkpoint(self, model, trial) -> None:
        self.before_saving()
        run_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        partial, first = run_dir / ".partial", self.args.should_save
        lines = self.state.log_history
        try:
            if first:
                remove(partial)
                make_folder(partial)
            self.accelerator.wait_for_everyone()
            self._writing_in = partial
            self.state.log_history = lines[-LINES_KEPT:]
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank adds the state of its random numbers
            if first:
                self.save_beside(partial / name)
                self._name(partial / name, run_dir / name)
            if self.state.best_global_step:
                self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{self.state.best_global_step}")
        except Exception as error:
            if failure := write_error(run_dir / name, error):
                raise failure from error
            raise
        finally:
            self._writing_in, self.state.log_history = None, lines
            if first:
                remove(partial)
        self.accelerator.wait_for_everyone()
        if first:
            self._rotate()

    def _rotate(self) -> None:
        rotate_checkpoints(
            output_dir=str(self.args.output_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _name(self, written: Path, checkpoint: Path) -> None:
        """Gives a checkpoint its final name, once it and the log lines before it are flushed to disk."""
        remove(written / UNNEEDED)
        files = contents_of(written)
        write_json(written / MANIFEST, {"files": files, "checksum": checksum_of(files)})
        flush(written)
        for callback in self.callback_handler.callbacks:
            getattr(callback, "flush", lambda: None)()
        if checkpoint.exists():  # deleting it in its place could leave a half one there
            os.replace(checkpoint, written.with_name("old"))
        os.replace(written, checkpoint)
        sync_folder(checkpoint.parent)
        remove(checkpoint.with_name(checkpoint.name + ".damaged"))

    def _get_output_dir(self, trial) -> str:
        return str(self._writing_in) if self._writing_in else super()._get_output_dir(trial)
