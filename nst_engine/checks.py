"""Arguments: brought to one form, or refused in one sentence that names the value and what is allowed."""

import functools
import numbers
import operator
import sys
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import UserError, shown
from .layers import Shape, as_names, layer_name
from .styles import Style, as_styles, regions, with_shared_masks

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


def as_several(style) -> Tensor | tuple[Style, ...]:
    """The style of a task, an image or several `Style`s, checked."""
    if not isinstance(style, Style | list | tuple):
        return as_image(style, "style")
    given, styles = as_styles(style), []
    if not given:
        raise UserError("style is empty: give an image (1, 3, H, W), or several")
    for k, (image, weight, *masks) in enumerate(given):
        name = f"style[{k}]" if len(given) > 1 else "style"
        image, weight = as_image(image, name), as_weight(weight, f"weight of {name}")
        named = zip((f"mask of {name}", f"image_mask of {name}"), masks)
        masks = [None if mask is None else as_mask(mask, what, image.device) for what, mask in named]
        styles.append(Style(image, weight, *masks))
    styles = with_shared_masks(styles)
    for members in regions(styles):
        if not any(styles[k].weight for k in members):
            which = ", ".join(f"style[{k}]" for k in members) if len(styles) > 1 else "style"
            raise UserError(f"weight 0 is all that {which} have where they are to go: give one a weight above 0")
    return styles


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


def as_layers(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple. Raises UserError for unknown names and for a layer named twice."""
    layers = as_names(layers)
    names = [layer_name(name) for name in layers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"layers are {layers!r}: {name} is among them twice, and each may be named once")
    return layers


def as_task(task):
    """The `Task` with float32 images, and floats as weights. Raises UserError if it has nothing to match."""
    if not all(hasattr(task, name) for name in ("content_layers", "style_layers", "_replace")):
        raise UserError(f"task is {shown(task)}: give a Task")
    if not isinstance(task.style_layers, Mapping):
        task = task._replace(style_layers=dict.fromkeys(as_layers(task.style_layers), 1.0))
    checked = task
    for name, layers in (("content", task.content_layers), ("style", task.style_layers)):
        if layers or getattr(task, name) is not None:
            check = as_several if name == "style" else functools.partial(as_image, name=name)
            checked = checked._replace(**{name: check(getattr(task, name))})
        weight = as_weight(getattr(task, f"{name}_weight"), f"{name}_weight")
        checked = checked._replace(**{f"{name}_weight": weight})
    content, style, content_layers, style_layers, *weights = checked
    images = [content, *(each.image for each in as_styles(style))]
    devices = {str(image.device): None for image in images if image is not None}
    if len(devices) > 1:
        raise UserError(f"the images are on {' and '.join(devices)}: bring all to one device")
    content_layers = as_layers(content_layers)
    style_layers = {name: as_weight(style_layers[name], f"weight of {name}") for name in as_layers(style_layers)}
    if not (content_layers or style_layers):
        raise UserError("no layers given: name at least one, such as 'conv1_2'")
    if not (content_layers and weights[0] or any(style_layers.values()) and weights[1]):
        given = f"content_weight is {task.content_weight} and style_weight {task.style_weight}"
        raise UserError(f"{given}, and every layer named has weight 0: give one that has layers a weight above 0")
    return checked._replace(content_layers=content_layers, style_layers=style_layers)


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


def as_state(state, shape: Shape) -> tuple:
    """The scales of a `Run.state_dict`. Raises UserError unless it is one of a run of `shape`."""
    if not isinstance(state, Mapping) or "scales" not in state:
        raise UserError(f"the state is {shown(state)}: give what state_dict of a run has returned")
    scales = tuple(map(tuple, state["scales"]))
    if scales[-1] != shape:
        raise UserError(f"the state is of an image of shape {scales[-1]}: this run's is {shape}")
    return scales
