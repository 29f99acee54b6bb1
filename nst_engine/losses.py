"""The losses in two steps: sums over the positions of feature maps, and losses made of these sums.

Sums of a picture's parts add up to those of the whole. The formulas are those of `nst_utils`, to which the tests hold
them equal; here they are fast.
"""

import torch


class _GramSum(torch.autograd.Function):
    """F F^T by hand: autograd would form both halves of a gradient that is symmetric, at twice the cost, and lay it
    out by channels where the network works by pixels, which costs more still.

    outside: indices of strips of the feature map that do not count: cut off, the rest would have to be copied.
    """

    @staticmethod
    def forward(ctx, feature_map, outside):
        ctx.save_for_backward(feature_map)
        ctx.outside = outside
        return products(feature_map) - sum(products(feature_map[strip]) for strip in outside)

    @staticmethod
    def backward(ctx, gradient):
        (feature_map,) = ctx.saved_tensors
        rows = feature_map.flatten(2).squeeze(0)
        found = (rows.T @ (gradient + gradient.T).to(rows.dtype)).T.view_as(feature_map)
        return without(found, ctx.outside), None


def products(feature_map):
    """F F^T of the (C, h w) rows F."""
    rows = feature_map.flatten(2).squeeze(0)
    return (rows @ rows.T).to(_precise(rows))


def without(x, strips):
    """`x`, in which the strips have become 0."""
    for strip in strips:
        x.detach()[strip] = 0  # unseen by autograd, which needs nothing of what was there
    return x


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


def measure(maps, content_targets, style_layers, sizes, outside=lambda name: ()):
    """What the losses know of feature maps, {layer: (1, C, h, w)}, of a picture or a part of it, as a list.

    For each content layer the squared differences to the content's feature map, then for each style layer F F^T,
    (C, C), with F the (C, h w) rows of the feature map: sums over positions, divided by the size C h w that the layer's
    feature map has for the whole picture, {layer: size}. Those of the parts add up to those of the whole. outside:
    the function layer -> indices of the strips of its feature map that are of other parts.
    """
    gaps = {name: without(maps[name] - target, outside(name)) for name, target in content_targets.items()}
    squares = [_SquareSum.apply(gap) / sizes[name] for name, gap in gaps.items()]
    return squares + [_GramSum.apply(maps[name], outside(name)) / sizes[name] for name in style_layers]


def weigh(sums, style_targets, weights):
    """(total, content loss, style loss), a tensor of three numbers, from the list that `measure` gives.

    style_targets: {layer: Gram matrix (C, C) to reach}; weights: a tensor of the content weight, the style weight and
    one weight for each style layer, the paper's w_l. The total is content_weight * content loss + style_weight * style
    loss.
    """
    content_weight, style_weight, *layer_weights = weights
    squares, grams = sums[: len(sums) - len(style_targets)], sums[len(sums) - len(style_targets) :]
    zero = sums[0].new_zeros(())  # for a loss without layers
    content = sum(squares, zero)
    errors = [gram - target for gram, target in zip(grams, style_targets.values())]
    style = sum((weight * mean_square(error) for weight, error in zip(layer_weights, errors)), zero)
    return torch.stack([content_weight * content + style_weight * style, content.detach(), style.detach()])


def mean_square(x):
    return _SquareSum.apply(x) / x.numel()
