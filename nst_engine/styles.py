"""Several styles: blended where they share a mask, each in its own region where their masks differ.

A Gram matrix is a mean over positions, so a mask m makes it a weighted mean, F diag(m) F^T / (C sum m); see Gatys et
al. 2017, Controlling Perceptual Factors in Neural Style Transfer, equation 5. And several styles with one mask are one
target: sum_k b_k |G - G_k|^2 is |G - sum_k b_k G_k|^2 plus a constant, if the b_k add up to 1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Shape, stride


class Style(NamedTuple):
    """One style of several: an image, how much of it, and where.

    Styles with equal masks are blended by their weights. Masks are floats (H, W) in [0, 1], of any size; they may
    overlap, and where none is above 0 no style is asked for.
    """

    image: Tensor  # (1, 3, H, W) in [0, 1]
    weight: float = 1.0  # beside the other styles with an equal mask
    mask: Tensor | None = None  # where in the result; None: everywhere
    image_mask: Tensor | None = None  # which part of its own image counts; None: all of it


def as_styles(style: Tensor | Style | Iterable | None) -> tuple[Style, ...]:
    """What a task has as `style`, nothing, one or several, as `Style`s."""
    if style is None:
        return ()
    several = [style] if isinstance(style, Tensor | Style) else style
    return tuple(each if isinstance(each, Style) else Style(each) for each in several)


def regions(styles: Sequence[Style]) -> list[list[int]]:
    """The styles by their numbers, those of one mask together."""
    found = {}
    for k, style in enumerate(styles):
        found.setdefault(id(style.mask), []).append(k)
    return [*found.values()]


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two images or masks hold the same, or neither is there."""
    return a is b or (a is not None and b is not None and a.device == b.device and torch.equal(a, b))


def with_shared_masks(styles: Sequence[Style]) -> tuple[Style, ...]:
    """The same styles; where masks are equal, one tensor stands for them, by which `regions` knows them."""
    masks = []
    for style in styles:
        masks.append(next((mask for mask in masks if equal(mask, style.mask)), style.mask))
    return tuple(style._replace(mask=mask) for style, mask in zip(styles, masks))


def blending(styles: Sequence[Style]) -> list[float]:
    """The weight of each style as a share of its region's."""
    shares = [0.0] * len(styles)
    for members in regions(styles):
        total = sum(styles[k].weight for k in members)
        for k in members:
            shares[k] = styles[k].weight / total
    return shares


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
    for strip in tile.halo(layer):
        part[strip] = 0
    rows, columns = (_span(part.amax(dim)) if part.numel() else slice(0, 0) for dim in (1, 0))
    box = (..., rows, columns)
    return Mask(box, part[box].sqrt().to(dtype), max(share, torch.finfo(torch.float32).tiny))


def _span(values):
    found = values.nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)
