"""What a run minimises: a task, and its objective for images of one shape, made of network, targets and losses."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import Shape, UserError, as_image, as_mask, as_weight, shown
from .images import resize
from .losses import Target, losses_from, mask_of, resize_mask, share_of, statistics_of
from .tiles import Objective, Tile, plan_tiles, smallest_tile, sum_statistics, tiles_of_rank
from .vgg import as_layers, check_size, feature_maps, halo_and_stride, map_size, memory_per_pixel, stride


class Style(NamedTuple):
    """One style of several: an image, how much of it, and where.

    Styles with equal masks are blended by their weights. Masks are floats (H, W) in [0, 1], of any size; they may
    overlap, and where none is above 0 no style is asked for.
    """

    image: Tensor  # (1, 3, H, W) in [0, 1]
    weight: float = 1.0  # beside the other styles with an equal mask
    mask: Tensor | None = None  # where in the result; None: everywhere
    image_mask: Tensor | None = None  # which part of its own image counts; None: all of it


def as_styles(style: Tensor | Style | Iterable | None) -> tuple[Style, ...]:
    """What a task has as `style`, nothing, one or several, as `Style`s."""
    if style is None:
        return ()
    several = [style] if isinstance(style, Tensor | Style) else style
    return tuple(each if isinstance(each, Style) else Style(each) for each in several)


def regions(styles: Sequence[Style]) -> list[list[int]]:
    """The styles by their numbers, those of one mask together."""
    found = {}
    for k, style in enumerate(styles):
        found.setdefault(id(style.mask), []).append(k)
    return [*found.values()]


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two images or masks hold the same, or neither is there."""
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def with_shared_masks(styles: Sequence[Style]) -> tuple[Style, ...]:
    """The same styles; where masks are equal, one tensor stands for them, by which `regions` knows them."""
    masks = []
    for style in styles:
        masks.append(next((mask for mask in masks if equal(mask, style.mask)), style.mask))
    return tuple(style._replace(mask=mask) for style, mask in zip(styles, masks))


def blending(styles: Sequence[Style]) -> list[float]:
    """The weight of each style as a share of its region's."""
    shares = [0.0] * len(styles)
    for members in regions(styles):
        total = sum(styles[k].weight for k in members)
        for k in members:
            shares[k] = styles[k].weight / total
    return shares


MASKED = 16  # bytes per pixel of the image that a mask takes, by itself and at the layers' resolutions


class Task(NamedTuple):
    """What an image is to match: feature maps of `content`, Gram matrices of `style`, or both ([style], eq. 7)."""

    content: Tensor | None  # (1, 3, H, W), or None and no content layers
    style: Tensor | Style | Sequence | None  # likewise, of any size; or a `Style`, or several of either
    content_layers: tuple = ()
    style_layers: Mapping = {}  # {layer: its weight}, the paper's w_l
    content_weight: float = 1.0
    style_weight: float = 1e4

    @property
    def layers(self) -> tuple:
        return (*self.content_layers, *self.style_layers)

    @property
    def styles(self) -> tuple[Style, ...]:
        return as_styles(self.style)

    @property
    def reference(self) -> Tensor:
        """The image whose size and device a result has: the content, or a texture's first style."""
        return self.styles[0].image if self.content is None else self.content

    @property
    def weights(self) -> Tensor:
        """The content weight, the style weight, one weight for each style layer, and each style's share of a blend."""
        weights = [self.content_weight, self.style_weight, *self.style_layers.values(), *blending(self.styles)]
        return torch.tensor(weights, device=self.reference.device)

    def differs_by_weights_alone(self, other: "Task") -> bool:
        """Whether another task has the same images, masks and layers."""

        def parts(task):
            masks = [(style.image, style.mask, style.image_mask) for style in task.styles]
            return (*task.content_layers, None, *task.style_layers), [task.content, *sum(masks, ())]

        (layers, tensors), (others, other_tensors) = parts(self), parts(other)
        return layers == others and len(tensors) == len(other_tensors) and all(map(equal, tensors, other_tensors))

    @property
    def smallest_side(self) -> int:
        """How many pixels the coarsest scale needs along its shorter side.

        24, 64 for a style, 8 positions of the deepest content layer and 16 of the deepest style layer: with fewer, a
        texture copies the layout that zero padding gives away.
        """
        content, style = (max(map(stride, layers), default=0) for layers in (self.content_layers, self.style_layers))
        return max(24, 8 * content, 64 if style else 0, 16 * style)

    def at_scale(self, shape: Shape, full_size: Shape) -> "Task":
        """The task with its images and masks scaled for a run at `shape`, a scale of `full_size`.

        The content has that shape. The style is as much smaller as the scale is, yet large enough for its deepest
        layer. Images without layers are left out.
        """

        masks = {id(style.mask): resize_mask(style.mask, shape) for style in self.styles}

        def scaled(style):
            sides, smallest = style.image.shape[-2:], max(map(stride, self.style_layers))
            factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
            sides = tuple(max(1, round(side * factor)) for side in sides)
            image_mask = resize_mask(style.image_mask, sides)
            return style._replace(image=resize(style.image, sides), mask=masks[id(style.mask)], image_mask=image_mask)

        content = resize(self.content, shape) if self.content_layers else None
        return self._replace(content=content, style=tuple(map(scaled, self.styles)) if self.style_layers else None)


def objective_of(network: nn.Sequential, task: Task, shape: Shape, budget_bytes: float) -> Objective:
    """The `Objective` of a task for images of `shape`, which its content has too, within a budget of memory."""
    content_layers, style_layers = tuple(task.content_layers), tuple(task.style_layers)
    layers = dict.fromkeys((*content_layers, *style_layers))
    check_size(shape, layers)
    sizes = {name: map_size(network, name, shape) for name in layers}
    target_bytes = sum(sizes[name] for name in content_layers) * network.conv1_1.weight.element_size()
    store = target_bytes <= budget_bytes / 4  # the content's feature maps, which are otherwise computed each time
    styles, parts = task.styles, regions(task.styles)
    masks = [styles[members[0]].mask for members in parts]
    tiles, kept = tiles_of(network, shape, budget_bytes - target_bytes * store - mask_bytes(task, shape))

    def content_maps(tile):
        with torch.no_grad():
            return feature_maps(network, task.content[tile.window], content_layers) if content_layers else {}

    stored = {tile: content_maps(tile) for tile in tiles_of_rank(tiles)} if store else {}
    masks_in = masks_by_layer(network, masks, style_layers, tiles)
    grams = [gram_matrices(network, style.image, style_layers, budget_bytes, style.image_mask) for style in styles]
    style_targets = [
        Target({k: grams[k][name] for k in members}, number, share_of(mask, name))
        for number, name in enumerate(style_layers)
        for members, mask in zip(parts, masks)
    ]

    def statistics(part, tile):
        targets = stored[tile] if store else content_maps(tile)
        maps = feature_maps(network, part, layers)
        return statistics_of(maps, targets, style_layers, sizes, lambda name: tile.halo(stride(name)), masks_in(tile))

    def losses(statistics, weights):
        return losses_from(statistics, style_targets, weights, len(style_layers))

    return Objective(statistics, losses, tiles, kept)


def masks_by_layer(network: nn.Sequential, masks: list, layers: Iterable[str], tiles: Sequence[Tile]) -> Callable:
    """The function tile -> function layer -> its `Mask` for each of the masks (H, W), or None for None.

    They are made here, once: how far a mask reaches is a question for which a GPU would have to wait.
    """
    dtype = network.conv1_1.weight.dtype
    if all(mask is None for mask in masks):
        return lambda tile: lambda layer: masks
    spacings = {stride(name): (name, [share_of(mask, name) for mask in masks]) for name in layers}
    made = {
        (tile, spacing): [mask_of(mask, tile, name, dtype, share) for mask, share in zip(masks, shares)]
        for tile in tiles_of_rank(tiles)
        for spacing, (name, shares) in spacings.items()
    }
    return lambda tile: lambda layer: made[tile, stride(layer)]


def gram_matrices(
    network: nn.Sequential, image: Tensor, layers: Iterable[str], budget_bytes: float, mask: Tensor | None = None
) -> dict:
    """{layer: Gram matrix (C, C)} of an image of any size, or of what `mask` (H, W) leaves, within a memory budget."""
    shape = tuple(image.shape[-2:])
    sizes = {name: map_size(network, name, shape) for name in layers}
    tiles = tiles_of(network, shape, budget_bytes - MASKED * math.prod(shape) * (mask is not None))[0]
    masks_in = masks_by_layer(network, [mask], layers, tiles)

    def statistics(tile):
        with torch.no_grad():
            maps = feature_maps(network, image[tile.window], layers)
            return statistics_of(maps, {}, layers, sizes, lambda name: tile.halo(stride(name)), masks_in(tile))

    return dict(zip(layers, sum_statistics(statistics, tiles)))


def mask_bytes(task: Task, shape: Shape) -> int:
    """How many bytes the masks of a task take at a scale."""
    return MASKED * math.prod(shape) * len({id(style.mask) for style in task.styles} - {id(None)})


def least_memory(network: nn.Sequential, task: Task, shape: Shape) -> float:
    """How many bytes the evaluation of the smallest tile takes, and the masks."""
    return memory_per_pixel(network) * smallest_tile(*halo_and_stride(network)) + mask_bytes(task, shape)


def tiles_of(network: nn.Sequential, shape: Shape, budget_bytes: float) -> tuple:
    """(the `Tile`s of an image, of how many the graph is kept) within a budget of memory."""
    return plan_tiles(shape, budget_bytes, memory_per_pixel(network), *halo_and_stride(network))


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
