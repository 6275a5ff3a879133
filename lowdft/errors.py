"""Errors that are a user's to mend: told in words on standard error, with exit status 1 and no traceback."""


class UserError(Exception):
    """A mistake in a recipe, a file or a command.

    The message says where (file and line, or recipe key), what was found, what was wanted and what to do.
    """
