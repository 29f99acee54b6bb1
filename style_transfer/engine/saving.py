"""Files: paths as the user gives them, the version of a file, and writing without loss.

The file of a run that goes on after an interruption: made before the work, written aside, read and checked.

A saved image: a PNG file whose text field "settings" says how it was made, so that it can be made again."""

import contextlib
import io
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor

from .checks import UserError, as_file, as_weight, as_whole
from .images import IMAGES, is_picture, to_pil
from .vgg import layer_name

LONGEST_STEM = 200  # bytes of a file's name without its suffix: most file systems allow 255 in all


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


FIELD, ADVICE = "settings", "give a PNG file that was saved by the panel or by stylise"
STARTS = ("noise", "content", "present")  # present: the image that was there, which nobody has kept


def as_png(image: Tensor, settings: Mapping) -> bytes:
    """A PNG file of an image (1, 3, H, W) in [0, 1] that says how it was made; settings: as in `CHECKS`, and more."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text(FIELD, json.dumps(dict(settings), default=str))
    to_pil(image).save(buffer, "png", pnginfo=text)
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict:
    """The settings of a saved PNG file: all of `CHECKS`, and what else it says.

    Raises UserError for a file that has none, and for settings that no image can be made with.
    """
    path = as_file(path, "picture", ADVICE)
    try:
        with Image.open(path) as file:
            text = getattr(file, "text", {}).get(FIELD)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        text = None
    if text is None:
        raise UserError(f"{str(path)!r} holds no settings: {ADVICE}")
    try:
        found = json.loads(text)
        checks = {name: CHECKS[name] for name in CHECKS if name in found or name not in OPTIONAL}
        return found | {name: check(found[name]) for name, check in checks.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f", {error}" if isinstance(error, UserError) else ""
        raise UserError(f"the settings in {str(path)!r} are damaged{problem}: {ADVICE}") from error


def find_picture(name: str, *folders: Path) -> Path | None:
    """A picture of this name in one of the folders, or else among those that come with the project."""
    places = (*folders, *(IMAGES / kind for kind in ("content", "style", "masks")))
    return next((path for folder in places if is_picture(path := folder / name)), None)


def _file_name(value):
    if value is not None and value != Path(value).name:
        raise ValueError
    return value


def _styles(found):
    styles = [
        [_file_name(operator.add(image, "")), as_weight(weight, "weight of a style"), _file_name(mask)]
        for image, weight, mask in found
    ]
    if not any(weight for _, weight, _ in styles):
        raise ValueError
    return styles


REST = "rest"  # in place of a mask: where the others are not
OPTIONAL = ("styles", "keep_colours")  # not said by images of earlier versions
CHECKS = {
    "content": _file_name,  # without its folder; None for a texture
    "style": _file_name,  # likewise; None for a reconstruction
    "styles": _styles,  # of several: [[image, weight, a mask or REST or None], ...], of which `style` is the first
    "keep_colours": lambda value: [False, True][operator.index(value)],
    "size": lambda value: as_whole(value, "size"),
    "content_layer": layer_name,
    "content_weight": lambda value: as_weight(value, "content_weight"),
    "style_weight": lambda value: as_weight(value, "style_weight"),
    "layer_weights": lambda found: {layer_name(name): as_weight(found[name], f"weight of {name}") for name in found},
    "start": lambda value: STARTS[STARTS.index(value)],
    "seed": operator.index,
}
