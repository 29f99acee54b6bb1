import itertools

import pytest

from style_transfer.engine.objective import Task
from style_transfer.engine.schedule import limit_evaluations, plan_scales
from style_transfer.engine.vgg import FIRST_FIVE

SHAPES = [(256, 256), (50, 48), (255, 383), (512, 300), (97, 64), (33, 1000), (1, 1), (5, 3), (64, 64), (127, 129)]
# (content layers, style layers, pixels along the shorter side that the coarsest scale needs)
LAYERS = [
    (("conv1_2",), (), 24),
    (("conv3_1", "conv1_2"), (), 32),
    ((), FIRST_FIVE, 64),
    (("conv4_1",), ("relu4_1", "conv1_1"), 128),
    (("conv_10",), ("relu5_1",), 256),
    (("conv5_4",), (), 128),
]


@pytest.mark.parametrize("content_layers, style_layers, needed", LAYERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scales_double_up_to_the_shape_from_the_smallest_that_the_layers_allow(
    shape, content_layers, style_layers, needed
):
    task = Task(None, None, content_layers, dict.fromkeys(style_layers, 1.0))
    assert task.smallest_side == needed
    scales = plan_scales(shape, task.smallest_side)
    assert scales[-1] == shape
    for coarse, fine in itertools.pairwise(scales):
        assert all(abs(2 * a - b) <= 1 for a, b in zip(coarse, fine))
    smallest = min(scales[0])
    assert smallest >= min(needed, min(shape))
    assert smallest <= 2 * needed or smallest == min(shape)


def test_scales_of_the_leading_example():
    assert plan_scales((256, 384), 64) == [(64, 96), (128, 192), (256, 384)]


def test_each_scale_has_a_share_of_the_evaluations_and_a_large_one_fewer():
    assert limit_evaluations([(64, 64), (128, 128), (256, 256)], 100) == [25, 25, 100]
    assert limit_evaluations([(512, 1024)], 60) == [60]
    assert limit_evaluations([(512, 1024), (1024, 2048), (2048, 4096)], 80) == [20, 20, 20]
    assert limit_evaluations([(1500, 2000), (3000, 4000)], 1) == [0, 1]
    assert limit_evaluations([(3000, 4000)], 100) == [21]  # the root of 524,288 / 12,000,000


@pytest.mark.parametrize(
    "style, layer, expected",
    [
        ((100, 60), "conv1_1", [(25, 15), (50, 30), (100, 60)]),
        ((24, 40), "conv3_1", [(6, 10), (12, 20), (24, 40)]),
        ((10, 12), "conv3_1", [(4, 5), (5, 6), (10, 12)]),
        ((12, 30), "conv4_1", [(8, 20), (8, 20), (12, 30)]),
    ],
)
def test_a_coarse_scale_has_content_and_style_as_much_smaller(style, layer, expected, picture):
    """The content of the scale's shape; the style by the same factor, but large enough for its deepest layer."""
    task = Task(picture(240, 310), picture(*style), ("conv1_1",), {"conv1_1": 1.0, layer: 2.0}, 3.0, 4.0)
    for shape, style_shape in zip([(64, 75), (128, 150), (256, 300)], expected):
        scaled = task.at_scale(shape, (256, 300))
        assert (*scaled.content.shape[-2:],) == shape and (*scaled.styles[0].image.shape[-2:],) == style_shape
        assert scaled[2:] == task[2:]
    assert task._replace(content_layers=()).at_scale((64, 75), (256, 300)).content is None
    assert task._replace(style_layers={}).at_scale((64, 75), (256, 300)).style is None
