"""A saved image: a PNG file whose text field "settings" says how it was made, so that it can be made again."""

import io
import json
import operator
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .checks import as_weight, as_whole
from .errors import UserError
from .files import as_file
from .images import IMAGES, is_picture, to_pil
from .layers import layer_name

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
