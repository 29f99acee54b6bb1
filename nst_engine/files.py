"""Files: paths as the user gives them, the version of a file, and writing without loss."""

import contextlib
import itertools
import os
import re
import stat
from pathlib import Path

from .errors import MissingFileError, UserError, shown

LONGEST_STEM = 200  # bytes of a file's name without its suffix: most file systems allow 255 in all


def as_file(path, what: str, advice: str = "give the path of a file") -> Path:
    """The path of a file that exists; what: "picture" or "weights", for the sentence, as `advice` is.

    Raises UserError unless `path` is a str or a Path of a file, and MissingFileError where there is none.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UserError(f"no {what} at {shown(path)}: {advice}, as a str or a Path")
    if re.match(r"\w{2,}:/", os.fspath(path)):
        raise UserError(f"no {what} at {os.fspath(path)!r}, which is an address: download the file and give its path")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"no {what} at {str(path)!r}: {advice}") from error
    except (OSError, ValueError) as error:  # a name too long, a folder without permission, a null character
        raise UserError(f"no {what} can be read at {str(path)!r}: {reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise MissingFileError(f"no {what} at {str(path)!r}, which is a folder: {advice}")
    if not stat.S_ISREG(mode):
        raise UserError(f"no {what} at {str(path)!r}, which is a device: {advice}")
    return Path(path)


def reason(error: Exception) -> str:
    """Why the operating system refused, without numbers and paths."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def file_version(path: Path) -> tuple | None:
    """What differs once a file has been written again: times and size; None for no file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size


def joint_stem(*paths: Path) -> str:
    """The names of files, without their suffixes, as one name that a file system takes."""
    each = LONGEST_STEM // len(paths) - 1
    cut = (os.fsencode(path.stem)[:each].decode(errors="ignore") for path in paths)
    return os.fsdecode("_".join(cut).encode())


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet, whole or not at all. Raises FileExistsError if it does."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_numbered(folder: Path, stem: str, suffix: str, content: bytes) -> Path:
    """Write stem_001 or whichever number is the first that is free: others may be writing there, too. The path."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    for k in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            write_new(path := folder / f"{stem}_{k:03}{suffix}", content)
            return path
