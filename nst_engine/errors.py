"""Errors that the user can mend, apart from those that are the code's fault."""


class UserError(ValueError):
    """Bad input, or a machine that cannot do what is asked: one sentence that names the value and what is allowed."""


class MissingFileError(UserError, FileNotFoundError):
    """There is no such file."""


def shown(value) -> str:
    """A value for a sentence: in one line, and not longer than one reads."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 320 else f"{text[:60]} ... ({type(value).__name__})"


def sentence(error: Exception) -> str:
    """What an error says, in one line; of one that nobody foresaw, its class too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:200]}".rstrip(": ")
