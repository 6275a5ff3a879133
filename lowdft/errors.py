"""Errors that the user can fix: printed on standard error without a traceback, with exit status 1."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a recipe, a file or a command.

    The message says where (file and line, or recipe key), what was found, what was wanted and what to do.
    """


class InvalidRows(UserError):
    """Some rows of a data set cannot be used; `valid` holds the others, which may fail later checks."""

    def __init__(self, text: str, valid: Sequence):
        super().__init__(text)
        self.valid = valid


class InvalidRequests(UserError):
    """Some of many requests failed; `numbers` holds their positions."""

    def __init__(self, text: str, numbers: Sequence[int]):
        super().__init__(text)
        self.numbers = numbers


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, including cuBLAS errors and libraries that only pass on the message."""
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "out of memory" in text.lower()
    )
