"""Errors that are a user's to mend: told in words on standard error, with exit status 1 and no traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A mistake in a recipe, a file or a command.

    The message says where (file and line, or recipe key), what was found, what was wanted and what to do.
    """


class InvalidRows(UserError):
    """Rows of a data set that cannot be used; `valid` holds the others, of which more may be wrong."""

    def __init__(self, text: str, valid: Sequence):
        super().__init__(text)
        self.valid = valid


class InvalidRequests(UserError):
    """Some of many requests fail; `numbers` says which."""

    def __init__(self, text: str, numbers: Sequence[int]):
        super().__init__(text)
        self.numbers = numbers


def is_out_of_memory(error: BaseException) -> bool:
    """Did memory run out? Also where cuBLAS finds none, or a library only passes the message on."""
    text = str(error)
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "out of memory" in text.lower()
    )
