"""What a run minimises: a task, and its objective for images of one shape, made of network, targets and losses."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .images import resize
from .layers import Shape, stride
from .losses import losses_from, statistics_of
from .network import feature_maps, halo_and_stride, map_size, memory_per_pixel
from .tiles import Objective, plan_tiles, smallest_tile, sum_statistics, tiles_of_rank


class Task(NamedTuple):
    """What an image is to match: feature maps of `content`, Gram matrices of `style`, or both ([style], eq. 7)."""

    content: Tensor | None  # (1, 3, H, W), or None and no content layers
    style: Tensor | None  # likewise, of any size
    content_layers: tuple = ()
    style_layers: Mapping = {}  # {layer: its weight}, the paper's w_l
    content_weight: float = 1.0
    style_weight: float = 1e4

    @property
    def layers(self) -> tuple:
        return (*self.content_layers, *self.style_layers)

    @property
    def reference(self) -> Tensor:
        """The image whose size and device a result has: the content, or a texture's style."""
        return self.style if self.content is None else self.content

    @property
    def weights(self) -> Tensor:
        """The content weight, the style weight, and one weight for each style layer."""
        weights = [self.content_weight, self.style_weight, *self.style_layers.values()]
        return torch.tensor(weights, device=self.reference.device)

    @property
    def smallest_side(self) -> int:
        """How many pixels the coarsest scale needs along its shorter side.

        24, 64 for a style, 8 positions of the deepest content layer and 16 of the deepest style layer: with fewer, a
        texture copies the layout that zero padding gives away.
        """
        content, style = (max(map(stride, layers), default=0) for layers in (self.content_layers, self.style_layers))
        return max(24, 8 * content, 64 if style else 0, 16 * style)

    def at_scale(self, shape: Shape, full_size: Shape) -> "Task":
        """The task with its images scaled for a run at `shape`, a scale of `full_size`.

        The content has that shape. The style is as much smaller as the scale is, yet large enough for its deepest
        layer. Images without layers are left out.
        """
        content, style = resize(self.content, shape) if self.content_layers else None, None
        if self.style_layers:
            sides, smallest = self.style.shape[-2:], max(map(stride, self.style_layers))
            factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
            style = resize(self.style, tuple(max(1, round(side * factor)) for side in sides))
        return self._replace(content=content, style=style)


def objective_of(network: nn.Sequential, task: Task, shape: Shape, budget_bytes: float) -> Objective:
    """The `Objective` of a task for images of `shape`, which its content has too, within a budget of memory."""
    content_layers, style_layers = tuple(task.content_layers), tuple(task.style_layers)
    layers = dict.fromkeys((*content_layers, *style_layers))
    sizes = {name: map_size(network, name, shape) for name in layers}
    target_bytes = sum(sizes[name] for name in content_layers) * network.conv1_1.weight.element_size()
    store = target_bytes <= budget_bytes / 4  # the content's feature maps, which are otherwise computed each time
    tiles, kept = tiles_of(network, shape, budget_bytes - target_bytes * store)

    def content_maps(tile):
        with torch.no_grad():
            return feature_maps(network, task.content[tile.window], content_layers) if content_layers else {}

    stored = {tile: content_maps(tile) for tile in tiles_of_rank(tiles)} if store else {}
    style_targets = gram_matrices(network, task.style, style_layers, budget_bytes) if style_layers else {}

    def statistics(part, tile):
        targets = stored[tile] if store else content_maps(tile)
        return statistics_of(feature_maps(network, part, layers), targets, style_layers, sizes, tile.halo)

    def losses(statistics, weights):
        return losses_from(statistics, style_targets, weights)

    return Objective(statistics, losses, tiles, kept)


def gram_matrices(network: nn.Sequential, image: Tensor, layers: Iterable[str], budget_bytes: float) -> dict:
    """{layer: Gram matrix (C, C)} of an image of any size, within a budget of memory."""
    shape = tuple(image.shape[-2:])
    sizes = {name: map_size(network, name, shape) for name in layers}

    def statistics(tile):
        with torch.no_grad():
            return statistics_of(feature_maps(network, image[tile.window], layers), {}, layers, sizes, tile.halo)

    return dict(zip(layers, sum_statistics(statistics, tiles_of(network, shape, budget_bytes)[0])))


def least_memory(network: nn.Sequential) -> float:
    """How many bytes the evaluation of the smallest tile takes."""
    return memory_per_pixel(network) * smallest_tile(*halo_and_stride(network))


def tiles_of(network: nn.Sequential, shape: Shape, budget_bytes: float) -> tuple:
    """(the `Tile`s of an image, of how many the graph is kept) within a budget of memory."""
    return plan_tiles(shape, budget_bytes, memory_per_pixel(network), *halo_and_stride(network))
