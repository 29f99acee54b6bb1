"""What the program prints, into terminals of every kind."""

import contextlib
import io
import os


class Terminal(io.TextIOBase):
    """A stream that takes every text: what it cannot show is shown by its codes, and when it has gone nothing is."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        try:
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self.stream.flush()
        except (OSError, ValueError, AttributeError):  # its other end is closed, it is full or closed, or there is none
            with contextlib.suppress(OSError, AttributeError):  # so that what it has kept goes somewhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def fileno(self):
        return self.stream.fileno()
