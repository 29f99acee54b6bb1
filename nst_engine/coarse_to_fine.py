"""The whole way down: scale after scale, and at full size in the precision that it needs."""

import functools
import itertools
import math
from typing import NamedTuple

from .evaluation import ROUNDING
from .optimiser import projected_lbfgs
from .stopping import COARSE, COARSE_END, FINE, ROUGH, best_so_far, until_still

LARGE = 2**19  # pixels, 512 x 1024: a larger scale has fewer evaluations
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


def most_evaluations(scales, evaluations):
    """[how many evaluations a scale has, at most]: equal shares of them, of which the last scale's may be what is left.

    A large scale has fewer, as the root of its pixels: the coarser ones have done the work.
    """
    shares = [evaluations // (len(scales) + 1)] * (len(scales) - 1) + [evaluations]
    fewer = [max(1, round(evaluations * min(1, (LARGE / math.prod(scale)) ** 0.5))) for scale in scales]
    return list(map(min, shares, fewer))


def descend(image, scales, precisions, enlarge, evaluate_at, curvature_at, evaluations, done=0):
    """Yield (picture, `Step`) after each evaluation, of which there are `evaluations` at most.

    image: of the first scale's shape; the pictures have the shape of their scale, to which enlarge(picture, shape)
    brings them. precisions: of the full size, the faster first, in which coarse scales are worked on.
    evaluate_at(shape, precision) -> function of flat pictures, as `projected_lbfgs` takes it, and
    curvature_at(shape) -> `InverseCurvature` make what a scale needs when it begins. done: so many evaluations of the
    first scale are behind a run that goes on, and besides `evaluations`.
    """
    for scale, most in zip(scales, most_evaluations(scales, evaluations + done)):
        if scale != scales[0]:
            image, done = enlarge(image, scale), 0
        run = work_at(scale, scale == scales[-1], image, precisions, evaluate_at, curvature_at)
        for image, step, _ in itertools.islice(run, max(0, min(most - done, evaluations))):
            evaluations -= 1
            yield image, step


def work_at(scale, is_last, image, precisions, evaluate_at, curvature_at):
    """Yield what `work` does, at one scale, until the picture stands still as far as it has to."""
    curvature = curvature_at(scale)
    begin = functools.partial(work, scale, curvature, evaluate_at)
    if is_last:
        yield from refine(image, precisions, begin, curvature.precondition)
    else:
        yield from until_still(begin(image, precisions[0]), COARSE, COARSE_END)


def work(scale, curvature, evaluate_at, image, precision):
    """Yield (picture, `Step`, flat gradient) of the best picture so far after each evaluation."""
    run = projected_lbfgs(evaluate_at(scale, precision), image.flatten(), curvature, ROUNDING[precision])
    return best_so_far((x.view(1, 3, *scale), Step(scale, precision, *losses), gradient) for x, losses, gradient in run)


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
