"""A transformers Trainer whose checkpoints are whole or not there, and can be told from damaged ones.

A checkpoint lists its files with their sizes and hashes in `manifest.json`, which is written last. On resume the newest
one that still holds what it lists is used.
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
UNNEEDED = "training_args.bin"  # a pickle that nothing here reads


class Notice(TrainerCallback):
    """A notice to quit: once given, the next step is the last, and is saved; all ranks agree on which it is.

    (transformers' own `enable_jit_checkpoint` also saves inside a step, when `log_u` is ahead of the weights, marks the
    folder before it is whole, and lets every rank decide for itself.)
    """

    def __init__(self):
        self.given = self.taken = False

    def give(self) -> None:
        self.given = True

    def on_train_begin(self, args, state, control, **kwargs):
        """What the settings say of saving, logging and evaluation wins over what a checkpoint has stored."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Stops and saves if the notice was given."""
        self.taken = collectives.anywhere(self.given, args.device)
        if self.taken:
            control.should_save = control.should_training_stop = True
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        """Every checkpoint comes with a log line, so that no line's means span it, and a resumed run has the same."""
        control.should_log |= control.should_save


# ---- which one to resume from --------------------------------------------------------------------------------------


def newest_whole(folder: str | Path) -> str | None:
    """The newest undamaged checkpoint of `folder`, by the first rank's word for all; None when there is no checkpoint.

    Damaged ones are named in a warning and set aside as `checkpoint-N.damaged`.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
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
                warnings.warn(f"{text}. {checkpoint.name} is whole and is used instead.", stacklevel=4)
            return str(checkpoint), None
        damages.append(damage)
    if not damages:
        return None, None
    return None, f"{'; '.join(damages)}. No whole checkpoint is left: delete {folder} to train from the start."


def damage_of(checkpoint: str | Path, file: str | None = None) -> str | None:
    """Why training cannot resume from a checkpoint exactly, or what became of one `file` of it; None: as written."""
    path = Path(checkpoint) / MANIFEST
    if not path.is_file():
        return f"{path} is missing (it was deleted, or the checkpoint is another program's)"
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
    """Writes a checkpoint beside its place and renames it, so that no half one is ever resumed from."""

    trust_checkpoint = False  # resume also from one whose pickles may run code
    _writing_in: Path | None = None

    def train(self, *args, **kwargs):
        """transformers' `train`; after SIGTERM it saves a checkpoint at the step's end, and raises.

        Raises:
            Stopped: SIGTERM came (on any rank), and all that was done is saved.
        """
        notice, heartbeat = Notice(), Heartbeat()
        self.add_callback(notice)
        self.add_callback(heartbeat)
        try:
            with on_sigterm(notice.give), heartbeat:
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
        """Raises, on every rank, where a subclass finds that the weights are not worth saving."""

    def save_beside(self, folder: Path) -> None:
        """Adds what a subclass needs to resume exactly to the checkpoint in `folder`."""

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
        """Gives a checkpoint its place, once it and the log lines up to it are on the disk itself."""
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
