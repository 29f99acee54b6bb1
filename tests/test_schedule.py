import itertools

import pytest
import torch

from style_transfer.engine.objective import Task
from style_transfer.engine.schedule import Window, limit_evaluations, plan_scales
from style_transfer.engine.vgg import FIRST_FIVE

SHAPES = [(256, 256), (255, 383), (33, 1000), (1, 1), (64, 64), (127, 129)]
# (content layers, style layers, pixels along the shorter side that the coarsest scale needs)
LAYERS = [
    (("conv1_2",), (), 24),
    (("conv3_1", "conv1_2"), (), 32),
    ((), FIRST_FIVE, 64),
    (("conv4_1",), ("relu4_1", "conv1_1"), 128),
    (("conv_10",), ("relu5_1",), 256),
]


@pytest.mark.parametrize("content_layers, style_layers, needed", LAYERS)
def test_scales_double_up_to_the_shape_from_the_smallest_that_the_layers_allow(content_layers, style_layers, needed):
    task = Task(None, None, content_layers, dict.fromkeys(style_layers, 1.0))
    assert task.smallest_side == needed
    for shape in SHAPES:
        scales = plan_scales(shape, needed)
        assert scales[-1] == shape
        for coarse, fine in itertools.pairwise(scales):
            assert all(abs(2 * a - b) <= 1 for a, b in zip(coarse, fine))
        smallest = min(scales[0])
        assert min(needed, *shape) <= smallest and (smallest <= 2 * needed or smallest == min(shape))
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
        ((100, 60), "conv1_1", (25, 15)),
        ((24, 40), "conv3_1", (6, 10)),
        ((10, 12), "conv3_1", (4, 5)),
        ((12, 30), "conv4_1", (8, 20)),
    ],
)
def test_a_coarse_scale_has_content_and_style_as_much_smaller(style, layer, expected, picture):
    """The content of the scale's shape; the style by the same factor, but large enough for its deepest layer."""
    task = Task(picture(240, 310), picture(*style), ("conv1_1",), {"conv1_1": 1.0, layer: 2.0}, 3.0, 4.0)
    scaled = task.at_scale((64, 75), (256, 300))
    assert scaled.content.shape[-2:] == (64, 75) and scaled.styles[0].image.shape[-2:] == expected
    assert scaled[2:] == task[2:]


# --- The stopping rule ---------------------------------------------------------------------------


def convergence(stage, totals, images=None):
    """(after how many evaluations the stage has converged, why), or None. Without `images` every pixel moves."""
    images, window = images or [torch.full((1, 3, 2, 3), 0.07 * k % 1) for k in range(len(totals))], Window()
    for k, (image, total) in enumerate(zip(images, totals), 1):
        window = window.extend(image, total)
        if why := window.converged(stage):
            return k, why


@pytest.mark.parametrize("stage, count, tolerance", [("coarse", 10, 0.1), ("fast", 5, 0.3), ("fine", 10, 0.005)])
def test_a_loss_that_falls_slowly_has_converged(stage, count, tolerance):
    why = f"the loss fell by less than {100 * tolerance}% in {count} evaluations"
    slow, fast = ([(1 - factor * tolerance) ** (k / count) for k in range(25)] for factor in (0.8, 1.2))
    assert convergence(stage, slow) == (count + 1, why) and convergence(stage, fast) is None
    assert convergence(stage, [0.5 ** min(k, 7) for k in range(30)]) == (count + 8, why)
    assert convergence(stage, [0.0] * 50) is None  # this is for the optimiser to notice


def test_a_coarse_scale_also_ends_at_a_small_share_of_its_first_loss():
    totals = [0.7**k for k in range(30)]
    assert totals[15] > 0.004 > totals[16]
    assert convergence("coarse", totals) == (17, "the loss fell to less than 0.4% of its first value")
    assert convergence("fast", totals) is convergence("fine", totals) is None


@pytest.mark.parametrize(
    "stage, change, fall, unseen",
    [
        ("coarse", 0.0049, 0.46, True),
        ("fine", 0.0049, 0.46, True),
        ("fine", 0.0052, 0.6, False),
        ("coarse", 0.0052, 0.6, False),
        ("fine", 0.0049, 0.44, False),
        ("fast", 0.0, 0.47, False),  # there the loss alone decides
    ],
)
def test_an_image_that_hardly_changes_has_converged_unless_its_loss_falls_fast(stage, change, fall, unseen):
    """change: of a tenth of its numbers in ten evaluations, root mean square over all. fall: of the loss in ten."""
    images = [torch.full((1, 5, 10, 20), 0.3) for _ in range(30)]
    for k in range(10, 20):
        images[k][..., :2] += change * 10**0.5
    expected = (11, "the image changed by less than 0.5% in 10 evaluations") if unseen else None
    assert convergence(stage, [fall ** (k / 10) for k in range(30)], images) == expected


def test_the_window_holds_eleven_images_and_of_large_ones_a_sample():
    small, large, window = torch.rand(1, 3, 500, 510), torch.rand(1, 3, 1030, 1100), Window()
    for k in range(14):
        window = window.extend((small, large)[k % 2], 20.0 - k)
    assert window.totals == tuple(20.0 - k for k in range(3, 14)) and window.first == 20.0
    *images, before, latest = window.images
    assert len(images) == 9 and before is small and torch.equal(latest, large[..., ::2, ::2])
    assert latest.untyped_storage().nbytes() == latest.nbytes
