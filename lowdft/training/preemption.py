"""SIGTERM, with which clusters stop jobs: work ends at the next good moment, with a message and exit status 143."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Stopped(SystemExit):
    """SIGTERM ended the work; what was finished is kept, and the same command resumes from there.

    The exit status is 143 = 128 + SIGTERM, as for a process that this signal kills, so that requeue rules for such jobs
    apply. (`--launch` returns this status, too. torchrun returns 1 for any status of its workers except 0.)
    """

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def stop(words: str, tell: bool = True) -> None:
    """Prints the reason on standard error and raises Stopped; with several ranks, only one should `tell`."""
    if tell:
        print(f"\nlowdft: {words}", file=sys.stderr, flush=True)
    raise Stopped


@contextlib.contextmanager
def on_sigterm(do: Callable[[], None]) -> Iterator[None]:
    """A context in which SIGTERM calls `do`. Outside the main thread Python cannot set handlers, so SIGTERM kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: do())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old or signal.SIG_DFL)
