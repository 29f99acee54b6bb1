"""Argument checks: each argument is converted to one form, or rejected with a one-sentence error.

The sentence names the value and what is allowed. Bugs in the code raise other errors than `UserError`."""

import contextlib
import numbers
import operator
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


class UserError(ValueError):
    """The user can fix this: the message is one sentence that names the value and what is allowed."""


class MissingFileError(UserError, FileNotFoundError):
    """The file does not exist."""


def shown(value) -> str:
    """`repr(value)` on one line; if it is longer than 320 characters, its beginning and its type."""
    text = " ".join(repr(value).split())
    if len(text) > 320:
        return f"{text[:60]} ... ({type(value).__name__})"
    return text


def sentence(error: Exception) -> str:
    """The message of an error on one line. Unexpected errors are prefixed with their class name."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text[:200]}".rstrip(": ")


# --- Files ---------------------------------------------------------------------------------------


def as_file(path, what: str, advice: str = "give the path of a file") -> Path:
    """Return `path` as a Path if it is a regular file.

    what: what the file holds, such as "picture" or "weights". advice: what the user should do. Both go into the error
    message. Raises MissingFileError if there is no such file or it is a folder, UserError if `path` is not a path
    or cannot be accessed, or if it is an address or a device.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise UserError(f"no {what} at {shown(path)}: {advice}, as a str or a Path")
    name = os.fspath(path)
    if re.match(r"\w{2,}:/", name):
        address = re.sub(r"^(?!file|data)(\w+):/(?!/)", r"\1://", name)  # Path turns "//" into "/"
        raise UserError(f"no {what} at {address!r}, which is an address: download the file and give its path")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"no {what} at {str(path)!r}: {advice}") from error
    except (OSError, ValueError) as error:  # name too long, null character in it, or no permission
        raise UserError(f"no {what} can be read at {str(path)!r}: {reason(error)}") from error
    if stat.S_ISDIR(mode):
        raise MissingFileError(f"no {what} at {str(path)!r}, which is a folder: {advice}")
    if not stat.S_ISREG(mode):
        raise UserError(f"no {what} at {str(path)!r}, which is a device: {advice}")
    return Path(path)


def reason(error: Exception) -> str:
    """Why the operating system refused, without error number and path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def file_version(path: Path) -> tuple | None:
    """Times and size of a file, which change when it is written again; None if it does not exist."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size


# --- Tensors -------------------------------------------------------------------------------------

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _has_values(value) -> bool:
    """Whether this is a tensor whose values can be read: not sparse, not nested, not on the meta device."""
    if not torch.is_tensor(value) or value.layout != torch.strided:
        return False
    return not value.is_nested and value.device.type != "meta"


def _describe(value) -> str:
    """Shape and dtype of a tensor, or the type of anything else."""
    if _has_values(value):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__


def _without_graph(tensor: Tensor) -> Tensor:
    if tensor.requires_grad or tensor.is_inference():
        return tensor.detach().clone()
    return tensor


def check_image(image, name: str, lowest: float = 0.0, highest: float = 1.0) -> None:
    """Raise UserError unless `image` is a float tensor (1, 3, H, W) with values from `lowest` to `highest`."""
    shaped = _has_values(image) and image.dim() == 4 and image.shape[:2] == (1, 3) and image.numel()
    if not shaped or image.dtype not in FLOAT_DTYPES:
        found = _describe(image)
        raise UserError(f"{name} is {found}: an image is a float tensor (1, 3, H, W), as load_image gives it")
    inside = (image >= lowest) & (image <= highest)
    if not inside.all():
        found = f"outside [{lowest:g}, {highest:g}] or not finite, {image.min():.3g} to {image.max():.3g}"
        raise UserError(f"{name} has values {found}: an image holds RGB in [0, 1]")


def check_shown(image, name: str) -> None:
    """`check_image` for images that are yet to be clamped: values from -1 to 2 pass."""
    check_image(image, name, lowest=-1.0, highest=2.0)


def as_image(image, name: str) -> Tensor:
    """Return an image (1, 3, H, W) in float32, without its graph. Raises UserError as `check_image` does."""
    check_image(image, name)
    return _without_graph(image).float()


def as_mask(mask, name: str, device: torch.device) -> Tensor:
    """Convert a mask (H, W), floats in [0, 1] or bools, not all 0, to float32 on `device`. Raises UserError."""
    allowed = "a mask is a float tensor (H, W) with values in [0, 1]"
    if not (_has_values(mask) and mask.dim() == 2 and mask.dtype in (*FLOAT_DTYPES, torch.bool)):
        raise UserError(f"{name} is {_describe(mask)}: {allowed}")
    if not mask.numel():
        raise UserError(f"{name} has no pixels: {allowed}")
    mask = _without_graph(mask).to(device, torch.float32)
    inside = (mask >= 0) & (mask <= 1)
    if not inside.all():
        raise UserError(f"{name} has values from {mask.min():.3g} to {mask.max():.3g}: {allowed}")
    if not mask.any():
        raise UserError(f"{name} is 0 everywhere: give one that is above 0 somewhere")
    return mask


def check_feature_map(feature_map) -> None:
    """Raise UserError unless this is a tensor (1, C, h, w), the feature map of one image."""
    if not _has_values(feature_map) or feature_map.dim() != 4 or len(feature_map) != 1:
        raise UserError(f"the feature map is {_describe(feature_map)}: give that of one image, (1, C, h, w)")


def check_targets(found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    """Raise UserError unless `found` has a tensor of the shape of each layer's target."""
    for name, target in targets.items():
        shape = tuple(found[name].shape) if name in found else "missing"
        if shape != target.shape:
            raise UserError(f"{name} is {shape} and its target {tuple(target.shape)}: give both in one shape")


# --- Numbers -------------------------------------------------------------------------------------

Shape = tuple[int, int]  # (height, width) in pixels

MAX_COUNT = 10**9  # pixels or evaluations
MAX_WEIGHT = 1e12  # squared gradients must not overflow float32


def as_whole(value, name: str, unit: str = "") -> int:
    """Convert an integer of any library, 1 to 1e9, to int. Raises UserError, with `unit` in the message, for others."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the last two from a tensor of several values
        number = 0
    if not 1 <= number <= MAX_COUNT:
        allowed = "1 or more" if number < 1 else "at most 1e9"
        raise UserError(f"{name} is {shown(value)}: it must be a whole number{unit}, {allowed}")
    return number


def as_shape(shape) -> Shape:
    """Return two integers, 1 to 1e9, as (height, width). Raises UserError for anything else."""
    try:
        height, width = shape
        return as_whole(height, "height"), as_whole(width, "width")
    except (TypeError, ValueError) as error:
        raise UserError(f"shape is {shown(shape)}: it must be (height, width), two whole numbers, 1 or more") from error


def as_number(value, name: str, smallest: float, largest: float, allowed: str) -> float:
    """Return a real number of any library, from `smallest` to `largest`, as a float.

    Raises UserError for anything else. allowed: the end of the error message, with unit and range in words.
    """
    scalar = isinstance(value, numbers.Real)
    if torch.is_tensor(value):
        scalar = value.dim() == 0 and value.isreal()
    if not scalar or not smallest <= value <= largest:
        raise UserError(f"{name} is {shown(value)}: it must be a finite number{allowed}")
    return float(value)


def as_curves(curves, name: str) -> dict[str, list[float]]:
    """Convert curves, {label: one number of any library per evaluation}, to floats. Raises UserError for others."""
    try:
        return {label: [float(number) for number in values] for label, values in curves.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name} is {shown(curves)}: it must be {{label: numbers, one per evaluation}}") from error


def as_weight(value, name: str) -> float:
    """Return a real number of any library, 0 to 1e12, as a float. Raises UserError for anything else."""
    return as_number(value, name, 0, MAX_WEIGHT, f", 0 or more and at most {MAX_WEIGHT:.0e}")


def as_start(init, seed, task) -> tuple[Tensor | None, int]:
    """Convert the options `init` and `seed` of a run to (start image or None for noise, seed).

    init: "noise", "content" if `task` has a content image, or an image. Raises UserError for other values of either.
    """
    try:
        seed = operator.index(seed)
        torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"seed is {shown(seed)}: it must be a whole number of at most 64 bits") from error
    if not isinstance(init, str):
        return as_image(init, "init"), seed
    starts = {"noise": None}
    if task.content is not None:
        starts["content"] = task.content
    if init not in starts:
        raise UserError(f"unknown init {init!r}: use {' or '.join(map(repr, starts))} or an image to start from")
    return starts[init], seed
