"""Loss and gradient of an image tile by tile, where the whole does not fit in memory. It knows no network.

The losses are made of statistics, which are sums over positions, and those of the tiles add up to those of the whole
image. A first pass over the tiles sums the statistics; the derivative of the loss by each of them follows; a second
pass backpropagates it through every tile. That is exact but for rounding: a tile is seen through a window that adds a
halo, as wide as the receptive field of the deepest layer reaches, and that begins where pooling does. An image that
fits is a single tile, which is evaluated once.

The ranks of `torch.distributed` may share the tiles; statistics and gradients are then all-reduced.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import Shape, UserError
from .memory import release_freed_memory

# Pixels, where there is memory: a tile twice as wide costs a tenth less time and takes nearly four times the memory.
SIDE = 256
HALOS = 4  # but at least so many halos


class Tile(NamedTuple):
    """A part of an image, and its window: (first, end) of rows and of columns."""

    rows: tuple
    columns: tuple
    window_rows: tuple
    window_columns: tuple

    @property
    def window(self):
        """The index of the window in an image (1, 3, H, W)."""
        return (..., slice(*self.window_rows), slice(*self.window_columns))

    def halo(self, stride: int) -> list[tuple]:
        """The indices of the strips around the tile in the window's feature map, of a layer with this stride."""

        def around(part, window):
            before = (part[0] - window[0]) // stride
            return before, before + part[1] // stride - part[0] // stride, (window[1] - window[0]) // stride

        (top, bottom, height), (left, right, width) = map(around, self[:2], self[2:])
        strips = [(0, top, 0, width), (bottom, height, 0, width), (top, bottom, 0, left), (top, bottom, right, width)]
        return [(..., slice(a, b), slice(c, d)) for a, b, c, d in strips if a < b and c < d]


class Objective(NamedTuple):
    """What to minimise, as two functions and the tiles that the first is called for."""

    statistics: Callable  # of a `Tile`'s window of the image, (1, 3, h, w), and the tile: a list of sums over the tile
    losses: Callable  # of the whole's statistics and a tensor of weights: a 1-D tensor; the first is minimised
    tiles: Sequence  # of the image
    kept: int = 1  # for how many tiles there is memory to keep the graph until the second pass


def cut_tiles(shape: Shape, side: int, halo: int, stride: int) -> list[Tile]:
    """The `Tile`s of an image of `shape`, at most `side` pixels wide or high, at its borders a halo more.

    `side` and `halo` are multiples of `stride`. Beyond the image there is no halo: tiles at its borders have as much
    more of the image, so that all windows but the last are of one size. Then the feature maps of one fit where those of
    another were freed.
    """
    more = min(halo, side // HALOS // stride * stride)

    def spans(length):
        count = max(1, math.ceil((length - 2 * more) / side))
        part = math.ceil((length - 2 * more) / count / stride) * stride
        edges = [0, *(more + k * part for k in range(1, count)), length]
        return [((a, b), (max(0, a - halo), min(length, b + halo))) for a, b in itertools.pairwise(edges)]

    pairs = itertools.product(*map(spans, shape))
    return [
        Tile(rows, columns, window_rows, window_columns) for (rows, window_rows), (columns, window_columns) in pairs
    ]


def plan_tiles(shape: Shape, budget_bytes: float, bytes_per_pixel: float, halo: int, stride: int) -> tuple:
    """(the `Tile`s of an image, of how many the graph is kept for the second pass) within a budget of memory.

    Raises UserError if there are fewer tiles than ranks.
    """
    if bytes_per_pixel * math.prod(shape) <= budget_bytes and world_size() == 1:
        return cut_tiles(shape, math.ceil(max(shape) / stride) * stride, halo, stride), 1
    side = 2 * max(SIDE, HALOS * halo)
    tiles, fit = [], 0  # for how many there is memory
    while side > stride and (fit < 1 or len(tiles) < world_size()):
        side = max(stride, side // 2 // stride * stride)
        tiles = cut_tiles(shape, side, halo, stride)
        fit = int(budget_bytes / (bytes_per_pixel * (side + 2 * halo) ** 2))
    if len(tiles) < world_size():
        raise UserError(f"an image of {shape[0]} x {shape[1]} is too small to share among {world_size()} processes")
    return tiles, max(0, fit - 1)  # one is under way


def largest_window(tiles: Sequence[Tile]) -> int:
    """How many pixels it has."""
    return max((bottom - top) * (right - left) for _, _, (top, bottom), (left, right) in tiles)


def smallest_tile(halo: int, stride: int) -> int:
    """How many pixels the window of the smallest tile has."""
    return (stride + 2 * halo) ** 2


def sum_statistics(statistics: Callable[[Tile], list[Tensor]], tiles: Sequence[Tile]) -> list[Tensor]:
    """The statistics of each tile, summed over all tiles and ranks."""
    total = None
    for tile in tiles_of_rank(tiles):
        found = [x.detach().clone() for x in statistics(tile)]
        total = [a + b for a, b in zip(total, found)] if total else found
    return all_reduce_sum(total)


def losses_and_gradient(
    objective: Objective, image: Tensor, weights: Tensor, scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """(losses, gradient of the first) of an `Objective` at an image (1, 3, H, W), in the two passes.

    scale: a power of two, by which the derivatives are multiplied on their way back through the network.
    """
    kept = {}
    # The passes and the optimiser want blocks of other sizes, for which what is freed leaves gaps. Where many graphs
    # are kept there is memory to spare, and to have its pages cleared by the system again would take longer.
    scarce = 4 * objective.kept < len(objective.tiles)

    def look(tile, with_graph):
        part = image[tile.window].clone().requires_grad_(with_graph)
        with torch.set_grad_enabled(with_graph):
            return part, objective.statistics(part, tile)

    def first_pass(tile):
        with_graph = len(kept) < objective.kept
        part, statistics = look(tile, with_graph)
        if with_graph:
            kept[tile] = part, statistics
        return statistics

    statistics = [x.requires_grad_() for x in sum_statistics(first_pass, objective.tiles)]
    if scarce:
        release_freed_memory()
    with torch.enable_grad():
        losses = objective.losses(statistics, weights)
    derivatives = [scale * derivative for derivative in torch.autograd.grad(losses[0], statistics)]
    gradient = torch.zeros_like(image)
    for tile in tiles_of_rank(objective.tiles):
        part, found = kept.pop(tile) if tile in kept else look(tile, True)
        gradient[tile.window] += torch.autograd.grad(found, part, derivatives)[0]
    if scarce:
        release_freed_memory()
    return losses.detach(), all_reduce_sum([gradient])[0].div_(scale)


# --- Several processes ---------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def tiles_of_rank(tiles: Sequence[Tile]) -> Sequence[Tile]:
    """The tiles that are this rank's."""
    return tiles[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else tiles


def all_reduce_sum(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, each summed over all ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def all_reduce_min(number: int, device: torch.device) -> int:
    """The smallest of the ranks' integers."""
    if not dist.is_initialized():
        return number
    reduced = torch.tensor(number, device=device)
    dist.all_reduce(reduced, dist.ReduceOp.MIN)
    return reduced.item()
