"""Coarse to fine: the scales of a run, and how many evaluations each has."""

import math

from .layers import Shape

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
