"""Errors that the user can mend, apart from those that are the code's fault.

Arguments: brought to one form, or refused in one sentence that names the value and what is allowed."""

import contextlib
import numbers
import operator
import os
import re
import stat
import sys
from pathlib import Path

import torch
from torch import Tensor


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


Shape = tuple[int, int]  # (height, width)

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LARGEST_NUMBER = 10**9  # of pixels or evaluations
LARGEST_WEIGHT = 1e12  # squares of the gradient must stay within float32


def check_image(image, name: str, lowest: float = 0.0, highest: float = 1.0) -> None:
    """Raise UserError unless it is a tensor (1, 3, H, W), floating, of finite values from `lowest` to `highest`."""
    plain = torch.is_tensor(image) and image.layout == torch.strided and image.device.type != "meta"
    shaped = plain and not image.is_nested and image.dim() == 4 and image.shape[:2] == (1, 3) and image.numel()
    if not (shaped and image.dtype in FLOATING):
        found = f"{tuple(image.shape)} {image.dtype}" if plain and not image.is_nested else type(image).__name__
        raise UserError(f"{name} is {found}: an image is a float tensor (1, 3, H, W), as load_image gives it")
    if not ((image >= lowest) & (image <= highest)).all():
        found = f"outside [{lowest:g}, {highest:g}] or not finite, {image.min():.3g} to {image.max():.3g}"
        raise UserError(f"{name} has values {found}: an image holds RGB in [0, 1]")


def check_shown(image, name: str) -> None:
    """`check_image` for what is shown or evaluated, and not yet clamped: values a little outside [0, 1] may pass."""
    check_image(image, name, lowest=-1.0, highest=2.0)


def as_image(image, name: str) -> Tensor:
    """`image` in float32, without a graph. Raises UserError as `check_image` does."""
    check_image(image, name)
    if image.requires_grad or image.is_inference():
        image = image.detach().clone()
    return image.float()


def as_mask(mask, name: str, device: torch.device) -> Tensor:
    """A mask (H, W) of floats in [0, 1], or of truth values, in float32 on `device`."""
    plain = torch.is_tensor(mask) and mask.layout == torch.strided and mask.device.type != "meta"
    if not (plain and not mask.is_nested and mask.dim() == 2 and mask.dtype in (*FLOATING, torch.bool)):
        found = f"{tuple(mask.shape)} {mask.dtype}" if plain and not mask.is_nested else type(mask).__name__
        raise UserError(f"{name} is {found}: a mask is a float tensor (H, W) with values in [0, 1]")
    if mask.requires_grad or mask.is_inference():
        mask = mask.detach().clone()
    mask = mask.to(device, torch.float32)
    if not (mask.numel() and ((mask >= 0) & (mask <= 1)).all()):
        found = f"values from {mask.min():.3g} to {mask.max():.3g}" if mask.numel() else "no pixels"
        raise UserError(f"{name} has {found}: a mask is a float tensor (H, W) with values in [0, 1]")
    if not mask.any():
        raise UserError(f"{name} is 0 everywhere: give one that leaves something")
    return mask


def check_feature_map(feature_map) -> None:
    """Raise UserError unless it is a feature map of one image: (1, C, h, w)."""
    if not torch.is_tensor(feature_map) or feature_map.dim() != 4 or len(feature_map) != 1:
        found = tuple(feature_map.shape) if torch.is_tensor(feature_map) else type(feature_map).__name__
        raise UserError(f"the feature map is {found}: one image's is (1, C, h, w)")


def as_whole(value, name: str, unit: str = "") -> int:
    """A whole number, 1 or more, of any library, as an int."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # the last two of a tensor with several values
        number = 0
    if not 1 <= number <= LARGEST_NUMBER:
        allowed = "1 or more" if number < 1 else "at most 1e9"
        raise UserError(f"{name} is {shown(value)}: it must be a whole number{unit}, {allowed}")
    return number


def as_shape(shape) -> Shape:
    """A pair of whole numbers, 1 or more, as (height, width)."""
    try:
        height, width = shape
        return as_whole(height, "height"), as_whole(width, "width")
    except (TypeError, ValueError) as error:
        raise UserError(f"shape is {shown(shape)}: it must be (height, width), two whole numbers, 1 or more") from error


def as_number(value, name: str, smallest: float, largest: float, what: str) -> float:
    """A number of any library, from `smallest` to `largest`, as a float; `what` says so in words."""
    scalar = isinstance(value, numbers.Real) or (torch.is_tensor(value) and value.dim() == 0 and value.isreal())
    if not (scalar and smallest <= value <= largest):
        raise UserError(f"{name} is {shown(value)}: it must be a finite number{what}")
    return float(value)


def as_weight(value, name: str) -> float:
    """A number of any library, 0 to 1e12, as a float."""
    return as_number(value, name, 0, LARGEST_WEIGHT, f", 0 or more and at most {LARGEST_WEIGHT:.0e}")


def as_memory(value) -> float | None:
    """A number of any library, above 0, as a float; None as it is."""
    return (
        None if value is None else as_number(value, "memory", sys.float_info.min, sys.float_info.max, " of GiB above 0")
    )


def as_start(init, seed, task) -> tuple[Tensor | None, int]:
    """(the image to start from, or None for noise; the seed) from the options `init` and `seed`."""
    starts = {"noise": None} if task.content is None else {"noise": None, "content": task.content}
    if isinstance(init, str) and init not in starts:
        raise UserError(f"unknown init {init!r}: use {' or '.join(map(repr, starts))} or an image to start from")
    try:
        seed = operator.index(seed)
        torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"seed is {seed!r}: it must be a whole number of at most 64 bits") from error
    return (starts[init] if isinstance(init, str) else as_image(init, "init")), seed
