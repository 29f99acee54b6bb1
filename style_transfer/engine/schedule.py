"""Coarse to fine: the scales of a run, and how many evaluations each has.

When a run has converged: the loss falls slowly, or nobody sees the image change."""

import math
from typing import NamedTuple

from torch import Tensor

from .checks import Shape
from .images import psnr

EVALUATIONS = 225  # of the network, at most, over all scales, where nothing else is asked for
BROAD = 512  # pixels along the shorter side: a run from an image has no coarser scale
LARGE = 2**19  # pixels, 512 x 1024: a larger scale has fewer evaluations


def plan_scales(shape: Shape, smallest: int) -> list[Shape]:
    """[(height, width), ...], each twice the one before, the last = `shape`.

    The shorter side of the coarsest has `smallest` pixels or more, where `shape` has.
    """
    halvings = max(0, int(math.log2(min(shape) / smallest)))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def limit_evaluations(scales: list[Shape], evaluations: int) -> list[int]:
    """The most evaluations that each scale may have, out of `evaluations` in all.

    Equal shares, of which the last scale may also use what the others leave. A large scale has fewer, by the square
    root of its pixels: the coarser ones have done the work.
    """
    shares = [evaluations // (len(scales) + 1)] * (len(scales) - 1) + [evaluations]
    fewer = [max(1, round(evaluations * min(1, (LARGE / math.prod(scale)) ** 0.5))) for scale in scales]
    return list(map(min, shares, fewer))


# A stage has converged when so many evaluations lower the total loss by less than a share of it:
SLOW = {
    "coarse": (10, 0.1),  # at a coarse scale, whose detail the next one replaces
    "rough": (5, 0.3),  # at full size, when it is asked whether rounding is the cause
    "fine": (10, 0.005),  # at full size, and the run is done
}
# or, but for the question of rounding, when nobody sees the image change: ten evaluations change it by less than half a
# percent of its range, as root mean square, and do not lower the loss to less than this share.
UNSEEN = 46  # dB, as PSNR
FALLING = 0.45
SAMPLE = 2**18  # pixels that are compared
LENGTH = 11  # images in the window

# A coarse scale also ends when its total is below this share of its first one: the next one starts far above that.
COARSE_END = 0.004


class Window(NamedTuple):
    """The latest evaluations, on which the stopping rule decides."""

    first: float | None = None  # the total loss of the first evaluation
    totals: tuple = ()  # of the last eleven
    images: tuple = ()  # (1, 3, h, w), subsampled where large

    def extend(self, image: Tensor, total: float) -> "Window":
        """The window one evaluation later."""
        first = total if self.first is None else self.first
        return Window(first, (*self.totals, total)[-LENGTH:], (*self.images, subsample(image))[-LENGTH:])

    def converged(self, stage: str) -> bool:
        """Whether the rule named above is met: `stage` is "coarse", "rough" or "fine"."""
        if stage == "coarse" and self.totals and self.totals[-1] < COARSE_END * self.first:
            return True
        count, tolerance = SLOW[stage]
        if len(self.totals) <= count:
            return False
        if self.totals[-1] > (1 - tolerance) * self.totals[-1 - count]:
            return True
        unseen = stage != "rough" and self.totals[-1] > FALLING * self.totals[0]
        return unseen and psnr(self.images[0], self.images[-1]) > UNSEEN


def subsample(image: Tensor) -> Tensor:
    """The image, or of a large one every second or third row and column and so on: eleven whole ones take memory."""
    spacing = max(1, math.isqrt(image[0, 0].numel() // SAMPLE))
    return image[..., ::spacing, ::spacing].clone() if spacing > 1 else image
