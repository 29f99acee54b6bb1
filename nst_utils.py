"""Neural style transfer by optimisation: what the notebooks call, in reading order.

An image is a float32 tensor of shape (1, 3, H, W), RGB, with values in [0, 1]. First the losses, as the papers write
them. Then the optimisation of an image that makes them small, and the three tasks: content reconstruction, texture
synthesis, style transfer. The package `style_transfer.engine` computes the same losses faster; tests hold both equal.

Papers named in the docstrings
    [VGG]      Simonyan & Zisserman 2014, Very Deep Convolutional Networks
    [texture]  Gatys, Ecker & Bethge 2015, Texture Synthesis Using Convolutional Neural Networks
    [style]    Gatys, Ecker & Bethge 2016, Image Style Transfer Using Convolutional Neural Networks
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from IPython import get_ipython
from torch import Tensor, nn
from tqdm.auto import tqdm

from style_transfer.engine.checks import UserError, as_whole, check_feature_map, file_version, sentence
from style_transfer.engine.figures import (
    Recorder,
    draw_losses,
    film_of,
    filmstrip,
    image_grid,
    image_table,
    jpeg,
    plot_losses,
    show,
)
from style_transfer.engine.images import (
    IMAGES,
    Difference,
    difference_map,
    difference_numbers,
    is_picture,
    keep_colours,
    load_image,
    load_mask,
    resize,
    to_pil,
)
from style_transfer.engine.objective import Style, Task, as_task
from style_transfer.engine.run import Run, Step
from style_transfer.engine.saving import joint_stem, write_new, write_numbered
from style_transfer.engine.vgg import (
    CONVOLUTIONS,
    FIRST_FIVE,
    RELUS,
    as_layers,
    check_network,
    features,
    layer_name,
    load_vgg19,
)

# fmt: off
__all__ = [
    "IMAGES", "load_image", "load_mask", "to_pil", "resize", "difference_map", "difference_numbers", "Difference",
    "keep_colours",
    "CONVOLUTIONS", "RELUS", "FIRST_FIVE", "layer_name", "load_vgg19", "features",
    "gram_matrix", "gram_matrices", "content_loss", "style_loss", "make_objective",
    "Task", "Style", "Run", "Step", "Result", "optimise", "reconstruct_content", "synthesize_texture", "transfer_style",
    "show", "image_grid", "image_table", "plot_losses", "filmstrip", "Recorder", "film_of", "jpeg", "draw_losses",
    "UserError", "sentence", "as_task", "as_whole", "as_layers", "check_network",
    "is_picture", "file_version", "joint_stem", "write_new", "write_numbered",
]
# fmt: on

# --- Losses --------------------------------------------------------------------------------------


def gram_matrix(feature_map: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gram matrix of a feature map (1, C, h, w): (C, C), `F F^T / (C h w)` with F the (C, h w) rows.

    Which channels are active together, averaged over positions. Unlike Gatys et al. ([texture], equation 1), who sum.
    With a mask m (h, w) in [0, 1] the average is weighted: `F diag(m) F^T / (C sum m)`. Raises UserError for anything
    but one image's feature map.
    """
    check_feature_map(feature_map)
    rows = feature_map[0].flatten(1)
    if mask is None:
        return rows @ rows.T / rows.numel()
    if mask.shape != feature_map.shape[-2:]:
        shape = tuple(feature_map.shape[-2:])
        raise UserError(f"the mask is {tuple(mask.shape)} and the feature map {shape}: give one of that shape")
    return rows * mask.flatten() @ rows.T / (len(rows) * mask.sum())


def gram_matrices(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{layer: feature map (1, C, h, w)} -> {layer: Gram matrix (C, C)}."""
    return {name: gram_matrix(feature_map) for name, feature_map in maps.items()}


def content_loss(maps: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of two images' feature maps, summed over layers.

    Unlike Gatys et al. ([style], equation 1), who take half the sum of squares. maps, targets: {layer: (1, C, h, w)} as
    `features` gives them, of equal shapes.
    """
    return sum((maps[name] - target).square().mean() for name, target in targets.items())


def style_loss(
    maps: Mapping[str, Tensor], targets: Mapping[str, Tensor], layer_weights: Mapping[str, float] | None = None
) -> Tensor:
    """Mean squared error of Gram matrices, summed over layers ([style], equations 4 and 5).

    maps: {layer: (1, C, h, w)}; targets: {layer: (C, C)}, the Gram matrices to match; layer_weights: {layer: number},
    the paper's w_l, by default 1 each. Unlike Gatys et al., who divide the sum of squares by 4 where we divide by C^2,
    and so give wide layers more weight.
    """
    weights = layer_weights or dict.fromkeys(targets, 1.0)
    return sum(weights[name] * (gram_matrix(maps[name]) - gram).square().mean() for name, gram in targets.items())


def make_objective(
    vgg: nn.Sequential, content: Tensor | None, style: Tensor | None, content_layers: Iterable[str],
    style_layers: Iterable[str], content_weight: float, style_weight: float,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """What a style transfer minimises ([style], equation 7): the function image -> tensor (total, content, style).

    content and style: (1, 3, H, W), or None without layers. The targets are computed here, once.
    """
    with torch.no_grad():
        content_targets = features(vgg, content, content_layers) if content_layers else {}
        style_targets = gram_matrices(features(vgg, style, style_layers)) if style_layers else {}

    def objective(image):
        maps = features(vgg, image, {**content_targets, **style_targets})
        zero = image.new_zeros(())  # for a loss without layers
        content_part = zero + content_loss(maps, content_targets)
        style_part = zero + style_loss(maps, style_targets)
        return torch.stack([content_weight * content_part + style_weight * style_part, content_part, style_part])

    return objective


# --- The optimisation ----------------------------------------------------------------------------


class Result(NamedTuple):
    """What an optimisation gives back."""

    image: Tensor  # (1, 3, H, W) in [0, 1]
    history: list  # one `Step` per evaluation
    evaluations: int
    seconds: float  # of optimisation alone
    times: list  # seconds after each evaluation


def optimise(
    task: Task, shape: tuple[int, int] | None = None, *, progress: bool = True,
    callback: Callable[[Tensor, Step], None] | None = None, **options,
) -> Result:  # fmt: skip
    """Minimise the loss of a `Task` over images of `shape` (H, W), by default the content's, or a texture's style's.

    options: those of `Run`, which documents them: init="noise", seed=0, evaluations=225, coarse_to_fine=True, vgg,
    precision, memory. progress: show a bar. callback(image, step): called after each evaluation with a copy of the best
    image so far at its scale and precision, and the `Step`. An interrupt (the notebook's stop button) ends the run and
    returns that image; no further run of the same cell begins. Raises UserError for bad input, and for a size that
    the device has no memory for.
    """
    if current_cell() in _interrupted:
        raise KeyboardInterrupt
    if not (callback is None or callable(callback)):
        raise UserError(f"callback is {callback!r}: give a function of an image and a Step")
    run = Run(task, shape, **options)
    history, times, start = [], [], time.perf_counter()
    silent = not progress or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks ignores
    with tqdm(total=run.evaluations, disable=silent, leave=False, desc="optimising") as bar:
        try:
            while step := run.step():
                history.append(step)
                times.append(time.perf_counter() - start)
                bar.update()
                if callback:
                    callback(run.image, step)
        except KeyboardInterrupt:
            if not history:
                raise
            _interrupted.update({current_cell()} - {None})
    return Result(resize(run.image, run.shape), history, len(history), time.perf_counter() - start, times)


_interrupted = set()  # notebook cells whose stop button was pressed: it was meant for all runs of the cell


def current_cell() -> int | None:
    """The execution count of the notebook cell that is running; None in a script."""
    shell = get_ipython()
    return shell and shell.execution_count


Styles = Tensor | Style | Sequence  # an image, a `Style`, or several of either

# --- The three tasks -----------------------------------------------------------------------------


def reconstruct_content(content: Tensor, layers: str | Iterable[str] = "conv1_2", **options) -> Result:
    """Optimise an image to match the feature maps of `content` at `layers`, a name or several.

    content: (1, 3, H, W) in [0, 1]; the result has its size. options: those of `optimise` and `Run`.
    """
    task = Task(content, None, layers, {}, content_weight=1.0, style_weight=0.0)
    return optimise(task, **options)


def synthesize_texture(
    style: Styles, layers: str | Iterable[str] = FIRST_FIVE, *, shape: tuple[int, int] | None = None, **options
) -> Result:
    """Optimise an image to match the Gram matrices of `style` at `layers`, a name or several ([texture]).

    style: (1, 3, H, W) in [0, 1], or several as in `transfer_style`; shape: (H, W) of the result, by default the first
    style's. options: those of `optimise` and `Run`. `history`'s total is 1e4 * style loss, as in a transfer.
    """
    task = Task(None, style, (), dict.fromkeys(as_layers(layers), 1.0), content_weight=0.0, style_weight=1e4)
    return optimise(task, shape, **options)


def transfer_style(
    content: Tensor, style: Styles, content_layers: str | Iterable[str] = ("conv1_2",),
    style_layers: str | Iterable[str] = FIRST_FIVE, content_weight: float = 1.0, style_weight: float = 1e4, **options,
) -> Result:  # fmt: skip
    """Optimise an image to match the feature maps of `content` and the Gram matrices of `style` ([style], eq. 7).

    content, style: (1, 3, H, W) in [0, 1], of any two sizes; the result has the content's. Several styles are blended,
    or each keeps to its mask: [Style(sky, mask=m), Style(sea, mask=1 - m)]. options: those of `optimise` and `Run`,
    such as init="noise" or "content", seed, evaluations.
    """
    style_layers = dict.fromkeys(as_layers(style_layers), 1.0)
    task = Task(content, style, content_layers, style_layers, content_weight, style_weight)
    return optimise(task, **options)
