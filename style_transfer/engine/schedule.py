"""The schedule of a run: the scales from coarse to fine, the evaluations at each, and the stopping rule."""

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .checks import Shape

EVALUATIONS = 225  # default maximum number of evaluations of the network, over all scales
MIN_SIDE_FROM_IMAGE = 512  # pixels along the shorter side: a run from an image has no coarser scale
FULL_LIMIT_PIXELS = 2**19  # 512 x 1024: a larger scale gets fewer evaluations

# {stage: (n, share)}: a stage has converged when n evaluations lower the total loss by less than this share.
CONVERGED = {
    "coarse": (10, 0.1),  # at a coarse scale, whose detail the next one replaces
    "fast": (5, 0.3),  # at full size in the faster precision, where rounding may be the cause
    "fine": (10, 0.005),  # at full size
}
# Except in the fast stage, it has also converged when ten evaluations changed the image by under 0.5 % RMS (46 dB) and
# the loss is still above 45 % of its value ten evaluations ago.
UNSEEN_MEAN_SQUARE = 10**-4.6
UNSEEN_LOSS_SHARE = 0.45
MAX_COMPARED_PIXELS = 2**18
WINDOW_LENGTH = 11  # images and totals: first and last are ten evaluations apart; above every n in CONVERGED
# A coarse scale also ends when its total falls below this share of its first total: the next scale starts far above it.
COARSE_LOSS_SHARE = 0.004


def plan_scales(shape: Shape, smallest: int) -> list[Shape]:
    """[(height, width), ...], each twice the one before, the last = `shape`.

    The shorter side of the coarsest has at least `smallest` pixels, if that of `shape` does.
    """
    halvings = max(0, int(math.log2(min(shape) / smallest)))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def limit_evaluations(scales: list[Shape], evaluations: int) -> list[int]:
    """The maximum number of evaluations at each scale, out of `evaluations` in all.

    Of n scales, each coarse one gets 1 / (n + 1) of them, and the last whatever is left. A scale above
    FULL_LIMIT_PIXELS gets at most `evaluations` * sqrt(FULL_LIMIT_PIXELS / pixels): coarser ones have done the work.
    """
    limits = []
    for scale in scales:
        last = len(limits) == len(scales) - 1
        share = evaluations if last else evaluations // (len(scales) + 1)
        fewer = (FULL_LIMIT_PIXELS / math.prod(scale)) ** 0.5
        limits.append(min(share, max(1, round(evaluations * min(1, fewer)))))
    return limits


class Window(NamedTuple):
    """The latest evaluations of a stage, which the stopping rule looks at."""

    first: float | None = None  # the total loss of the first evaluation
    totals: tuple = ()  # of the last eleven
    images: tuple = ()  # (1, 3, h, w), subsampled where large

    def extend(self, image: Tensor, total: float) -> "Window":
        """The window one evaluation later."""
        first = total if self.first is None else self.first
        # Subsample a large image (every second or third row and column, and so on), since eleven of them take memory.
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
