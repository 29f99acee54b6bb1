"""When a run goes on and when it ends: the scales from coarse to fine, their evaluations, and the stopping rule."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .checks import Shape

EVALUATIONS = 225  # of the network, at most, over all scales, by default
MIN_SIDE_FROM_IMAGE = 512  # pixels along the shorter side: a run from an image has no coarser scale
FULL_LIMIT_PIXELS = 2**19  # 512 x 1024: a larger scale has fewer evaluations

# A stage has converged when so many evaluations lower the total loss by less than this share:
CONVERGED = {
    "coarse": (10, 0.1),  # at a coarse scale, whose detail the next one replaces
    "fast": (5, 0.3),  # at full size in the faster precision; rounding may be the cause
    "fine": (10, 0.005),  # at full size
}
# Except in the fast stage, it has also converged when ten evaluations changed the image by under 0.5 % RMS (46 dB) and
# the loss is still above 45 % of its value before.
UNSEEN_MEAN_SQUARE = 10**-4.6
UNSEEN_LOSS_SHARE = 0.45
MAX_COMPARED_PIXELS = 2**18
WINDOW_LENGTH = 11  # images and totals, so ten evaluations apart; above every count in CONVERGED
# A coarse scale also ends when its total is below this share of its first: the next one starts far above that.
COARSE_LOSS_SHARE = 0.004


def plan_scales(shape: Shape, smallest: int) -> list[Shape]:
    """[(height, width), ...], each twice the one before, the last = `shape`.

    The shorter side of the coarsest has at least `smallest` pixels, if that of `shape` does.
    """
    halvings = max(0, int(math.log2(min(shape) / smallest)))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def limit_evaluations(scales: list[Shape], evaluations: int) -> list[int]:
    """The maximum number of evaluations at each scale, out of `evaluations` in all.

    Equal shares; the last scale may also use what the others leave. A large scale has fewer, by the square root of its
    pixels: the coarser ones have done the work.
    """
    limits = []
    for scale in scales:
        last = len(limits) == len(scales) - 1
        share = evaluations if last else evaluations // (len(scales) + 1)
        fewer = (FULL_LIMIT_PIXELS / math.prod(scale)) ** 0.5
        limits.append(min(share, max(1, round(evaluations * min(1, fewer)))))
    return limits


class Window(NamedTuple):
    """The latest evaluations of a stage, on which the stopping rule decides."""

    first: float | None = None  # the total loss of the first evaluation
    totals: tuple = ()  # of the last eleven
    images: tuple = ()  # (1, 3, h, w), subsampled where large

    def extend(self, image: Tensor, total: float) -> "Window":
        """The window one evaluation later."""
        first = total if self.first is None else self.first
        # Of a large image only every second or third row and column, and so on: eleven whole ones take memory.
        spacing = max(1, math.isqrt(image[0, 0].numel() // MAX_COMPARED_PIXELS))
        if spacing > 1:
            image = image[..., ::spacing, ::spacing].clone()
        totals, images = (*self.totals, total), (*self.images, image)
        return Window(first, totals[-WINDOW_LENGTH:], images[-WINDOW_LENGTH:])

    def converged(self, stage: str) -> str | None:
        """Why a stage, "coarse", "fast" or "fine", has converged, as part of a sentence; None if it has not."""
        if stage == "coarse" and self.totals and self.totals[-1] < COARSE_LOSS_SHARE * self.first:
            return f"the loss fell to less than {COARSE_LOSS_SHARE:.1%} of its first value"
        count, tolerance = CONVERGED[stage]
        if len(self.totals) <= count:
            return None
        if self.totals[-1] > (1 - tolerance) * self.totals[-1 - count]:
            return f"the loss fell by less than {tolerance:.1%} in {count} evaluations"
        slow = self.totals[-1] > UNSEEN_LOSS_SHARE * self.totals[0]
        if stage != "fast" and slow and F.mse_loss(self.images[-1], self.images[0]).item() < UNSEEN_MEAN_SQUARE:
            return f"the image changed by less than 0.5% in {WINDOW_LENGTH - 1} evaluations"
        return None
