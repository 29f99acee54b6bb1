"""Loss and gradient of a picture tile by tile, where the whole does not fit in memory. It knows no network.

The losses are made of sums over positions, and the sums of a picture's parts add up to those of the whole. A first pass
over the tiles adds up the sums; the derivative of the loss by each sum follows; a second pass leads every tile back
with it. That is exact but for rounding: a tile is seen through a window that reaches as far beyond it as the deepest
layer looks, and that begins where pooling does. A picture that fits is a single tile, which is seen once.

Tiles may be shared out over the processes of `torch.distributed`; sums and gradients are then added up over them.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist

from .layers import stride
from .memory import give_back_freed_memory

# Pixels, where there is room: a tile twice as wide costs a tenth less and takes nearly four times the memory.
SIDE = 256
MARGINS = 4  # but at least so many margins


class Tile(NamedTuple):
    """A part of a picture, and the window through which it is seen: (first, end) of rows and of columns."""

    rows: tuple
    columns: tuple
    window_rows: tuple
    window_columns: tuple

    @property
    def window(self):
        """The index of the window in a picture (1, 3, H, W)."""
        return (..., slice(*self.window_rows), slice(*self.window_columns))

    def outside(self, layer):
        """The indices of the strips around the part in the feature map that a layer has for the window."""
        step = stride(layer)

        def around(part, window):
            before = (part[0] - window[0]) // step
            return before, before + part[1] // step - part[0] // step, (window[1] - window[0]) // step

        (top, bottom, height), (left, right, width) = map(around, self[:2], self[2:])
        strips = [(0, top, 0, width), (bottom, height, 0, width), (top, bottom, 0, left), (top, bottom, right, width)]
        return [(..., slice(a, b), slice(c, d)) for a, b, c, d in strips if a < b and c < d]


def cut(shape, side, margin, step):
    """The `Tile`s of a picture of `shape`, at most `side` pixels wide or high, at its borders a margin more.

    `side` and `margin` are multiples of `step`. Beyond the picture there is no margin: tiles at its borders have so
    much more of it, that all windows but the last are of one size. Then the feature maps of one fit where those of
    another were freed.
    """
    more = min(margin, side // MARGINS // step * step)

    def spans(length):
        count = max(1, math.ceil((length - 2 * more) / side))
        part = math.ceil((length - 2 * more) / count / step) * step
        edges = [0, *(more + k * part for k in range(1, count)), length]
        return [((a, b), (max(0, a - margin), min(length, b + margin))) for a, b in itertools.pairwise(edges)]

    return [
        Tile(rows, columns, window_rows, window_columns)
        for (rows, window_rows), (columns, window_columns) in itertools.product(*map(spans, shape))
    ]


def plan_tiles(shape, room, bytes_per_pixel, margin, step):
    """(the `Tile`s of a picture, of how many the graph is kept for the second pass) for `room` bytes of memory.

    Raises ValueError if there are fewer tiles than processes.
    """
    if bytes_per_pixel * math.prod(shape) <= room and processes() == 1:
        return cut(shape, math.ceil(max(shape) / step) * step, margin, step), 1
    side = 2 * max(SIDE, MARGINS * margin)
    tiles, fit = [], 0  # how many have room
    while side > step and (fit < 1 or len(tiles) < processes()):
        side //= 2
        tiles, fit = cut(shape, side, margin, step), int(room / (bytes_per_pixel * (side + 2 * margin) ** 2))
    if len(tiles) < processes():
        raise ValueError(f"a picture of {shape[0]} x {shape[1]} is too small to share out over {processes()} processes")
    return tiles, max(0, fit - 1)  # one is under way


def largest_window(tiles):
    """How many pixels it has."""
    return max((bottom - top) * (right - left) for _, _, (top, bottom), (left, right) in tiles)


def smallest_tile(margin, step):
    """How many pixels the window of the smallest tile has."""
    return (step + 2 * margin) ** 2


def sum_tiles(sums_of, tiles):
    """The lists of sums that `sums_of` gives for each tile, added up over all tiles and processes."""
    total = None
    for tile in own_share(tiles):
        sums = [x.detach().clone() for x in sums_of(tile)]
        total = [a + b for a, b in zip(total, sums)] if total else sums
    return add_up(total)


def loss_and_gradient_of(objective, picture, weights):
    """(losses, gradient of the first) of an `Objective` at a picture (1, 3, H, W): the two passes."""
    kept = {}
    # The passes and the step want blocks of other sizes: what one frees is in the others' way. Where many graphs are
    # kept there is room, and to clear their pages anew would take longer.
    scarce = 4 * objective.kept < len(objective.tiles)

    def look(tile, remember):
        part = picture[tile.window].clone().requires_grad_(remember)
        with torch.set_grad_enabled(remember):
            return part, objective.statistics(part, tile)

    def first_pass(tile):
        remember = len(kept) < objective.kept
        part, sums = look(tile, remember)
        if remember:
            kept[tile] = part, sums
        return sums

    sums = [x.requires_grad_() for x in sum_tiles(first_pass, objective.tiles)]
    if scarce:
        give_back_freed_memory()
    with torch.enable_grad():
        losses = objective.loss(sums, weights)
    slopes = torch.autograd.grad(losses[0], sums)
    gradient = torch.zeros_like(picture)
    for tile in own_share(objective.tiles):
        part, sums = kept.pop(tile) if tile in kept else look(tile, True)
        gradient[tile.window] += torch.autograd.grad(sums, part, slopes)[0]
    if scarce:
        give_back_freed_memory()
    return losses.detach(), add_up([gradient])[0]


# --- Several processes ---------------------------------------------------------------------------


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def least(number, device):
    """The smallest of the processes' whole numbers, which all then go by."""
    if not dist.is_initialized():
        return number
    agreed = torch.tensor(number, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return agreed.item()


def own_share(tiles):
    """Those of the tiles that this process sees."""
    return tiles[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else tiles


def add_up(tensors):
    """The tensors, each added up over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors
