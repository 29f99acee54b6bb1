"""The losses in two steps: statistics of feature maps, which are sums over positions, then losses from statistics.

The statistics of an image's tiles add up to those of the whole image. The formulas are those of `nst_utils`, in a
faster form; tests check that both agree.

A Gram matrix is a mean over positions, so a mask m makes it a weighted mean, F diag(m) F^T / (C sum m): see Gatys et
al. 2017, Controlling Perceptual Factors in Neural Style Transfer, equation 5. Several styles with the same mask act as
one target: sum_k b_k |G - G_k|^2 is |G - sum_k b_k G_k|^2 plus a constant if the b_k add up to 1.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Shape


class Statistics(NamedTuple):
    """What the losses need from an image, or the part that one tile contributes."""

    content: list[Tensor]  # the mean squared error, a scalar, for each content layer
    grams: list[Tensor]  # the Gram matrix (C, C), for each style layer and, within it, for each region


class Weights(NamedTuple):
    """The weights of a total loss, as tensors, so that a captured CUDA graph can read new ones."""

    content: Tensor  # scalar
    style: Tensor  # scalar
    layers: Tensor  # (style layers,), the paper's w_l
    blend: Tensor  # (styles,), each style's share of its region


class Target(NamedTuple):
    """The target for the Gram matrix of one style layer in one region."""

    grams: dict[int, Tensor]  # {index of a style: its Gram matrix (C, C)}, to be blended
    layer: int  # index of the layer among the style layers
    share: float  # the region's share of the image, the weight of its loss


class Mask(NamedTuple):
    """A region's mask in the feature map of one tile, 0 in the tile's halo."""

    box: tuple  # index of its bounding box: the mask is 0 outside these rows and columns
    root: Tensor  # its square root in the box, (h, w): F diag(m) F^T is the product of F sqrt(m) with its transpose
    mean: float  # its mean over the whole image, above 0


def losses_from(statistics: Statistics, targets: Iterable[Target], weights: Weights) -> Tensor:
    """The losses (total, content, style), a tensor of three numbers, from the `Statistics` of a whole image.

    targets: one for each Gram matrix. total = content weight * content + style weight * style. A region's loss is
    weighted by its share of the image; otherwise a small region would be matched at the expense of a large one. Gatys
    et al. 2017 leave these weights to the user.
    """
    zero = (statistics.content or statistics.grams)[0].new_zeros(())  # for a loss without layers
    style = zero
    for gram, target in zip(statistics.grams, targets):
        wanted = sum(weights.blend[k] * matrix for k, matrix in target.grams.items())
        error = gram - wanted
        style = style + target.share * weights.layers[target.layer] * (square_sum(error) / error.numel())
    content = sum(statistics.content, zero)
    total = weights.content * content + weights.style * style
    return torch.stack([total, content.detach(), style.detach()])


# --- Sums over positions -------------------------------------------------------------------------


def zero_halo(x: Tensor, halo: Iterable[tuple]) -> Tensor:
    """Set the strips of the halo to 0 in place, and return `x`."""
    for strip in halo:
        x.detach()[strip] = 0  # detached: autograd does not need the old values
    return x


class SquareSum(torch.autograd.Function):
    """The sum of squares, in float32 or better.

    It makes no float32 copy of a bfloat16 feature map, the largest array of a run.
    """

    @staticmethod
    def forward(ctx, error):
        ctx.save_for_backward(error)
        return torch.linalg.vector_norm(error, dtype=_at_least_float32(error)).square()

    @staticmethod
    def backward(ctx, gradient):
        (error,) = ctx.saved_tensors
        return error * (2 * gradient).to(error.dtype)


class GramSum(torch.autograd.Function):
    """F F^T of a feature map (1, C, h, w) without the strips `halo`, or F diag(m) F^T with a mask: (C, C).

    The gradient is written by hand: autograd would compute both halves of a symmetric gradient, at twice the cost, and
    return it channels first to a network that is channels last, which costs even more. The halo's products are
    subtracted, since slicing the halo off would copy the rest.
    """

    @staticmethod
    def forward(ctx, feature_map, halo, mask):
        ctx.save_for_backward(feature_map)
        ctx.halo, ctx.mask = halo, mask
        if mask:
            return _products(feature_map[mask.box] * mask.root)
        return _products(feature_map) - sum(_products(feature_map[strip]) for strip in halo)

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


square_sum, gram_sum = SquareSum.apply, GramSum.apply


def _products(feature_map):
    """F F^T, (C, C), with F the (C, h w) rows of a feature map (1, C, h, w)."""
    rows = feature_map.flatten(2).squeeze(0)
    return (rows @ rows.T).to(_at_least_float32(rows))


def _at_least_float32(x):
    return torch.promote_types(x.dtype, torch.float32)


# --- Masks ---------------------------------------------------------------------------------------


def resize_mask(mask: Tensor | None, shape: Shape) -> Tensor | None:
    """Scale a mask (H, W) to `shape`."""
    if mask is None or tuple(mask.shape) == tuple(shape):
        return mask
    return F.interpolate(mask[None, None], shape, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)


def average(mask: Tensor, stride: int) -> Tensor:
    """A mask (H, W) at the resolution of a layer: the mean over the pixels of each position."""
    return F.avg_pool2d(mask[None], stride)[0]


def share_of(mask: Tensor | None, stride: int) -> float:
    """The share of a layer's positions that a mask selects, that is its mean; 1 without a mask."""
    return 1.0 if mask is None else average(mask, stride).mean().item()


def tile_mask(mask: Tensor | None, tile, stride: int, dtype: torch.dtype) -> Mask | None:
    """The `Mask` of a `Tile` at layers of this stride, from a mask (H, W) of the whole image."""
    if mask is None:
        return None
    part = zero_halo(average(mask[tile.window], stride), tile.halo(stride))
    box = ..., _extent(part.any(1)), _extent(part.any(0))
    mean = max(share_of(mask, stride), torch.finfo(torch.float32).tiny)
    return Mask(box, part[box].sqrt().to(dtype), mean)


def _extent(values):
    found = values.nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)
