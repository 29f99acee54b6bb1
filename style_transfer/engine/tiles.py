"""Loss and gradient of an image tile by tile, if the whole does not fit in memory. Independent of the network.

The losses depend on statistics that are sums over positions, so the tiles' statistics add up to those of the whole
image. A first pass over the tiles sums the statistics. Then the loss is differentiated with respect to the sums, and a
second pass backpropagates these derivatives through every tile. This is exact up to rounding: a tile is evaluated in a
window that adds a halo, as wide as the deepest layer's receptive field reaches, and that is aligned with the pooling
grid. An image that fits is a single tile and is evaluated once.

The ranks of `torch.distributed` may share the tiles; statistics and gradients are then all-reduced.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import Shape, UserError
from .losses import Statistics, Weights
from .memory import release_freed_memory

# Side of a tile if memory allows. Twice the side would save a tenth of the time and take nearly four times the memory.
TILE_SIDE_PIXELS = 256
MIN_TILE_SIDE_HALOS = 4


class Tile(NamedTuple):
    """A part of an image, and its window: (first, end) of rows and of columns."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    window_rows: tuple[int, int]
    window_columns: tuple[int, int]

    @property
    def window(self) -> tuple:
        """The index of the window in an image (1, 3, H, W)."""
        return (..., slice(*self.window_rows), slice(*self.window_columns))

    def halo(self, stride: int) -> list[tuple]:
        """The indices of the strips around the tile in the window's feature map, for a layer with this stride."""

        def cut(window, part):
            """Split one side of the window in three: before, within and after the tile."""
            edges = [(edge - window[0]) // stride for edge in (window[0], *part, window[1])]
            return itertools.starmap(slice, itertools.pairwise(edges))

        above, rows, below = cut(self.window_rows, self.rows)
        left, _, right = cut(self.window_columns, self.columns)
        whole = slice(0, None)
        strips = (above, whole), (below, whole), (rows, left), (rows, right)
        return [(..., *strip) for strip in strips if all(side.start != side.stop for side in strip)]


class Tiling(NamedTuple):
    """How an image is cut into tiles."""

    tiles: Sequence[Tile]
    kept: int  # for how many tiles the autograd graph is kept from the first pass to the second

    @property
    def largest_window_pixels(self) -> int:
        return max(math.prod(end - first for first, end in tile[2:]) for tile in self.tiles)


def cut_tiles(shape: Shape, side: int, halo: int, stride: int) -> list[Tile]:
    """The `Tile`s of an image of `shape`, at most `side` pixels wide or high, plus up to a halo at the image's borders.

    `side` and `halo` are multiples of `stride`. Tiles at the image's borders need no halo outside it and hold more of
    the image instead. If `side` is at least four halos, all windows but the last have equal sizes, so the allocator can
    reuse freed blocks.
    """
    more = min(halo, side // MIN_TILE_SIDE_HALOS // stride * stride)

    def spans(length):
        count = max(1, math.ceil((length - 2 * more) / side))
        part = math.ceil((length - 2 * more) / count / stride) * stride
        edges = [0, *(more + k * part for k in range(1, count)), length]
        return [((a, b), (max(0, a - halo), min(length, b + halo))) for a, b in itertools.pairwise(edges)]

    return [
        Tile(rows, columns, window_rows, window_columns)
        for (rows, window_rows), (columns, window_columns) in itertools.product(*map(spans, shape))
    ]


def plan_tiles(shape: Shape, budget_bytes: float, bytes_per_pixel: float, halo: int, stride: int) -> Tiling:
    """The `Tiling` of an image of `shape` within a memory budget. Raises UserError if tiles are fewer than ranks."""
    ranks = world_size()
    if bytes_per_pixel * math.prod(shape) <= budget_bytes and ranks == 1:
        sides = [(0, side) for side in shape]
        return Tiling([Tile(*sides, *sides)], 1)
    side = 2 * max(TILE_SIDE_PIXELS, MIN_TILE_SIDE_HALOS * halo)
    tiles, fitting = [], 0  # how many fit in the budget at once
    while side > stride and (fitting < 1 or len(tiles) < ranks):
        side = max(stride, side // 2 // stride * stride)
        tiles = cut_tiles(shape, side, halo, stride)
        fitting = int(budget_bytes / (bytes_per_pixel * (side + 2 * halo) ** 2))
    if len(tiles) < ranks:
        raise UserError(f"an image of {shape[0]} x {shape[1]} is too small to share among {ranks} processes")
    return Tiling(tiles, max(0, fitting - 1))  # less the one being evaluated


def statistics_at(objective, image: Tensor, tile: Tile, with_graph: bool) -> tuple[Tensor, Statistics]:
    """(a tile's window of an image (1, 3, H, W), the tile's `Statistics`), with or without their autograd graph."""
    part = image[tile.window].clone().requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        return part, objective.statistics(part, tile)


def sum_statistics(objective, image: Tensor, graphs: dict | None = None) -> Statistics:
    """The `Statistics` of an image (1, 3, H, W), summed over all tiles and ranks.

    graphs: filled with {tile: what `statistics_at` returned with its graph}, for `Tiling.kept` tiles.
    """
    total = None
    for tile in tiles_of_rank(objective.tiling.tiles):
        with_graph = graphs is not None and len(graphs) < objective.tiling.kept
        part, found = statistics_at(objective, image, tile, with_graph)
        if with_graph:
            graphs[tile] = part, found
        if total is None:
            total = Statistics(*([x.detach().clone() for x in field] for field in found))
        else:
            for x, more in zip(tensors_of(total), tensors_of(found)):
                x += more.detach()
    all_reduce_sum(tensors_of(total))
    return total


def tensors_of(statistics: Statistics) -> list[Tensor]:
    """The tensors of all fields, in order."""
    return [*itertools.chain(*statistics)]


def losses_and_gradient(objective, image: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """(losses, gradient of the first) of an `Objective` at an image (1, 3, H, W), in the two passes."""
    tiles, kept = objective.tiling
    # The two passes and the optimiser need blocks of different sizes, so freed ones leave gaps. Release them if few
    # graphs are kept. Otherwise there is memory to spare, and letting the system zero its pages again would cost time.
    scarce = 4 * kept < len(tiles)
    graphs = {}
    statistics = sum_statistics(objective, image, graphs)
    sums = tensors_of(statistics)
    for x in sums:
        x.requires_grad_()
    if scarce:
        release_freed_memory()
    with torch.enable_grad():
        losses = objective.losses(statistics, weights)
    derivatives = torch.autograd.grad(losses[0], sums)
    gradient = torch.zeros_like(image)
    for tile in tiles_of_rank(tiles):
        part, found = graphs.pop(tile) if tile in graphs else statistics_at(objective, image, tile, with_graph=True)
        gradient[tile.window] += torch.autograd.grad(tensors_of(found), part, derivatives)[0]
    if scarce:
        release_freed_memory()
    all_reduce_sum([gradient])
    return losses.detach(), gradient


# --- Several processes ---------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def tiles_of_rank(tiles: Sequence[Tile]) -> Sequence[Tile]:
    """This rank's tiles."""
    return tiles[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else tiles


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Sum each tensor over all ranks, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_min(number: int, device: torch.device) -> int:
    """The minimum of an integer over all ranks."""
    if not dist.is_initialized():
        return number
    reduced = torch.tensor(number, device=device)
    dist.all_reduce(reduced, dist.ReduceOp.MIN)
    return reduced.item()
