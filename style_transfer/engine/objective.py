"""What a run minimises: a `Task`, and at each scale its `Objective`, made of network, targets and losses."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Shape, UserError, as_image, as_mask, as_weight, shown
from .images import resize
from .losses import (
    Statistics,
    Target,
    Weights,
    gram_sum,
    losses_from,
    resize_mask,
    share_of,
    square_sum,
    tile_mask,
    zero_halo,
)
from .tiles import Tile, Tiling, plan_tiles, sum_statistics, tiles_of_rank
from .vgg import FIRST_FIVE, VGG, as_layers, check_size, stride

CONTENT_LAYER, STYLE_LAYERS = "conv1_2", FIRST_FIVE
CONTENT_WEIGHT, STYLE_WEIGHT = 1.0, 1e4
BYTES_PER_MASK_PIXEL = 16  # per pixel of the image, with the mask's copies at the layers' resolutions
MIN_SIDE_PIXELS, MIN_SIDE_PIXELS_STYLE = 24, 64  # of the coarsest scale
MIN_CONTENT_POSITIONS, MIN_STYLE_POSITIONS = 8, 16  # along its shorter side, in the deepest layer


class Style(NamedTuple):
    """One style of several: an image, its weight, and where it goes.

    Styles with equal masks are blended by their weights. Masks are floats (H, W) in [0, 1], of any size; they may
    overlap, and where all are 0, no style applies.
    """

    image: Tensor  # (1, 3, H, W) in [0, 1]
    weight: float = 1.0  # relative to the other styles with an equal mask
    mask: Tensor | None = None  # where in the result the style applies; None: everywhere
    image_mask: Tensor | None = None  # which part of the style's own image counts; None: all of it


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two images or masks are equal, or both None."""
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def regions_of(styles: Sequence[Style]) -> list[list[int]]:
    """The indices of the styles in each region; styles with equal masks share a region and are blended."""
    regions = []
    for k, style in enumerate(styles):
        shared = next((region for region in regions if equal(styles[region[0]].mask, style.mask)), None)
        if shared:
            shared.append(k)
        else:
            regions.append([k])
    return regions


def as_styles(style: Tensor | Style | Sequence) -> tuple[Style, ...]:
    """A task's `style`, one or several, as `Style`s."""
    several = style if isinstance(style, list | tuple) and not isinstance(style, Style) else [style]
    return tuple(each if isinstance(each, Style) else Style(each) for each in several)


class Task(NamedTuple):
    """What an image is to match: feature maps of `content`, Gram matrices of `style`, or both ([style], eq. 7)."""

    content: Tensor | None  # (1, 3, H, W), or None if there are no content layers
    style: Tensor | Style | Sequence | None  # likewise, of any size; or a `Style`, or several of either
    content_layers: str | Sequence[str] = ()
    style_layers: str | Sequence[str] | Mapping[str, float] = ()  # {layer: w_l}, the paper's weights, by default 1
    content_weight: float = CONTENT_WEIGHT
    style_weight: float = STYLE_WEIGHT

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.content_layers, *self.style_layers)

    @property
    def styles(self) -> tuple[Style, ...]:
        return () if self.style is None else as_styles(self.style)

    @property
    def reference(self) -> Tensor:
        """The image that gives a result its size and device: the content, or a texture's first style."""
        return self.styles[0].image if self.content is None else self.content

    @property
    def weights(self) -> Weights:
        """The task's weights as tensors on its device; a style's weight becomes its share of its region."""
        blend = [0.0] * len(self.styles)
        for region in regions_of(self.styles):
            total = sum(self.styles[k].weight for k in region)
            for k in region:
                blend[k] = self.styles[k].weight / total
        values = self.content_weight, self.style_weight, [*self.style_layers.values()], blend
        return Weights(*(torch.tensor(value, dtype=torch.float32, device=self.reference.device) for value in values))

    def differs_by_weights_alone(self, other: "Task") -> bool:
        """Whether another task has the same images, masks and layers."""
        layers, tensors = [], []
        for task in (self, other):
            layers.append((task.content_layers, [*task.style_layers]))
            tensors.append([task.content, *(part for style in task.styles for part in (style.image, *style[2:]))])
        return layers[0] == layers[1] and len(tensors[0]) == len(tensors[1]) and all(map(equal, *tensors))

    @property
    def smallest_side(self) -> int:
        """How many pixels the coarsest scale needs along its shorter side.

        With fewer, zero padding gives positions away, and a texture copies the layout of the style image.
        """
        content, style = (max(map(stride, layers), default=0) for layers in (self.content_layers, self.style_layers))
        smallest = MIN_SIDE_PIXELS_STYLE if style else MIN_SIDE_PIXELS
        return max(smallest, MIN_CONTENT_POSITIONS * content, MIN_STYLE_POSITIONS * style)

    def at_scale(self, shape: Shape, full_size: Shape) -> "Task":
        """The task with its images and masks resized to the scale `shape` of a run whose result is `full_size`.

        The content is resized to `shape`. A style image shrinks by the same factor, but stays large enough for the
        deepest style layer. Images without layers are left out.
        """
        content = resize(self.content, shape) if self.content_layers else None
        styles = []
        for style in self.styles if self.style_layers else ():
            sides, smallest = style.image.shape[-2:], max(map(stride, self.style_layers))
            factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
            sides = tuple(max(1, round(side * factor)) for side in sides)
            masks = resize_mask(style.mask, shape), resize_mask(style.image_mask, sides)
            styles.append(Style(resize(style.image, sides), style.weight, *masks))
        return self._replace(content=content, style=tuple(styles) or None)


def as_task(task) -> Task:
    """Check a `Task`: images become float32, styles `Style`s, layers a tuple and a dictionary, weights floats.

    Raises UserError for bad values, for images on several devices, and if there is nothing to match.
    """
    if not isinstance(task, Task):
        raise UserError(f"task is {shown(task)}: give a Task")
    content, style = task.content, task.style
    if task.content_layers or content is not None:
        content = as_image(content, "content")
    if task.style_layers or style is not None:
        style = _checked_styles(style)
    content_weight = as_weight(task.content_weight, "content_weight")
    style_weight = as_weight(task.style_weight, "style_weight")
    images = [content, *(each.image for each in style or ())]
    devices = {str(image.device): None for image in images if image is not None}
    if len(devices) > 1:
        raise UserError(f"the images are on {' and '.join(devices)}: use one device")
    content_layers = as_layers(task.content_layers)
    layer_weights = task.style_layers if isinstance(task.style_layers, Mapping) else {}
    style_layers = {
        name: as_weight(layer_weights.get(name, 1.0), f"weight of {name}") for name in as_layers(task.style_layers)
    }
    if not (content_layers or style_layers):
        raise UserError(f"no layers given: name at least one, such as {CONTENT_LAYER!r}")
    if not (content_layers and content_weight or any(style_layers.values()) and style_weight):
        given = f"content_weight is {task.content_weight} and style_weight {task.style_weight}"
        raise UserError(f"{given}, and no layer has a weight above 0 in the total: raise one")
    return Task(content, style, content_layers, style_layers, content_weight, style_weight)


def _checked_styles(style) -> tuple[Style, ...]:
    given, styles = as_styles(style), []
    if not given:
        raise UserError("style is empty: give an image (1, 3, H, W), or several")
    for k, (image, weight, mask, image_mask) in enumerate(given):
        name = f"style[{k}]" if len(given) > 1 else "style"
        image, weight = as_image(image, name), as_weight(weight, f"weight of {name}")
        if mask is not None:
            mask = as_mask(mask, f"mask of {name}", image.device)
        if image_mask is not None:
            image_mask = as_mask(image_mask, f"image_mask of {name}", image.device)
        styles.append(Style(image, weight, mask, image_mask))
    for region in regions_of(styles):
        if not any(styles[k].weight for k in region):
            names = ", ".join(f"style[{k}]" for k in region) if len(styles) > 1 else "style"
            raise UserError(f"the weight of {names} is 0, and no other style shares the mask: use a weight above 0")
    return tuple(styles)


class Objective:
    """The losses of images of one shape, tile by tile: `statistics` of a tile, then `losses` from their sum.

    task: checked, and resized to that shape. masks: (H, W) or None for each region. stored: whether the content's
    feature maps are computed once rather than at each evaluation. targets: one for each Gram matrix, to be set before
    `losses` is called.
    """

    def __init__(self, network: VGG, shape: Shape, task: Task, masks: list, tiling: Tiling, stored: bool = False):
        self.network, self.tiling, self.task = network, tiling, task
        self.sizes = {name: network.map_size(name, shape) for name in task.layers}
        self.targets: list[Target] = []
        tiles = tiles_of_rank(tiling.tiles)
        # Made once, since finding a mask's bounding box synchronises with the GPU.
        self.masks = {
            (tile, spacing): [tile_mask(mask, tile, spacing, network.dtype) for mask in masks]
            for tile in tiles
            for spacing in set(map(stride, task.style_layers))
        }
        self.content_maps = {tile: self._content_maps(tile) for tile in tiles} if stored else None

    def statistics(self, part: Tensor, tile: Tile) -> Statistics:
        """The `Statistics` of a tile, from its window (1, 3, h, w) of an image."""
        content_maps = self.content_maps[tile] if self.content_maps else self._content_maps(tile)
        maps = self.network.feature_maps(part, self.task.layers)
        content, grams = [], []
        for name in self.task.content_layers:
            error = zero_halo(maps[name] - content_maps[name], tile.halo(stride(name)))
            content.append(square_sum(error) / self.sizes[name])
        for name in self.task.style_layers:
            halo = tile.halo(stride(name))
            for mask in self.masks[tile, stride(name)]:
                size = self.sizes[name] * (mask.mean if mask else 1.0)
                grams.append(gram_sum(maps[name], halo, mask) / size)
        return Statistics(content, grams)

    def losses(self, statistics: Statistics, weights: Weights) -> Tensor:
        """(total, content, style), from the whole image's statistics."""
        return losses_from(statistics, self.targets, weights)

    def _content_maps(self, tile):
        if not self.task.content_layers:
            return {}
        with torch.no_grad():
            return self.network.feature_maps(self.task.content[tile.window], self.task.content_layers)


def objective_of(network: VGG, task: Task, shape: Shape, full_size: Shape, budget_bytes: float) -> Objective:
    """The `Objective` of a checked task for images of `shape`, a scale of `full_size`, within a memory budget."""
    regions, task = regions_of(task.styles), task.at_scale(shape, full_size)  # first: resizing may make two masks equal
    check_size(shape, task.layers)
    target_bytes = sum(network.map_size(name, shape) for name in task.content_layers) * network.dtype.itemsize
    stored = target_bytes <= budget_bytes / 4
    masks = [task.styles[region[0]].mask for region in regions if task.style_layers]
    tiling = tiling_of(network, shape, budget_bytes - target_bytes * stored - mask_bytes(masks, shape))
    without_styles = task._replace(style=None)  # whose images are needed only for their Gram matrices
    objective = Objective(network, shape, without_styles, masks, tiling, stored)
    grams = [style_grams(network, style, task.style_layers, budget_bytes) for style in task.styles]
    for k, name in enumerate(task.style_layers):
        for region, mask in zip(regions, masks):
            targets = {member: grams[member][k] for member in region}
            objective.targets.append(Target(targets, k, share_of(mask, stride(name))))
    return objective


def style_grams(network: VGG, style: Style, layers: Iterable[str], budget_bytes: float) -> list[Tensor]:
    """The Gram matrix (C, C) of a style at each layer, over the part in its `image_mask`, within a memory budget."""
    shape, masks = tuple(style.image.shape[-2:]), [style.image_mask]
    tiling = tiling_of(network, shape, budget_bytes - mask_bytes(masks, shape))
    objective = Objective(network, shape, Task(None, None, (), tuple(layers)), masks, tiling)
    return sum_statistics(objective, style.image).grams


def tiling_of(network: VGG, shape: Shape, budget_bytes: float) -> Tiling:
    """The `Tiling` of an image of `shape` within a memory budget."""
    return plan_tiles(shape, budget_bytes, network.bytes_per_pixel, network.halo, network.stride)


def mask_bytes(masks: list, shape: Shape) -> int:
    """How many bytes the masks (None for none) take for an image of `shape`."""
    return BYTES_PER_MASK_PIXEL * math.prod(shape) * sum(mask is not None for mask in masks)


def min_evaluation_bytes(network: VGG, task: Task, shape: Shape) -> float:
    """How many bytes the masks and the evaluation of the smallest tile take."""
    smallest = network.bytes_per_pixel * (network.stride + 2 * network.halo) ** 2
    return smallest + mask_bytes([task.styles[region[0]].mask for region in regions_of(task.styles)], shape)
