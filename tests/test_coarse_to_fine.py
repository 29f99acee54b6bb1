import itertools

import pytest
import torch

from nst_engine.coarse_to_fine import Step, plan_scales, plan_stages
from nst_engine.preparation import Task
from nst_engine.stopping import FINE, best_so_far, until_slow
from nst_utils import FIRST_FIVE, resize, synthesize_texture

# --- When a run ends -----------------------------------------------------------------------------


def steps(totals):
    return [(k, Step((1, 1), "float32", total, 0.0, 0.0)) for k, total in enumerate(totals)]


def test_a_slow_run_is_ended_and_a_fast_one_is_not():
    def count(totals, end=0.0):
        return len(list(until_slow(steps(totals), 0.1, end)))

    assert count([0.9**k for k in range(50)]) == 50
    assert count([1.0] * 50) == 11  # ten evaluations without progress
    assert count([0.8**k for k in range(20)] + [0.8**19] * 50) == 30
    assert count([0.5**k for k in range(50)], end=1e-3) == 11  # a thousandth of the first
    assert count([0.0] * 50) == 50  # nothing left to gain is for the optimiser to notice


def test_what_is_shown_is_the_best_so_far_by_the_total():
    shown = list(best_so_far(steps([5.0, 6.0, 4.0, 4.5])))
    assert [image for image, _ in shown] == [0, 0, 2, 2]
    assert [step.total for _, step in shown] == [5.0, 5.0, 4.0, 4.0]


def test_only_the_last_stage_refines():
    for precisions in (("bfloat16", "float32"), ("float32",)):
        stages = plan_stages(precisions, 100)
        assert tuple(stage.precision for stage in stages) == precisions
        assert [stage.tolerance == FINE for stage in stages] == [False] * (len(stages) - 1) + [True]
        assert {(stage.end, stage.limit) for stage in stages} == {(0.0, 100)}


# --- Scales --------------------------------------------------------------------------------------

SHAPES = [(256, 256), (50, 48), (255, 383), (512, 300), (97, 64), (33, 1000), (1, 1), (5, 3), (64, 64), (127, 129)]
LAYERS = [(("conv1_2",), ()), ((), FIRST_FIVE), (("conv_10",), ("relu5_1",)), (("conv5_4",), ())]


def scales_of(shape, content_layers, style_layers):
    return plan_scales(shape, Task(None, None, content_layers, dict.fromkeys(style_layers, 1.0)).smallest_side)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_double_up_to_the_shape(shape, layers):
    scales = scales_of(shape, *layers)
    assert scales[-1] == shape
    for coarse, fine in itertools.pairwise(scales):
        assert all(abs(2 * a - b) <= 1 for a, b in zip(coarse, fine))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_coarsest_scale_is_as_small_as_the_layers_allow(shape):
    def smallest(layers):
        return min(scales_of(shape, *layers)[0])

    needed = {LAYERS[0]: 24, LAYERS[1]: 64, LAYERS[2]: 256, LAYERS[3]: 128}
    for layers, least in needed.items():
        assert smallest(layers) >= min(least, min(shape))
        assert smallest(layers) <= 2 * least or smallest(layers) == min(shape)


def test_scales_of_the_leading_example():
    scales = scales_of((256, 384), ("conv1_2",), FIRST_FIVE)
    assert scales == [(64, 96), (128, 192), (256, 384)]


def test_a_finer_scale_begins_with_the_enlarged_picture(picture, settings):
    """The first picture of a scale, evaluated before any step; the last of the scale before is what it came from."""
    style, seen = picture(128, 128), []
    synthesize_texture(style, "conv1_1", callback=lambda image, _: seen.append(image), evaluations=8, **settings)
    coarse, fine = next(pair for pair in itertools.pairwise(seen) if pair[1].shape[-1] == 128)
    torch.testing.assert_close(fine, resize(coarse, (128, 128)))


def test_a_picture_of_another_size_to_start_from_is_scaled(picture, settings):
    result = synthesize_texture(picture(64, 64), "conv1_1", init=picture(40, 90), evaluations=1, **settings)
    torch.testing.assert_close(result.image, resize(picture(40, 90), (64, 64)))
