"""With several ranks, each reports when it has made no progress for long, for example because another one hangs."""

from __future__ import annotations

import sys
import threading
import time
import traceback

from transformers import TrainerCallback

from lowdft.distributed import collectives

SECONDS = 90.0  # report after this time without finishing a micro-batch, or
TIMES = 5  # after this many times the longest micro-batch so far, if that is longer


class Heartbeat(TrainerCallback):
    """Watches the main thread from another one, and prints on standard error where it is if it makes no progress.

    torch ends such a run after `training.ddp_timeout` seconds (1,800), but reports nothing until then.
    """

    def __init__(self):
        self._last = time.monotonic()
        self._longest = 0.0
        self._done = threading.Event()
        self._main = threading.get_ident()

    def __enter__(self):
        if collectives.world_size() > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._done.set()

    def on_substep_end(self, args, state, control, **kwargs):
        """A micro-batch has ended."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    on_step_begin = on_step_end = on_save = on_substep_end

    def _watch(self) -> None:
        told = self._last
        while not self._done.wait(SECONDS / 20):
            still = time.monotonic() - max(self._last, told)
            if still > max(SECONDS, TIMES * self._longest):
                told = time.monotonic()
                self._tell(told - self._last)

    def _tell(self, seconds: float) -> None:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        ours = [frame.name for frame in stack if "lowdft" in frame.filename]
        print(
            f"lowdft: rank {collectives.rank()} has not moved for {seconds:.0f} s (in {stack[-1].name}, called from "
            f"{ours[-1] if ours else 'outside'}). This is normal while a checkpoint is written; otherwise another rank "
            "hangs: look at the ranks that do not report this. Ctrl-C stops all; the same command resumes.",
            file=sys.stderr,
            flush=True,
        )
