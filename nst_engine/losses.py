"""The losses in two steps: sums over the positions of feature maps, and losses made of these sums.

Sums of a picture's parts add up to those of the whole. The formulas are those of `nst_utils`, to which the tests hold
them equal; here they are fast.
"""

from typing import NamedTuple

import torch


class Statistics(NamedTuple):
    """What the losses know of a picture: sums over the positions of its feature maps."""

    squares: dict  # {content layer: the squared differences to the content's feature map, summed}
    grams: dict  # {style layer: F F^T, (C, C), with F the (C, h w) rows of the feature map}


class _GramSum(torch.autograd.Function):
    """F F^T by hand: autograd would form both halves of a gradient that is symmetric, at twice the cost, and lay it
    out by channels where the network works by pixels, which costs more still."""

    @staticmethod
    def forward(ctx, feature_map):
        ctx.save_for_backward(feature_map)
        rows = feature_map.flatten(2).squeeze(0)
        return (rows @ rows.T).to(_precise(rows))

    @staticmethod
    def backward(ctx, gradient):
        (feature_map,) = ctx.saved_tensors
        rows = feature_map.flatten(2).squeeze(0)
        return (rows.T @ (gradient + gradient.T).to(rows.dtype)).T.view_as(feature_map)


class _SquareSum(torch.autograd.Function):
    """The sum of squares in float32, without a float32 copy of a bfloat16 feature map, the largest array here."""

    @staticmethod
    def forward(ctx, gap):
        ctx.save_for_backward(gap)
        return torch.linalg.vector_norm(gap, dtype=_precise(gap)).square()

    @staticmethod
    def backward(ctx, gradient):
        (gap,) = ctx.saved_tensors
        return gap * (2 * gradient).to(gap.dtype)


def _precise(x):
    return torch.promote_types(x.dtype, torch.float32)


def measure(maps, content_targets, style_layers):
    """The `Statistics` of a picture's feature maps, {layer: (1, C, h, w)}."""
    squares = {name: _SquareSum.apply(maps[name] - target) for name, target in content_targets.items()}
    return Statistics(squares, {name: _GramSum.apply(maps[name]) for name in style_layers})


def gram_matrices(maps):
    """{layer: feature map (1, C, h, w)} -> {layer: Gram matrix F F^T / (C h w), (C, C)}."""
    return {name: gram / maps[name].numel() for name, gram in measure(maps, {}, maps).grams.items()}


def weigh(statistics, sizes, style_targets, weights):
    """(total, content loss, style loss), a tensor of three numbers, from a picture's `Statistics`.

    sizes: {layer: C h w}; style_targets: {layer: Gram matrix (C, C) to reach}; weights: a tensor of the content weight,
    the style weight and one weight for each style layer, the paper's w_l. The total is content_weight * content loss +
    style_weight * style loss.
    """
    content_weight, style_weight, *layer_weights = weights
    errors = {name: gram / sizes[name] - style_targets[name] for name, gram in statistics.grams.items()}
    zero = next(iter((statistics.squares | errors).values())).new_zeros(())  # for a loss without layers
    content = sum((square / sizes[name] for name, square in statistics.squares.items()), zero)
    style = sum((weight * mean_square(error) for weight, error in zip(layer_weights, errors.values())), zero)
    return torch.stack([content_weight * content + style_weight * style, content.detach(), style.detach()])


def mean_square(x):
    return _SquareSum.apply(x) / x.numel()
