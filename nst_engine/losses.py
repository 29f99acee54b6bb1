"""The losses in two parts: statistics of feature maps, which are sums over positions, and losses from statistics.

The statistics of an image's tiles add up to those of the whole. The formulas are those of `nst_utils`, to which the
tests hold them equal; here they are fast.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class _GramSum(torch.autograd.Function):
    """F F^T with its gradient by hand: autograd would compute both halves of a symmetric gradient, at twice the cost,
    and lay it out by channels where the network works by pixels, which costs more still.

    halo: indices of strips of the feature map that do not count; to cut them off, the rest would have to be copied.
    """

    @staticmethod
    def forward(ctx, feature_map, halo):
        ctx.save_for_backward(feature_map)
        ctx.halo = halo
        return products(feature_map) - sum(products(feature_map[strip]) for strip in halo)

    @staticmethod
    def backward(ctx, gradient):
        (feature_map,) = ctx.saved_tensors
        rows = feature_map.flatten(2).squeeze(0)
        found = (rows.T @ (gradient + gradient.T).to(rows.dtype)).T.view_as(feature_map)
        return zero_halo(found, ctx.halo), None


def products(feature_map: Tensor) -> Tensor:
    """F F^T, (C, C), of the (C, h w) rows F of a feature map (1, C, h, w)."""
    rows = feature_map.flatten(2).squeeze(0)
    return (rows @ rows.T).to(_at_least_float32(rows))


def zero_halo(x: Tensor, halo: Iterable) -> Tensor:
    """`x`, in which the strips of the halo have become 0."""
    for strip in halo:
        x.detach()[strip] = 0  # unseen by autograd, which needs nothing of what was there
    return x


class _SquareSum(torch.autograd.Function):
    """The sum of squares in float32, without a float32 copy of a bfloat16 feature map, the largest array here."""

    @staticmethod
    def forward(ctx, error):
        ctx.save_for_backward(error)
        return torch.linalg.vector_norm(error, dtype=_at_least_float32(error)).square()

    @staticmethod
    def backward(ctx, gradient):
        (error,) = ctx.saved_tensors
        return error * (2 * gradient).to(error.dtype)


def _at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


def statistics_of(
    maps: dict, content_targets: dict, style_layers: Iterable[str], sizes: dict, halo: Callable = lambda layer: ()
) -> list[Tensor]:
    """What the losses need of feature maps, {layer: (1, C, h, w)}, of an image or of one tile.

    For each content layer the sum of squared errors, a scalar; then for each style layer F F^T, (C, C), with F the
    (C, h w) rows of the feature map. All are divided by the size C h w that the layer's feature map has for the whole
    image, {layer: size}, so that those of the tiles add up to those of the whole. halo: the function layer -> indices
    of the strips of its feature map that belong to other tiles.
    """
    errors = {name: zero_halo(maps[name] - target, halo(name)) for name, target in content_targets.items()}
    squares = [_SquareSum.apply(error) / sizes[name] for name, error in errors.items()]
    return squares + [_GramSum.apply(maps[name], halo(name)) / sizes[name] for name in style_layers]


def losses_from(statistics: list[Tensor], style_targets: dict, weights: Tensor) -> Tensor:
    """The losses (total, content, style), a tensor of three numbers, from `statistics_of` the whole image.

    style_targets: {layer: Gram matrix (C, C) to match}. weights: a tensor of the content weight, the style weight and
    one weight for each style layer, the paper's w_l. total = content weight * content + style weight * style.
    """
    content_weight, style_weight, *layer_weights = weights
    split = len(statistics) - len(style_targets)
    zero = statistics[0].new_zeros(())  # for a loss without layers
    content = sum(statistics[:split], zero)
    errors = [gram - target for gram, target in zip(statistics[split:], style_targets.values())]
    style = sum((weight * mean_square(error) for weight, error in zip(layer_weights, errors)), zero)
    return torch.stack([content_weight * content + style_weight * style, content.detach(), style.detach()])


def mean_square(x: Tensor) -> Tensor:
    return _SquareSum.apply(x) / x.numel()
