"""metrics.jsonl: one line per log of training, flushed to disk before the checkpoint that it belongs to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from transformers import TrainerCallback

from lowdft.files import sync_folder, write_error, write_text
from lowdft.training.checkpoints import step_of


class MetricsFile(TrainerCallback):
    """Appends every log line to metrics.jsonl; `mend` cuts it back to the checkpoint on resume.

    `seconds` in a line counts from the start of its session.

    Raises:
        UserError: a line could not be written.
    """

    def __init__(self, path: Path):
        self.path, self.began = path, time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        self.began = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Writes one JSON line per log."""
        if not (state.is_world_process_zero and "loss" in (logs or {})):
            return
        seconds = round(time.monotonic() - self.began, 3)
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs, "seconds": seconds}) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error

    def flush(self) -> None:
        """Flushes the lines to disk; called before a checkpoint gets its name, and at the end."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
            sync_folder(self.path.parent)


def read_lines(path: Path) -> list[dict]:
    """The logged steps in order, without lines that are cut off or damaged."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def mend(path: Path, checkpoint: str | None, resuming: bool, log: bool = True) -> None:
    """Drops lines that are cut off, and restores missing or different lines from the checkpoint.

    Args:
        checkpoint: an intact checkpoint, which has its last 200 log lines; None if there is none.
        resuming: also drop the lines of later steps, which will be written again.
        log: the file has log lines, which are also in the checkpoint.
    """
    step = step_of(checkpoint) if checkpoint else 0
    lines = {line["step"]: line for line in read_lines(path) if not resuming or line["step"] <= step}
    if checkpoint and log:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        for entry in state["log_history"]:
            if "loss" in entry and not entry.items() <= lines.get(entry["step"], {}).items():
                lines[entry["step"]] = {"step": entry["step"], **entry}
    text = "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines))
    if text and (not path.is_file() or path.read_bytes() != text.encode()) or path.is_file() and resuming:
        write_text(path, text)
