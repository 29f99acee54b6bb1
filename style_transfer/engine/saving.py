"""Safe file writes: new files, the state file of a run that can be resumed, PNG files that contain their settings."""

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
from safetensors.numpy import save_file  # torch's refuses tensors that share memory
from torch import Tensor

from .checks import UserError, as_file, as_weight, as_whole, reason
from .images import IMAGES, is_picture, to_pil
from .vgg import layer_name

# --- Files ---------------------------------------------------------------------------------------

MAX_STEM_BYTES = 200  # most file systems allow 255 for a whole name


def joint_stem(*paths: Path) -> str:
    """The stems of several files joined by underscores, each shortened so that file systems accept the whole."""
    length = MAX_STEM_BYTES // len(paths) - 1
    stems = [os.fsencode(path.stem)[:length].decode(errors="ignore") for path in paths]
    return os.fsdecode("_".join(stems).encode())


def write_new(path: Path, content: bytes) -> None:
    """Write a file that does not exist yet, whole or not at all. Raises FileExistsError if it exists."""
    with open(path, "xb") as file:
        try:
            file.write(content)
            file.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_numbered(folder: Path, stem: str, content: bytes) -> Path:
    """Write STEM_001.png or the first free number after it, and return the path. Safe with concurrent writers."""
    folder.mkdir(exist_ok=True)
    for number in itertools.count(1):
        path = folder / f"{stem}_{number:03}.png"
        with contextlib.suppress(FileExistsError):
            write_new(path, content)
            return path


def write_over(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file beside `path`, then rename it to `path`: a failure leaves the previous file intact.

    Raises UserError if it cannot be written.
    """
    aside = path.with_name(f".{path.name}")
    try:
        write(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} cannot be written, and is unchanged: {reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


# --- A run ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(output: Path, state: Path) -> Iterator[None]:
    """Keep other processes from writing the same output, with a lock beside `state` that a crash also releases."""
    path = state.with_name(f".{state.name}.lock")
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{str(output)!r}: another run is writing it: give another name with --output") from error
    except OSError as error:
        raise UserError(f"{str(output)!r} cannot be written: {reason(error)}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot delete an open file
            path.unlink()
        lock.release()


def write_state(path: Path, state: Mapping, settings: Mapping) -> None:
    """Save the state of a run, {name: tensor or JSON value}, with the settings that made it, {name: JSON value}."""
    tensors = {name: value.cpu().numpy() for name, value in state.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in state.items() if name not in tensors}
    about = {"settings": json.dumps(settings), "state": json.dumps(plain)}
    write_over(path, lambda aside: save_file(tensors, aside, about))


def read_state(path: Path) -> tuple[dict, dict] | None:
    """Read (state, settings) as saved by `write_state`; None if there is no file.

    Lists in the state come back as tuples, tuples in the settings as lists. Raises UserError if the file is damaged or
    is not a saved run.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        plain = {name: _as_tuples(value) for name, value in json.loads(about["state"]).items()}
        return tensors | plain, json.loads(about["settings"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} is damaged, or not a saved run: move it away to start afresh") from error


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


# --- A saved image -------------------------------------------------------------------------------

REST = "rest"  # in the place of a mask file: everywhere outside the other masks
TEXT_FIELD = "settings"  # the PNG text field that contains them, as JSON
SETTINGS_ADVICE = "give a PNG file that was saved by the panel or by stylise"
STARTS = ("noise", "content", "present")  # present: from the image on display, which is not saved


def as_png(image: Tensor, settings: Mapping) -> bytes:
    """A PNG file of an image (1, 3, H, W) in [0, 1] that contains its settings: those in `CHECKS`, and any others."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_text(TEXT_FIELD, json.dumps(settings))
    to_pil(image).save(buffer, "png", pnginfo=text)
    return buffer.getvalue()


def read_settings(path: str | Path) -> dict:
    """The settings in a saved PNG file: those in `CHECKS`, and any others.

    Raises UserError for a file without settings, and for settings that cannot make an image.
    """
    path = as_file(path, "picture", SETTINGS_ADVICE)
    try:
        with Image.open(path) as file:
            text = getattr(file, "text", {}).get(TEXT_FIELD)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        text = None
    if text is None:
        raise UserError(f"{str(path)!r} holds no settings: {SETTINGS_ADVICE}")
    try:
        settings = json.loads(text)
        for name, check in CHECKS.items():
            settings[name] = check(settings[name])
        return settings
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f", {error}" if isinstance(error, UserError) else ""
        raise UserError(f"the settings in {str(path)!r} are damaged{problem}: {SETTINGS_ADVICE}") from error


def find_picture(name: str, *folders: Path) -> Path | None:
    """An image file of this name in one of the folders or among the project's images."""
    for folder in (*folders, IMAGES / "content", IMAGES / "style", IMAGES / "masks"):
        if is_picture(folder / name):
            return folder / name


def _file_name(value):
    if value is not None and value != Path(value).name:
        raise ValueError
    return value


def _styles(value):
    styles = []
    for image, weight, mask in value:
        styles.append([_file_name(operator.add(image, "")), as_weight(weight, "weight of a style"), _file_name(mask)])
    if styles and not any(weight for _, weight, _ in styles):
        raise ValueError
    return styles


def _layer_weights(value):
    return {layer_name(name): as_weight(weight, f"weight of {name}") for name, weight in value.items()}


CHECKS = {
    "content": _file_name,  # without its folder; None for a texture
    "styles": _styles,  # [[image, weight, mask or REST or None], ...], without folders; empty for a reconstruction
    "keep_colours": lambda value: [False, True][operator.index(value)],
    "size": lambda value: as_whole(value, "size"),
    "content_layer": layer_name,
    "content_weight": lambda value: as_weight(value, "content_weight"),
    "style_weight": lambda value: as_weight(value, "style_weight"),
    "layer_weights": _layer_weights,
    "start": lambda value: STARTS[STARTS.index(value)],
    "seed": operator.index,
}
