"""The losses in two parts: statistics of feature maps, which are sums over positions, and losses from statistics.

The statistics of an image's tiles add up to those of the whole. The formulas are those of `nst_utils`, to which the
tests hold them equal; here they are fast.


Several styles: blended where they share a mask, each in its own region where their masks differ.

A Gram matrix is a mean over positions, so a mask m makes it a weighted mean, F diag(m) F^T / (C sum m); see Gatys et
al. 2017, Controlling Perceptual Factors in Neural Style Transfer, equation 5. And several styles with one mask are one
target: sum_k b_k |G - G_k|^2 is |G - sum_k b_k G_k|^2 plus a constant, if the b_k add up to 1.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Shape
from .vgg import stride


class _GramSum(torch.autograd.Function):
    """F F^T with its gradient by hand: autograd would compute both halves of a symmetric gradient, at twice the cost,
    and lay it out by channels where the network works by pixels, which costs more still.

    halo: indices of strips of the feature map that do not count; to cut them off, the rest would have to be copied.
    mask: F diag(m) F^T in place of F F^T; None, or an object with `box`, an index of the feature map beyond which m is
    0, as it is in the halo, and `root`, sqrt(m) within it, (h, w).
    """

    @staticmethod
    def forward(ctx, feature_map, halo, mask):
        ctx.save_for_backward(feature_map)
        ctx.halo, ctx.mask = halo, mask
        if mask:
            return products(feature_map[mask.box] * mask.root)
        return products(feature_map) - sum(products(feature_map[strip]) for strip in halo)

    @staticmethod
    def backward(ctx, gradient):
        (feature_map,), mask = ctx.saved_tensors, ctx.mask
        part = feature_map[mask.box] * mask.root if mask else feature_map
        rows = part.flatten(2).squeeze(0)
        found = (rows.T @ (gradient + gradient.T).to(rows.dtype)).T.view_as(part)
        if not mask:
            return zero_halo(found, ctx.halo), None, None
        whole = torch.zeros_like(feature_map)
        whole[mask.box] = found.mul_(mask.root)
        return whole, None, None


def products(feature_map: Tensor) -> Tensor:
    """F F^T, (C, C), of the (C, h w) rows F of a feature map (1, C, h, w)."""
    rows = feature_map.flatten(2).squeeze(0)
    if rows.dtype != torch.float16:
        return (rows @ rows.T).to(_at_least_float32(rows))
    if rows.is_cuda:  # float16 ends at 65,504, where sums over an image do not
        return torch.mm(rows, rows.T, out_dtype=torch.float32)
    return rows.float() @ rows.float().T


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
    maps: dict, content_targets: dict, style_layers: Iterable[str], sizes: dict,
    halo: Callable = lambda layer: (), masks: Callable = lambda layer: [None],
) -> list[Tensor]:  # fmt: skip
    """What the losses need of feature maps, {layer: (1, C, h, w)}, of an image or of one tile.

    For each content layer the sum of squared errors, a scalar; then for each style layer and each of its masks m the
    matrix F diag(m) F^T, (C, C), with F the (C, h w) rows of the feature map. The first are divided by the size C h w
    that the layer's feature map has for the whole image, {layer: size}, the others by C sum m, so that those of the
    tiles add up to those of the whole. halo: the function layer -> indices of the strips of its feature map that belong
    to other tiles. masks: layer -> for each region None, for m = 1, or a mask as `_GramSum` takes it, with its `mean`
    over the whole image, above 0.
    """
    errors = {name: zero_halo(maps[name] - target, halo(name)) for name, target in content_targets.items()}
    squares = [_SquareSum.apply(error) / sizes[name] for name, error in errors.items()]
    return squares + [
        _GramSum.apply(maps[name], halo(name), mask) / (sizes[name] * (mask.mean if mask else 1.0))
        for name in style_layers
        for mask in masks(name)
    ]


class Target(NamedTuple):
    """What the Gram matrix of a layer in one region is to match."""

    grams: dict  # {the number of a style: its Gram matrix (C, C)}, to be blended
    layer: int  # the number of the layer
    share: float  # of the image that the region has, by which its loss counts


def losses_from(statistics: list[Tensor], style_targets: list[Target], weights: Tensor, layers: int) -> Tensor:
    """The losses (total, content, style), a tensor of three numbers, from `statistics_of` the whole image.

    style_targets: a `Target` for each Gram matrix. weights: a tensor of the content weight, the style weight, one
    weight for each of so many style `layers`, the paper's w_l, and one for each style, its share of the blend.
    total = content weight * content + style weight * style. Unlike Gatys et al. 2017, who leave it to the user, a
    region counts by its share of the image: a small one is matched no better than a large one at its expense.
    """
    content_weight, style_weight, *others = weights
    layer_weights, blend = others[:layers], others[layers:]
    split = len(statistics) - len(style_targets)
    zero = statistics[0].new_zeros(())  # for a loss without layers
    style = zero
    for gram, target in zip(statistics[split:], style_targets):
        wanted = sum(blend[k] * each for k, each in target.grams.items())
        style = style + target.share * layer_weights[target.layer] * mean_square(gram - wanted)
    content = sum(statistics[:split], zero)
    return torch.stack([content_weight * content + style_weight * style, content.detach(), style.detach()])


def mean_square(x: Tensor) -> Tensor:
    return _SquareSum.apply(x) / x.numel()


def resize_mask(mask: Tensor | None, shape: Shape) -> Tensor | None:
    """Scale a mask (H, W) to `shape`."""
    if mask is None or tuple(mask.shape) == tuple(shape):
        return mask
    return F.interpolate(mask[None, None], shape, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def average(mask: Tensor, layer: str) -> Tensor:
    """A mask (H, W) at the resolution of a layer: the mean over the pixels of each of its positions."""
    return F.avg_pool2d(mask[None], stride(layer))[0]


def share_of(mask: Tensor | None, layer: str) -> float:
    """The share of the image that a mask leaves at a layer."""
    return 1.0 if mask is None else average(mask, layer).mean().item()


class Mask(NamedTuple):
    """A mask in the feature map that a layer has for one tile, without what the tile's halo covers."""

    box: tuple  # the index of the rows and columns beyond which it is 0
    root: Tensor  # its square root within them: F diag(m) F^T is the product of F sqrt(m) with itself
    mean: float  # its mean over the whole image; where that is 0, the least number above


def mask_of(mask: Tensor | None, tile, layer: str, dtype: torch.dtype, share: float) -> Mask | None:
    """The `Mask` of a `Tile` at a layer; mask: (H, W), as large as the image; share: its `share_of`."""
    if mask is None:
        return None
    part = average(mask[tile.window], layer)
    for strip in tile.halo(stride(layer)):
        part[strip] = 0
    rows, columns = (_span(part.amax(dim)) if part.numel() else slice(0, 0) for dim in (1, 0))
    box = (..., rows, columns)
    return Mask(box, part[box].sqrt().to(dtype), max(share, torch.finfo(torch.float32).tiny))


def _span(values):
    found = values.nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)
