"""The file of a run that goes on after an interruption: made before the work, written aside, read and checked."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

from .errors import UserError
from .files import write_new


@contextlib.contextmanager
def alone(output: Path, state: Path) -> Iterator[None]:
    """Have the output to oneself, until the end of this process, however it ends. state: the run's file."""
    if not output.parent.is_dir():
        raise UserError(f"--output is {str(output)!r}: there is no folder {str(output.parent)!r}")
    path = state.with_name(f".{state.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        try:
            lock.acquire()
        except Timeout as error:
            problem = "another run is making it: give another name with --output"
            raise UserError(f"{str(output)!r}: {problem}") from error
        except OSError as error:
            raise UserError(f"{str(output)!r} cannot be written: {error.strerror}") from error
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                path.unlink()
        lock.release()


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file aside by `save` and then give it its name, so that the one before is kept until then."""
    aside = path.with_name(f".{path.name}")
    try:
        save(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r} cannot be written, and is as it was: {why}") from error
    finally:
        aside.unlink(missing_ok=True)


def write_state(path: Path, state: Mapping, settings: Mapping) -> None:
    """Save the state of a run, {name: tensor or what JSON has}, with the settings that it was made with."""
    tensors, places = {}, set()
    for name, value in state.items():
        if torch.is_tensor(value):  # of those that share memory, which a file cannot, all but the first are copied
            tensors[name] = value.cpu().clone() if value.data_ptr() in places else value.cpu()
            places.add(value.data_ptr())
    plain = {name: value for name, value in state.items() if name not in tensors}
    about = {"settings": json.dumps(settings), "state": json.dumps(plain)}
    write(path, lambda aside: save_file(tensors, aside, about))


def begin_state(path: Path, settings: Mapping) -> None:
    """Make the file of a run that has no evaluations yet: what cannot be written is said before the work."""
    try:
        write_new(path, to_bytes({}, {"settings": json.dumps(settings)}))
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def read_state(path: Path, settings: Mapping, words: Mapping) -> dict | None:
    """The state of the run that is to go on, empty if it has no evaluations yet; None if there is no run.

    Raises UserError if its settings were others; words: {setting: "another ..."}, where an option would not tell.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:  # of a run that was killed as it began
            path.unlink()
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        before, state = (json.loads(about.get(name, "{}")) for name in ("settings", "state"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{str(path)!r} is damaged, or not a run: move it away to begin anew") from error
    if not before:
        raise UserError(f"{str(path)!r} is not a run of this program: move it away to begin anew")
    others = " and ".join(
        words.get(name, f"--{name.replace('_', '-')} {before.get(name)}")
        for name, value in settings.items()
        if before.get(name) != value
    )
    if others:
        raise UserError(f"{str(path)!r} is of other settings, {others}: give the same again, or move it away")
    return tensors | state
