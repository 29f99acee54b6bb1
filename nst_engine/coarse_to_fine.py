"""The whole way down: scale after scale, and at full size stage after stage."""

import itertools
import math
from typing import NamedTuple

from .evaluation import ROUNDING
from .optimiser import InverseCurvature, projected_lbfgs
from .pictures import resize
from .stopping import COARSE, COARSE_END, FINE, ROUGH, best_so_far, until_slow


class Step(NamedTuple):
    """The losses after one evaluation of the network, of the best picture so far at this scale and precision."""

    shape: tuple  # (height, width) of the scale that is being worked on
    precision: str  # of the network at the time, "bfloat16" or "float32"
    total: float  # content_weight * content + style_weight * style
    content: float
    style: float


class Stage(NamedTuple):
    """How a picture of one scale is worked on, and what ends it."""

    precision: str
    tolerance: float  # `until_slow` has these two
    end: float
    limit: int  # of evaluations


def plan_scales(shape, smallest):
    """Coarse to fine: [(height, width), ...], each twice the one before, the last = `shape`.

    The shorter side of the coarsest has `smallest` pixels or more, where `shape` has.
    """
    halvings = max(0, int(math.log2(min(shape) / smallest)))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def plan_stages(precisions, evaluations):
    """The stages at full size, one a precision, of which the last refines."""
    stages = [Stage(precision, ROUGH, 0.0, evaluations) for precision in precisions]
    return [*stages[:-1], stages[-1]._replace(tolerance=FINE)]


def descend(image, scales, precisions, evaluate_at, precondition_at, evaluations):
    """Yield (picture, `Step`) after each evaluation, of which there are `evaluations` at most.

    image: of the first scale's shape; the pictures have the shape of their scale. precisions: of the full size, in
    order; a coarse scale has the first. evaluate_at(shape, precision) -> function of flat pictures, as
    `projected_lbfgs` takes it, and precondition_at(shape) -> function of flat gradients make what a stage needs when it
    begins.
    """
    full_size = plan_stages(precisions, evaluations)
    coarse = Stage(precisions[0], COARSE, COARSE_END, evaluations // (len(scales) + 1))
    for scale in scales:
        image = resize(image, scale)
        curvature = InverseCurvature(precondition_at(scale), image.flatten())
        for stage in full_size if scale == scales[-1] else [coarse]:
            count = min(stage.limit, evaluations)
            if not count:
                continue
            run = work(image, scale, stage, curvature, evaluate_at(scale, stage.precision))
            for image, step in itertools.islice(run, count):
                evaluations -= 1
                yield image, step


def work(image, scale, stage, curvature, evaluate):
    """One stage: yield (best picture so far, its `Step`) after each evaluation until progress is slow."""
    run = projected_lbfgs(evaluate, image.flatten(), curvature, ROUNDING[stage.precision])
    steps = ((x.view_as(image), Step(scale, stage.precision, *losses)) for x, losses in run)
    return until_slow(best_so_far(steps), stage.tolerance, stage.end)
