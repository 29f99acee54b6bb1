"""What a run needs, by scale and precision: networks, targets, objectives, preconditioners, a start."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .coarse_to_fine import descend, plan_scales
from .evaluation import Objective, keep_freed_memory, pick_precisions
from .layers import block, deepest, stride
from .losses import gram_matrices, measure, weigh
from .network import cut_network, features, first_kernels, map_size
from .pictures import resize
from .prior import draw_noise, spectral_preconditioner


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


class Preparation:
    """Makes what runs need, once: what the run before had and the next one has too, such as targets, is kept."""

    def __init__(self, vgg, device, precision=None):
        keep_freed_memory()
        self.vgg, self.device, self.precisions = vgg, device, pick_precisions(device, precision)
        keep, keep_more = functools.lru_cache(maxsize=2), functools.lru_cache(maxsize=8)
        self.cut_network, self.content_targets, self.style_targets = keep(cut_network), keep(maps_of), keep(grams_of)
        self.preconditioner, self.scaled = keep(spectral_preconditioner), keep_more(resize)

    def start(self, task, shape, init, seed=0, coarse_to_fine=True):
        """(picture to begin with, scales to go through). init: None for noise drawn from `seed`, or a picture.

        A start with detail of its own would lose it at a coarse scale, and so has none.
        """
        if init is not None:
            return resize(init.detach().float().to(self.device), shape), [shape]
        scales = plan_scales(shape, task.smallest_side) if coarse_to_fine else [shape]
        return draw_noise(scales[0], seed, self.device), scales

    def run(self, task, image, scales, evaluations):
        """The run from `image`, of the first of these scales: yields (picture, `Step`) after each evaluation."""

        def objective_at(shape, precision):
            return self.objective(task, shape, scales[-1], precision)

        def precondition_at(shape):
            weight = PRIOR_WEIGHTS.get(min(map(block, task.layers)), math.inf)
            return self.preconditioner(self.kernels, shape, weight, self.device)

        return descend(image, scales, self.precisions, objective_at, precondition_at, evaluations)

    @functools.cached_property
    def kernels(self):
        return first_kernels(self.vgg)

    def style_at(self, task, shape, full_size):
        """The style picture for a scale: as much smaller as the scale is, yet large enough for its deepest layer."""
        sides = task.style.shape[-2:]
        smallest = max(map(stride, task.style_layers))
        factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
        return self.scaled(task.style, tuple(max(1, round(side * factor)) for side in sides))

    def objective(self, task, shape, full_size, precision):
        """The `Objective` of a task for pictures of `shape`, a scale of `full_size`."""
        network = self.network(task, precision)
        content_targets, style_targets = {}, {}
        if task.content_layers:
            content_targets = self.content_targets(network, self.scaled(task.content, shape), task.content_layers)
        if task.style_layers:
            style = self.style_at(task, shape, full_size)
            style_targets = self.style_targets(network, style, tuple(task.style_layers))
        layers = dict.fromkeys(task.layers)
        sizes = {name: map_size(network, name, shape) for name in layers}

        def statistics(image):
            return measure(features(network, image, layers), content_targets, task.style_layers)

        def loss(statistics):
            return weigh(statistics, sizes, style_targets, task.style_layers, task.content_weight, task.style_weight)

        return Objective(statistics, loss)

    def network(self, task, precision):
        return self.cut_network(self.vgg, deepest(task.layers), self.device, precision)


@torch.no_grad()
def maps_of(network, image, layers):
    return features(network, image, layers)


@torch.no_grad()
def grams_of(network, image, layers):
    return gram_matrices(features(network, image, layers))
