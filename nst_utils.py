"""Neural style transfer by optimisation: what the notebooks call, in reading order.

An image is a float32 tensor of shape (1, 3, H, W), RGB, with values in [0, 1]. First come the losses, as the papers
write them, then the optimisation that minimises them, then the three tasks: content reconstruction, texture synthesis
and style transfer. The package `style_transfer.engine` computes the same losses faster; tests check that both agree.

Papers named in the docstrings
    [VGG]      Simonyan & Zisserman 2014, Very Deep Convolutional Networks
    [texture]  Gatys, Ecker & Bethge 2015, Texture Synthesis Using Convolutional Neural Networks
    [style]    Gatys, Ecker & Bethge 2016, Image Style Transfer Using Convolutional Neural Networks
"""

from style_transfer import __version__  # noqa: F401  before torch, since it sets how OpenMP's threads wait

# isort: split
import difflib
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from IPython import get_ipython
from torch import Tensor, nn
from tqdm import tqdm

from style_transfer.engine.checks import UserError, as_mask, check_feature_map, check_targets
from style_transfer.engine.figures import Recorder, filmstrip, image_grid, image_table, plot_losses, show
from style_transfer.engine.images import (
    IMAGES,
    difference_map,
    difference_numbers,
    keep_colours,
    load_image,
    load_mask,
    resize,
    to_pil,
)
from style_transfer.engine.objective import CONTENT_LAYER, CONTENT_WEIGHT, STYLE_LAYERS, STYLE_WEIGHT, Style, Task
from style_transfer.engine.run import Run, Step
from style_transfer.engine.vgg import CONVOLUTIONS, FIRST_FIVE, RELUS, features, layer_name, load_vgg19

# fmt: off
__all__ = [
    "IMAGES", "load_image", "load_mask", "to_pil", "resize", "difference_map", "difference_numbers", "keep_colours",
    "CONVOLUTIONS", "RELUS", "FIRST_FIVE", "layer_name", "load_vgg19", "features",
    "gram_matrix", "gram_matrices", "content_loss", "style_loss", "make_objective",
    "Task", "Style", "Run", "Step", "Result", "optimise", "reconstruct_content", "synthesize_texture", "transfer_style",
    "show", "image_grid", "image_table", "plot_losses", "filmstrip", "Recorder", "UserError",
]
# fmt: on

# --- Losses --------------------------------------------------------------------------------------


def gram_matrix(feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrix (C, C) of a feature map (1, C, h, w): `F F^T / (C h w)`, where F is the map as a (C, h w) matrix.

    It says which channels are active together. Unlike Gatys et al. ([texture], equation 1), we average over positions
    instead of summing. With a mask m (h, w) in [0, 1] the average is weighted: `F diag(m) F^T / (C sum m)`. Raises
    UserError unless the map is that of one image, and for a mask of another shape, outside [0, 1] or all zeros.
    """
    check_feature_map(feature_map)
    rows = feature_map[0].flatten(1)
    if mask is None:
        return rows @ rows.T / rows.numel()
    mask = as_mask(mask, "the mask", feature_map.device).to(feature_map.dtype)
    if mask.shape != feature_map.shape[-2:]:
        shape = tuple(feature_map.shape[-2:])
        raise UserError(f"the mask is {tuple(mask.shape)} and the feature map {shape}: give a mask of that shape")
    return rows * mask.flatten() @ rows.T / (len(rows) * mask.sum())


def gram_matrices(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: feature map (1, C, h, w)} -> {layer: Gram matrix (C, C)}."""
    return {name: gram_matrix(feature_map) for name, feature_map in maps.items()}


def content_loss(maps: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error between two images' feature maps, summed over layers.

    Unlike Gatys et al. ([style], equation 1), we do not take half the sum of squares. maps, targets: {layer: (1, C, h,
    w)} as returned by `features`; layers without a target are ignored. Raises UserError for a target without a
    layer or of another shape.
    """
    check_targets(maps, targets)
    errors = [(maps[name] - target).square().mean() for name, target in targets.items()]
    return sum(errors, torch.zeros(()))


def style_loss(
    maps: Mapping[str, Tensor], targets: Mapping[str, Tensor], layer_weights: Mapping[str, float] | None = None
) -> Tensor:
    """Mean squared error between Gram matrices, summed over layers ([style], equations 4 and 5).

    maps: {layer: (1, C, h, w)}; targets: {layer: (C, C)}, the Gram matrices to match; layer_weights: {layer: number},
    the paper's w_l, by default 1 each. Unlike Gatys et al., we divide each layer's sum of squares by C^2, not by 4,
    which would give wide layers more weight. Layers without a target are ignored. Raises UserError for a target
    without a layer or of another shape.
    """
    weights = layer_weights or {}
    grams = gram_matrices({name: maps[name] for name in targets if name in maps})
    check_targets(grams, targets)
    errors = [weights.get(name, 1.0) * (grams[name] - target).square().mean() for name, target in targets.items()]
    return sum(errors, torch.zeros(()))


def make_objective(
    vgg: nn.Sequential, content: Tensor | None, style: Tensor | None, content_layers: Iterable[str],
    style_layers: Iterable[str] | Mapping[str, float], content_weight: float, style_weight: float,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Return the loss of a style transfer ([style], equation 7): a function image -> tensor (total, content, style).

    content and style: (1, 3, H, W), or None if there are no layers for it. style_layers: names, or {name: w_l}. The
    targets are computed once, here.
    """
    layer_weights = style_layers if isinstance(style_layers, Mapping) else None
    with torch.no_grad():
        content_targets = features(vgg, content, content_layers) if content_layers else {}
        style_targets = gram_matrices(features(vgg, style, style_layers)) if style_layers else {}

    def objective(image):
        maps = features(vgg, image, {**content_targets, **style_targets})
        zero = image.new_zeros(())  # for a loss without layers
        content_part = zero + content_loss(maps, content_targets)
        style_part = zero + style_loss(maps, style_targets, layer_weights)
        return torch.stack([content_weight * content_part + style_weight * style_part, content_part, style_part])

    return objective


# --- The optimisation ----------------------------------------------------------------------------


class Result(NamedTuple):
    """The result of an optimisation."""

    image: Tensor  # (1, 3, H, W) in [0, 1]
    history: list[Step]  # one per evaluation
    evaluations: int
    seconds: float  # wall time from the first step on; loading the network is not included, callbacks are
    times: list[float]  # seconds from the first step to the end of each evaluation
    ended: str | None  # why it ended, as part of a sentence; None if it was interrupted


last_result: Result | None = None  # of the last interrupted optimisation


def _with_options(source: Callable) -> Callable:
    """Show the options of `source` in a function's signature instead of `**options`, and reject all others."""
    options = [each for each in inspect.signature(source).parameters.values() if each.kind is each.KEYWORD_ONLY]

    def decorate(function):
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()  # without **options
        known = [each.name for each in own + options]

        @functools.wraps(function)
        def checked(*arguments, **named):
            for name in named.keys() - {*known}:
                nearest = difflib.get_close_matches(name, known, 1) or [", ".join(known)]
                raise UserError(f"{function.__name__} has no option {name!r}: use {nearest[0]}")
            return function(*arguments, **named)

        checked.__signature__ = signature.replace(parameters=own + options)
        return checked

    return decorate


@_with_options(Run)
def optimise(
    task: Task, shape: tuple[int, int] | None = None, *, progress: bool = True,
    callback: Callable[[Tensor, Step], None] | None = None, **options,
) -> Result:  # fmt: skip
    """Minimise the loss of a `Task` over images of `shape` (H, W), by default that of the content, else of the style.

    progress: show a progress bar. callback(image, step): called after each evaluation with a copy of the best image so
    far, at the current scale, and the `Step`. `Run` documents the other options. An interrupt (the notebook's stop
    button) stores the result so far in `nst_utils.last_result` and is re-raised. Raises UserError for bad input and
    for sizes that do not fit in memory.
    """
    global last_result
    if callback is not None and not callable(callback):
        raise UserError(f"callback is {callback!r}: give a function of an image and a Step")
    run = Run(task, shape, **options)
    history, times, start = [], [], time.perf_counter()

    def result():
        return Result(
            resize(run.image, run.shape), history, len(history), time.perf_counter() - start, times, run.ended
        )

    silent = not progress or "TQDM_DISABLE" in os.environ
    stream = sys.stdout if get_ipython() else sys.stderr  # a widget would leave an error in the saved notebook
    with tqdm(total=run.evaluations, disable=silent, leave=False, desc="optimising", file=stream) as bar:
        try:
            while step := run.step():
                history.append(step)
                times.append(time.perf_counter() - start)
                bar.update()
                if callback:
                    callback(run.image, step)
        except KeyboardInterrupt:
            last_result = result()
            raise
    return result()


Styles = Tensor | Style | Sequence  # an image, a `Style`, or several of either
Layers = str | Iterable[str]  # a layer's name, or several

# --- The three tasks -----------------------------------------------------------------------------


@_with_options(optimise)
def reconstruct_content(content: Tensor, layers: Layers = CONTENT_LAYER, **options) -> Result:
    """Optimise an image to match the feature maps of `content` at `layers`.

    content: (1, 3, H, W) in [0, 1]; the result has its size. options: those of `optimise` and `Run`.
    """
    return optimise(Task(content, None, layers, style_weight=0.0), **options)


@_with_options(optimise)
def synthesize_texture(
    style: Styles, layers: Layers | Mapping[str, float] = STYLE_LAYERS, *, shape: tuple[int, int] | None = None,
    **options,
) -> Result:  # fmt: skip
    """Optimise an image to match the Gram matrices of `style` at `layers` ([texture]).

    style: (1, 3, H, W) in [0, 1], or several as in `transfer_style`; shape: (H, W) of the result, by default that of
    the first style. options: those of `optimise` and `Run`. The total in `history` is 1e4 * style loss, as in a
    transfer.
    """
    return optimise(Task(None, style, (), layers, content_weight=0.0), shape, **options)


@_with_options(optimise)
def transfer_style(
    content: Tensor, style: Styles, content_layers: Layers = CONTENT_LAYER,
    style_layers: Layers | Mapping[str, float] = STYLE_LAYERS, content_weight: float = CONTENT_WEIGHT,
    style_weight: float = STYLE_WEIGHT, **options,
) -> Result:  # fmt: skip
    """Optimise an image to match the feature maps of `content` and the Gram matrices of `style` ([style], eq. 7).

    content, style: (1, 3, H, W) in [0, 1], of any sizes; the result has the size of the content. Several styles are
    blended, or each fills its mask: [Style(sky, mask=m), Style(sea, mask=1 - m)]. style_layers: names, or {name: w_l}.
    options: those of `optimise` and `Run`, such as init="noise" or "content", seed, evaluations.
    """
    return optimise(Task(content, style, content_layers, style_layers, content_weight, style_weight), **options)
