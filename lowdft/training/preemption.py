"""SIGTERM, by which a cluster takes its machine back: work ends at the next good moment, with words and status 143."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Stopped(SystemExit):
    """SIGTERM ended the work; what was finished is kept, and the same command goes on from there.

    Exit status 143, which is 128 + SIGTERM: what a scheduler sees of a process that this signal killed, so that a rule
    to requeue such jobs holds. (`--launch` gives it as its own; of its workers
    torchrun makes 1 of any status but 0.)
    """

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


def stop(words: str, tell: bool = True) -> None:
    """Tells people why, on standard error, and raises Stopped; of several ranks one should `tell`."""
    if tell:
        print(f"\nlowdft: {words}", file=sys.stderr, flush=True)
    raise Stopped


@contextlib.contextmanager
def on_sigterm(do: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGTERM calls `do`; but in other threads than the main one Python cannot set that, and it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: do())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old or signal.SIG_DFL)
