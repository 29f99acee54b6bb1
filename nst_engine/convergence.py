"""When a run has converged: the loss falls slowly, or nobody sees the image change."""

import math
from typing import NamedTuple

from torch import Tensor

from .images import share_changed

# A run has converged when ten evaluations lower the total loss by less than this share of it:
TOLERANCE = {
    "coarse": 0.1,  # at a coarse scale, whose detail the next one replaces
    "rough": 0.05,  # at full size, when it is asked whether rounding is the cause
    "fine": 0.005,  # at full size, and the run is done
}
# or when they change less than this share of the pixels by 1/255 or more, so that nobody sees a difference.
CHANGED = 0.001
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
        if len(self.totals) < LENGTH:
            return False
        slow = self.totals[-1] > (1 - TOLERANCE[stage]) * self.totals[0]
        return slow or share_changed(self.images[0], self.images[-1]) < CHANGED


def subsample(image: Tensor) -> Tensor:
    """The image, or of a large one every second or third row and column and so on: eleven whole ones take memory."""
    spacing = max(1, math.isqrt(image[0, 0].numel() // SAMPLE))
    return image[..., ::spacing, ::spacing].clone() if spacing > 1 else image
