"""What a run needs, by scale and precision: networks, targets, objectives, preconditioners, a start."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .coarse_to_fine import LARGE, descend, plan_scales
from .evaluation import Objective, loss_and_gradient, pick_precisions
from .layers import block, deepest, stride
from .losses import measure, weigh
from .memory import fitting, keep_freed_memory, memory_to_use
from .network import cut_network, features, first_kernels, map_size, margin_and_step, memory_per_pixel
from .optimiser import InverseCurvature
from .pictures import resize
from .prior import draw_noise, enlarge, enlarge_change, spectral_preconditioner
from .tiles import largest_window, least, own_share, plan_tiles, processes, smallest_tile, sum_tiles


class Task(NamedTuple):
    """What a picture is to match: feature maps of `content`, Gram matrices of `style`, or both ([style], eq. 7)."""

    content: torch.Tensor | None  # (1, 3, H, W), or None and no content layers
    style: torch.Tensor | None  # likewise, of any size
    content_layers: tuple = ()
    style_layers: Mapping = {}  # {layer: its weight}, the paper's w_l
    content_weight: float = 1.0
    style_weight: float = 1e4

    @property
    def layers(self):
        return (*self.content_layers, *self.style_layers)

    @property
    def picture(self):
        """The one whose size and device a result has: the content, or a texture's style."""
        return self.style if self.content is None else self.content

    @property
    def smallest_side(self):
        """How many pixels the coarsest scale needs along its shorter side.

        24, 64 for a style, 8 positions of the deepest content layer and 16 of the deepest style layer: with fewer, a
        texture copies the layout that zero padding gives away.
        """
        content, style = (max(map(stride, layers), default=0) for layers in (self.content_layers, self.style_layers))
        return max(24, 8 * content, 64 if style else 0, 16 * style)


# How much the prior counts against what the network's first convolutions see, by the first block in use. For deeper
# ones, which see otherwise than these, it counts alone.
PRIOR_WEIGHTS = {1: 0.01, 2: 0.1}

# Bytes for each pixel of the picture: pictures, gradients, step and preconditioner while the network is evaluated; the
# same when a step is made, with what comes and goes; a curvature pair.
IN_EVALUATION, IN_STEP, PAIR = 160, 190, 24
FEWEST, MOST = 2, 20  # curvature pairs

BROAD = 512  # pixels


class Preparation:
    """Makes what runs need, once: what the run before had and the next one has too, such as targets, is kept.

    memory: GiB for the process, by default what is free.
    """

    def __init__(self, vgg, device, precision=None, memory=None):
        keep_freed_memory()
        self.memory, self.curvature = least(memory_to_use(device, memory, processes()), device), None
        self.vgg, self.device, self.precisions = vgg, device, pick_precisions(device, precision)
        keep, keep_more = functools.lru_cache(maxsize=2), functools.lru_cache(maxsize=8)
        self.cut_network, self.evaluation_of = keep(cut_network), keep(evaluation_of)
        self.preconditioner, self.scaled = keep(spectral_preconditioner), keep_more(resize)

    def start(self, task, shape, init, seed=0, coarse_to_fine=True):
        """(picture to begin with, scales to go through). init: None for noise drawn from `seed`, or a picture.

        From a picture, of which a coarse scale sees less, they begin at `BROAD` pixels to a side.
        """
        if init is not None:
            scales = plan_scales(shape, max(BROAD, task.smallest_side)) if coarse_to_fine else [shape]
            return resize(init.detach().float().to(self.device), scales[0]), scales
        scales = plan_scales(shape, task.smallest_side) if coarse_to_fine else [shape]
        return draw_noise(scales[0], seed, self.device), scales

    def run(self, task, image, scales, evaluations, seed=0, init=None, done=0, learned=None):
        """The run from `image`, of the first of these scales: yields (picture, `Step`) after each evaluation.

        seed: of the noise that a finer scale has where the one before had no detail. init: the picture that the run
        began with, whose detail finer scales keep. A run that goes on: done evaluations of the first scale are behind
        it, and it had learned so much (`InverseCurvature.state`). Raises ValueError for a size that the device has no
        memory for.
        """
        weights = torch.tensor(
            [task.content_weight, task.style_weight, *task.style_layers.values()], device=self.device
        )

        def enlarge_to(image, shape):
            if init is not None:
                return enlarge_change(image, init.to(image), shape)
            return enlarge(image, shape, seed) if task.style_layers else resize(image, shape)

        def evaluate_at(shape, precision):
            return functools.partial(self.evaluation(task, shape, scales[-1], precision), weights=weights)

        def curvature_at(shape):
            weight = PRIOR_WEIGHTS.get(min(map(block, task.layers)), math.inf)
            self.curvature = None  # the last scale's goes before there is another
            if math.prod(shape) > LARGE:
                self.evaluation_of.cache_clear()
                self.preconditioner.cache_clear()
                tiles = self.tiles(task, shape)[0]
                if len(tiles) > 1:  # the feature maps of tiles, of up to 64 float32 a pixel
                    keep_freed_memory(below=257 * largest_window(tiles))
            precondition = self.preconditioner(self.kernels, shape, weight, self.device)
            place = torch.empty(3 * math.prod(shape), device=self.device)
            self.curvature = InverseCurvature(precondition, place, self.divide_memory(shape)[0])
            if learned is not None and shape == scales[0]:
                self.curvature.load(learned)
            return self.curvature

        network = self.network(task, self.precisions[-1])
        constant = memory_per_pixel(network) * smallest_tile(*margin_and_step(network))
        with fitting(scales[-1], self.memory, IN_STEP + FEWEST * PAIR, constant, self.device):
            yield from descend(image, scales, self.precisions, enlarge_to, evaluate_at, curvature_at, evaluations, done)

    def divide_memory(self, shape):
        """(how many curvature pairs, how many bytes for an evaluation) at a scale."""
        pixels = math.prod(shape)
        pairs = max(FEWEST, min(MOST, int((self.memory - IN_STEP * pixels) / 3 / (PAIR * pixels))))
        return pairs, self.memory - (IN_EVALUATION + pairs * PAIR) * pixels

    def tiles(self, task, shape):
        """(the `Tile`s of a scale, of how many the graph is kept)."""
        return tiles_of(self.network(task, self.precisions[-1]), shape, self.divide_memory(shape)[1])

    def describe(self, task, shape):
        """What the memory buys at full size, in a line."""
        tiles, kept = self.tiles(task, shape)
        parts = "whole" if len(tiles) == 1 else f"in {len(tiles)} tiles, the graphs of {min(kept, len(tiles))} kept"
        return f"{shape[1]} x {shape[0]} pixels {parts}, {self.divide_memory(shape)[0]} curvature pairs"

    @functools.cached_property
    def kernels(self):
        return first_kernels(self.vgg)

    def style_at(self, task, shape, full_size):
        """The style picture for a scale: as much smaller as the scale is, yet large enough for its deepest layer."""
        sides = task.style.shape[-2:]
        smallest = max(map(stride, task.style_layers))
        factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
        return self.scaled(task.style, tuple(max(1, round(side * factor)) for side in sides))

    def evaluation(self, task, shape, full_size, precision):
        """Loss and gradient of a task for pictures of `shape`, a scale of `full_size`: what `loss_and_gradient` gives.

        It is of the task's pictures and layers. The weights are its second argument, so that others make nothing anew.
        """
        content = self.scaled(task.content, shape) if task.content_layers else None
        style = self.style_at(task, shape, full_size) if task.style_layers else None
        network = self.network(task, precision)
        layers, room = (tuple(task.content_layers), tuple(task.style_layers)), self.divide_memory(shape)[1]
        return self.evaluation_of(network, precision, content, style, *layers, shape, room)

    def network(self, task, precision):
        return self.cut_network(self.vgg, deepest(task.layers), self.device, precision)


def evaluation_of(network, precision, content, style, content_layers, style_layers, shape, room):
    objective = objective_of(network, content, style, content_layers, style_layers, shape, room)
    image = torch.zeros(1, 3, *shape, device=network.mean.device)
    return loss_and_gradient(objective, image, 2 + len(style_layers), precision)


def objective_of(network, content, style, content_layers, style_layers, shape, room):
    """The `Objective` for pictures of `shape`, evaluated in `room` bytes of memory.

    content: of that shape, or None without content layers; style: likewise, of any size.
    """
    layers = dict.fromkeys((*content_layers, *style_layers))
    sizes = {name: map_size(network, name, shape) for name in layers}
    values = sum(sizes[name] for name in content_layers) * network.conv1_1.weight.element_size()
    store = values <= room / 4  # the content's feature maps, or else they are found anew each time
    tiles, kept = tiles_of(network, shape, room - values * store)

    def content_maps(tile):
        with torch.no_grad():
            return features(network, content[tile.window], content_layers) if content_layers else {}

    stored = {tile: content_maps(tile) for tile in own_share(tiles)} if store else {}
    style_targets = gram_matrices(network, style, style_layers, room) if style_layers else {}

    def statistics(part, tile):
        targets = stored[tile] if store else content_maps(tile)
        return measure(features(network, part, layers), targets, style_layers, sizes, tile.outside)

    def loss(sums, weights):
        return weigh(sums, style_targets, weights)

    return Objective(statistics, loss, tiles, kept)


def gram_matrices(network, image, layers, room):
    """{layer: Gram matrix (C, C)} of a picture of any size, found in `room` bytes of memory."""
    shape = tuple(image.shape[-2:])
    sizes = {name: map_size(network, name, shape) for name in layers}

    def sums_of(tile):
        with torch.no_grad():
            return measure(features(network, image[tile.window], layers), {}, layers, sizes, tile.outside)

    return dict(zip(layers, sum_tiles(sums_of, tiles_of(network, shape, room)[0])))


def tiles_of(network, shape, room):
    return plan_tiles(shape, room, memory_per_pixel(network), *margin_and_step(network))
