"""Neural style transfer by optimisation: what the notebooks call, in reading order.

A picture is a float32 tensor of shape (1, 3, H, W), RGB, with values in [0, 1]. First the losses, as the papers write
them. Then the search for a picture that makes them small, and the three tasks: content reconstruction, texture
synthesis, style transfer. How the search is made fast is told in the package `nst_engine`, whose first page has its
map; it computes the same losses faster, and the tests hold both equal.

Papers named in the docstrings
    [VGG]      Simonyan & Zisserman 2014, Very Deep Convolutional Networks
    [texture]  Gatys, Ecker & Bethge 2015, Texture Synthesis Using Convolutional Neural Networks
    [style]    Gatys, Ecker & Bethge 2016, Image Style Transfer Using Convolutional Neural Networks
"""

import os
import time
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from nst_engine.checks import as_layers, as_positive, as_shape, as_start, as_task, as_whole, check_feature_map
from nst_engine.coarse_to_fine import Step
from nst_engine.figures import display_figure, plot_losses, show_images
from nst_engine.layers import CONVOLUTIONS, FIRST_FIVE, RELUS, layer_name
from nst_engine.network import features, load_vgg19
from nst_engine.pictures import (
    IMAGES,
    Difference,
    difference_map,
    difference_numbers,
    load_image,
    pick_device,
    resize,
    to_pil,
)
from nst_engine.preparation import Preparation, Task
from nst_engine.stopping import note_interrupt, refuse_after_interrupt

__all__ = [
    "IMAGES",
    "load_image",
    "to_pil",
    "resize",
    "pick_device",
    "difference_map",
    "difference_numbers",
    "Difference",
    "CONVOLUTIONS",
    "RELUS",
    "FIRST_FIVE",
    "layer_name",
    "load_vgg19",
    "features",
    "gram_matrix",
    "gram_matrices",
    "content_loss",
    "style_loss",
    "make_objective",
    "Task",
    "as_task",
    "as_whole",
    "as_layers",
    "Preparation",
    "Step",
    "Result",
    "optimise",
    "reconstruct_content",
    "synthesize_texture",
    "transfer_style",
    "show_images",
    "plot_losses",
    "display_figure",
]

# --- Losses --------------------------------------------------------------------------------------


def gram_matrix(feature_map):
    """Gram matrix of a feature map (1, C, h, w): (C, C), `F F^T / (C h w)` with F the (C, h w) rows.

    Which channels are active together, averaged over positions ([texture], equation 1, there a sum). Raises ValueError
    for anything but one picture's map.
    """
    check_feature_map(feature_map)
    rows = feature_map[0].flatten(1)
    return rows @ rows.T / rows.numel()


def gram_matrices(maps):
    """{layer: feature map (1, C, h, w)} -> {layer: Gram matrix (C, C)}."""
    return {name: gram_matrix(feature_map) for name, feature_map in maps.items()}


def content_loss(maps, targets):
    """Mean squared error of two pictures' feature maps, summed over layers ([style], equation 1, there half the sum).

    maps, targets: {layer: (1, C, h, w)} as `features` gives them, of equal shapes.
    """
    return sum((maps[name] - target).square().mean() for name, target in targets.items())


def style_loss(maps, targets, layer_weights=None):
    """Mean squared error of Gram matrices, summed over layers ([style], equations 4 and 5).

    maps: {layer: (1, C, h, w)}; targets: {layer: (C, C)}, the Gram matrices to reach; layer_weights: {layer: number},
    the paper's w_l, by default 1 each. The paper divides the sum of squares by 4 where we divide by C^2, so it gives
    wide layers more weight.
    """
    weights = layer_weights or dict.fromkeys(targets, 1.0)
    return sum(weights[name] * (gram_matrix(maps[name]) - gram).square().mean() for name, gram in targets.items())


def make_objective(vgg, content, style, content_layers, style_layers, content_weight, style_weight):
    """What a style transfer minimises ([style], equation 7): the function picture -> tensor (total, content, style).

    Either picture may be None when it has no layers. The targets are computed here, once.
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


# --- The search ----------------------------------------------------------------------------------


class Result(NamedTuple):
    """What an optimisation gives back."""

    image: torch.Tensor  # (1, 3, H, W) in [0, 1]
    history: list  # one `Step` an evaluation
    evaluations: int
    seconds: float  # of optimisation alone


def optimise(
    task,
    shape=None,
    *,
    init="noise",
    seed=0,
    evaluations=225,
    coarse_to_fine=True,
    vgg=None,
    precision=None,
    memory=None,
    progress=True,
    callback=None,
):
    """Minimise the loss of a `Task` over pictures of `shape` (H, W), by default the content's, or a texture's style's.

    init: "noise" (soft clouds around grey, drawn from `seed`), "content", or a picture to start from, which is scaled
    to `shape`; white noise is `torch.rand(1, 3, H, W)`.
    evaluations: how many times the network is run forward and back, at most, over all scales; it ends sooner when ten
    of them lower the loss by less than 0.5 %, or move fewer than one pixel in a thousand by 1/255. A scale of more than
    512 x 1024 pixels has fewer. Coarse scales come first unless `coarse_to_fine` is False; from a picture, only those
    of 512 pixels and more. vgg: from `load_vgg19`, which is the default. precision: "float32" or "bfloat16"; by default
    bfloat16 where that is fast, and float32 from where rounding would stop it. memory: GiB that the process may take on
    the device, by default what is free. A picture too large for it is worked on in tiles: the same losses, in up to 1.6
    times the time.
    progress: show a bar. callback(image, step): called after each evaluation with the best picture so far of its scale
    and precision, and the `Step`. An interrupt (the notebook's stop button) ends the run and returns that picture; no
    further run of the same cell begins. Returns a `Result`. Raises ValueError for bad input, and for a size that the
    device has no memory for.
    """
    refuse_after_interrupt()
    task, evaluations = as_task(task), as_whole(evaluations, "evaluations")
    shape = as_shape(task.picture.shape[-2:] if shape is None else shape)
    init, seed = as_start(init, seed, task)
    device = task.picture.device
    memory = None if memory is None else as_positive(memory, "memory", " of GiB")
    preparation = Preparation(vgg or load_vgg19(device=device), device, precision, memory)
    image, scales = preparation.start(task, shape, init, seed, coarse_to_fine)
    run = preparation.run(task, image, scales, evaluations, seed, init)
    history, start = [], time.perf_counter()
    silent = not progress or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks passes by
    with tqdm(total=evaluations, disable=silent, leave=False, desc="optimising") as bar:
        try:
            for image, step in run:
                history.append(step)
                bar.update()
                if callback:
                    callback(image, step)
        except KeyboardInterrupt:
            if not history:
                raise
            note_interrupt()  # the present picture is the answer
    return Result(resize(image, shape).detach().clone(), history, len(history), time.perf_counter() - start)


# --- The three tasks -----------------------------------------------------------------------------


def reconstruct_content(content, layers="conv1_2", **options):
    """Search for a picture with the feature maps of `content` at `layers`, a name or several.

    content: (1, 3, H, W) in [0, 1]; the result has its size. options: those of `optimise`. Returns a `Result`.
    """
    task = Task(content, None, layers, {}, content_weight=1.0, style_weight=0.0)
    return optimise(task, **options)


def synthesize_texture(style, layers=FIRST_FIVE, *, shape=None, **options):
    """Search for a picture with the Gram matrices of `style` at `layers`, a name or several ([texture]).

    style: (1, 3, H, W) in [0, 1]; shape: (H, W) of the result, by default the style's. options: those of
    `optimise`. Returns a `Result`. `history`'s total is 1e4 * style loss, as in a transfer.
    """
    task = Task(None, style, (), dict.fromkeys(as_layers(layers), 1.0), content_weight=0.0, style_weight=1e4)
    return optimise(task, shape, **options)


def transfer_style(
    content,
    style,
    content_layers=("conv1_2",),
    style_layers=FIRST_FIVE,
    content_weight=1.0,
    style_weight=1e4,
    **options,
):
    """Search for a picture with the feature maps of `content` and the Gram matrices of `style` ([style], eq. 7).

    content, style: (1, 3, H, W) in [0, 1], of any two sizes; the result has the content's. options: those of
    `optimise`, such as init="noise" or "content", seed, evaluations. Returns a `Result`.
    """
    style_layers = dict.fromkeys(as_layers(style_layers), 1.0)
    task = Task(content, style, content_layers, style_layers, content_weight, style_weight)
    return optimise(task, **options)
