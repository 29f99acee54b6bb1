"""What a run needs, by scale and precision: networks, targets, objectives, preconditioners, a start."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from .coarse_to_fine import Needs, descend, plan_scales
from .evaluation import Objective, keep_freed_memory, pick_precisions
from .layers import block, deepest, stride
from .losses import gram_matrices, measure, weigh
from .network import cut_network, features, first_kernels, map_size
from .pictures import resize
from .prior import draw_detail, draw_noise, spectral_preconditioner
from .whitening import whitening_of


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
    def is_texture(self):
        """Whether the style alone counts."""
        return not (self.content_layers and self.content_weight)

    @property
    def smallest_side(self):
        """How many pixels the coarsest scale needs along its shorter side.

        24, 64 for a style, 8 positions of the deepest content layer and 16 of the deepest style layer: with fewer, a
        texture copies the layout that zero padding gives away.
        """
        content, style = (max(map(stride, layers), default=0) for layers in (self.content_layers, self.style_layers))
        return max(24, 8 * content, 64 if style else 0, 16 * style)


def sees_detail(layers):
    """Whether one of `layers` is in the first block: those behind a max-pooling hardly see fine detail."""
    return any(block(name) == 1 for name in layers)


class Preparation:
    """Makes what runs need, once: what the run before had and the next one has too, such as targets, is kept."""

    def __init__(self, vgg, device, precision=None):
        keep_freed_memory()
        self.vgg, self.device, self.precisions = vgg, device, pick_precisions(device, precision)
        keep, keep_more = functools.lru_cache(maxsize=2), functools.lru_cache(maxsize=8)
        self.cut_network, self.content_targets, self.style_targets = keep(cut_network), keep(maps_of), keep(grams_of)
        self.whitening, self.preconditioner = keep(find_whitening), keep(spectral_preconditioner)
        self.scaled = keep_more(resize)

    def start(self, task, shape, init, seed=0, coarse_to_fine=True):
        """(picture to begin with, scales to go through). init: None for noise drawn from `seed`, or a picture.

        A start with detail of its own would lose it at a coarse scale, and so has none.
        """
        if init is not None:
            return resize(init.detach().float().to(self.device), shape), [shape]
        scales = plan_scales(shape, task.smallest_side) if coarse_to_fine else [shape]
        return draw_noise(scales[0], seed, self.device), scales

    def run(self, task, image, scales, evaluations, seed=0):
        """The run from `image`, of the first of these scales: yields (picture, `Step`) after each evaluation."""
        full_size = scales[-1]

        def enlarge(image, shape):
            larger = resize(image, shape)
            if sees_detail(task.style_layers):  # else these layers do not know what to make of it
                larger = larger + draw_detail(self.style_at(task, shape, full_size), shape, seed)
            return larger.clamp(0, 1)

        def precondition_at(shape):
            # Steps made for the first block would fill detail that deeper layers do not see with noise.
            floor = 0.05 if sees_detail(task.layers) else 0.5
            return self.preconditioner(self.kernels, shape, floor, self.device)

        def objective_at(shape, precision, whitened):
            return self.objective(task, shape, full_size, precision, whitened)

        needs = Needs(precondition_at, objective_at, enlarge)
        return descend(image, scales, self.precisions, task.is_texture, needs, evaluations)

    @functools.cached_property
    def kernels(self):
        return first_kernels(self.vgg)

    def style_at(self, task, shape, full_size):
        """The style picture for a scale: as much smaller as the scale is, yet large enough for its deepest layer."""
        sides = task.style.shape[-2:]
        smallest = max(map(stride, task.style_layers))
        factor = min(1.0, max(min(shape) / min(full_size), smallest / min(sides)))
        return self.scaled(task.style, tuple(max(1, round(side * factor)) for side in sides))

    def objective(self, task, shape, full_size, precision, whitened=False):
        """The `Objective` of a task for pictures of `shape`, a scale of `full_size`."""
        network = self.network(task, precision)
        content_targets, style_targets, whitening = {}, {}, None
        if task.content_layers:
            content_targets = self.content_targets(network, self.scaled(task.content, shape), task.content_layers)
        if task.style_layers:
            style = self.style_at(task, shape, full_size), tuple(task.style_layers)
            style_targets = self.style_targets(network, *style)
            if whitened:
                whitening = self.whitening(self.network(task, self.precisions[-1]), *style)
        layers = dict.fromkeys(task.layers)
        sizes = {name: map_size(network, name, shape) for name in layers}

        def statistics(image):
            return measure(features(network, image, layers), content_targets, task.style_layers)

        def loss(statistics):
            weights = task.style_layers, task.content_weight, task.style_weight
            return weigh(statistics, sizes, style_targets, *weights, whitening)

        return Objective(statistics, loss)

    def network(self, task, precision):
        return self.cut_network(self.vgg, deepest(task.layers), self.device, precision)


@torch.no_grad()
def maps_of(network, image, layers):
    return features(network, image, layers)


@torch.no_grad()
def grams_of(network, image, layers):
    return gram_matrices(features(network, image, layers))


@torch.no_grad()
def find_whitening(network, style, layers):
    """`whitening_of` a style, with how its feature maps change when white noise is added."""
    noise = torch.randn(style.shape, generator=torch.Generator().manual_seed(0)).to(style.device)
    still, moved = (features(network, style + change, layers) for change in (0.0, 0.01 * noise))
    answers = gram_matrices({name: moved[name] - maps for name, maps in still.items()})
    return whitening_of(gram_matrices(still), answers, {name: maps.numel() for name, maps in still.items()})
