"""Errors that the user can mend, apart from those that are the code's fault."""


class UserError(ValueError):
    """Bad input, or a machine that cannot do what is asked: one sentence that names the value and what is allowed."""


class MissingFileError(UserError, FileNotFoundError):
    """There is no such file."""
