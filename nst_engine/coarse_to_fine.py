"""The whole way down: scale after scale, and at full size in the precision that it needs."""

import functools
import itertools
import math
from typing import NamedTuple

from .evaluation import ROUNDING
from .optimiser import InverseCurvature, projected_lbfgs
from .stopping import COARSE, COARSE_END, FINE, ROUGH, best_so_far, until_still

AGREEMENT = 0.7  # of two precisions' gradients, a cosine; below, half of the faster one's or more is rounding


class Step(NamedTuple):
    """The losses after one evaluation of the network, of the best picture so far at this scale and precision."""

    shape: tuple  # (height, width) of the scale that is being worked on
    precision: str  # of the network at the time, "bfloat16" or "float32"
    total: float  # content_weight * content + style_weight * style
    content: float
    style: float


def plan_scales(shape, smallest):
    """Coarse to fine: [(height, width), ...], each twice the one before, the last = `shape`.

    The shorter side of the coarsest has `smallest` pixels or more, where `shape` has.
    """
    halvings = max(0, int(math.log2(min(shape) / smallest)))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def descend(image, scales, precisions, enlarge, evaluate_at, precondition_at, pairs_at, evaluations):
    """Yield (picture, `Step`) after each evaluation, of which there are `evaluations` at most.

    image: of the first scale's shape; the pictures have the shape of their scale, to which enlarge(picture, shape)
    brings them. precisions: of the full size, the faster first, in which coarse scales are worked on.
    evaluate_at(shape, precision) -> function of flat pictures, as `projected_lbfgs` takes it, and
    precondition_at(shape) -> function of flat gradients make what a scale needs when it begins; pairs_at(shape): how
    many curvature pairs there is memory for.
    """
    share = evaluations // (len(scales) + 1)  # of a coarse scale, at most
    for scale in scales:
        if scale != scales[0]:
            image = enlarge(image, scale)
        curvature = None  # the last scale's goes before there is another
        curvature = InverseCurvature(precondition_at(scale), image.flatten(), pairs_at(scale))
        begin = functools.partial(work, scale, curvature, evaluate_at)
        if scale == scales[-1]:
            run, count = refine(image, precisions, begin, curvature.precondition), evaluations
        else:
            run, count = until_still(begin(image, precisions[0]), COARSE, COARSE_END), min(share, evaluations)
        for image, step, _ in itertools.islice(run, count):
            evaluations -= 1
            yield image, step


def work(scale, curvature, evaluate_at, image, precision):
    """Yield (picture, `Step`, flat gradient) of the best picture so far after each evaluation."""
    run = projected_lbfgs(evaluate_at(scale, precision), image.flatten(), curvature, ROUNDING[precision])
    return best_so_far((x.view_as(image), Step(scale, precision, *losses), gradient) for x, losses, gradient in run)


def refine(image, precisions, begin, precondition):
    """Yield what `work` does, until the picture stands still, in the precision that it needs.

    When the faster precision has become slow, and again when it is done, the other's run is begun at its picture. If
    its gradient points the same way, rounding is not the cause and the faster goes on; if not, the other does.
    """
    run = begin(image, precisions[0])
    if len(precisions) == 1:
        yield from until_still(run, FINE)
        return
    for tolerance in (ROUGH, FINE):
        for image, step, gradient in until_still(run, tolerance):
            yield image, step, gradient
        exact = begin(image, precisions[1])
        image, step, exact_gradient = next(exact)
        yield image, step, exact_gradient
        if not agreement(gradient, exact_gradient, precondition) >= AGREEMENT:
            yield from until_still(exact, FINE)
            return


def agreement(a, b, precondition):
    """The cosine between two gradients as the preconditioner weighs them; nan if one is zero."""
    pa, pb = precondition(a), precondition(b)
    return ((a @ pb) / ((a @ pa) * (b @ pb)).sqrt()).item()
