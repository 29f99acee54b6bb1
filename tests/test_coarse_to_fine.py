import itertools
import math
import weakref

import pytest
import torch

from nst_engine import preparation
from nst_engine.coarse_to_fine import Step, agreement, descend, most_evaluations, plan_scales, refine
from nst_engine.optimiser import InverseCurvature
from nst_engine.preparation import Task
from nst_engine.prior import draw_noise
from nst_engine.stopping import FINE, best_so_far, sample, until_still
from nst_utils import FIRST_FIVE, optimise, resize, synthesize_texture

# --- When a run ends -----------------------------------------------------------------------------


def steps(totals, images=None):
    """(picture, Step) after each evaluation; without `images` every pixel moves all the time."""
    images = images or [torch.full((1, 3, 2, 2), 0.07 * k % 1) for k in range(len(totals))]
    return [(image, Step((2, 2), "float32", total, 0.0, 0.0)) for image, total in zip(images, totals)]


def test_a_slow_run_is_ended_and_a_fast_one_is_not():
    def count(totals, end=0.0, tolerance=0.1):
        return len(list(until_still(steps(totals), tolerance, end)))

    assert count([0.9**k for k in range(50)]) == 50
    assert count([1.0] * 50) == 11  # ten evaluations without progress
    assert count([0.8**k for k in range(20)] + [0.8**19] * 50) == 30
    assert count([0.5**k for k in range(50)], end=1e-3) == 11  # a thousandth of the first
    assert count([0.994 ** (k / 10) for k in range(50)], tolerance=FINE) == 50  # 0.5 %, as `optimise` says
    assert count([0.996 ** (k / 10) for k in range(50)], tolerance=FINE) == 11
    assert count([0.0] * 50) == 50  # nothing left to gain is for the optimiser to notice


@pytest.mark.parametrize(
    "pixels, distance, count", [(1, 0.5, 11), (2, 0.5, 30), (2000, 0.9 / 255, 11), (2, 1.1 / 255, 30)]
)
def test_a_picture_that_stands_still_ends_a_run_though_its_loss_falls(pixels, distance, count):
    """Of 2000 pixels one is less than a thousandth and two are not; each moves in one colour within ten evaluations."""
    images = []
    for k in range(30):
        image = torch.zeros(1, 3, 2000)
        image[:, 1, :pixels] = distance * (k // 10 % 2)
        images.append(image.view(1, 3, 40, 50))
    assert len(list(until_still(steps([0.5**k for k in range(30)], images), 0.1))) == count


def test_of_a_large_picture_a_sample_is_kept_and_not_the_whole():
    small, large = torch.rand(1, 3, 500, 500), torch.rand(1, 3, 1030, 1100)
    assert sample(small) is small
    assert torch.equal(sample(large), large[..., ::2, ::2])
    assert sample(large).untyped_storage().nbytes() == large[..., ::2, ::2].numel() * 4


def test_what_is_shown_is_the_best_so_far_by_the_total():
    run = [(k, step, -k) for k, (_, step) in enumerate(steps([5.0, 6.0, 4.0, 4.5]))]
    shown = list(best_so_far(run))
    assert [(image, gradient) for image, _, gradient in shown] == [(0, 0), (0, 0), (2, -2), (2, -2)]
    assert [step.total for _, step, _ in shown] == [5.0, 5.0, 4.0, 4.0]


# --- In which precision --------------------------------------------------------------------------


def begun(gradients, log):
    """begin(image, precision) for `refine`: a run in which loss and picture stand still; gradients: {precision: it}."""

    def begin(image, precision):
        log.append(precision)
        for k in itertools.count():
            yield image + k, Step((1, 1), precision, 1.0, 0.0, 0.0), gradients[precision]

    return begin


def precisions_of(gradients, precisions):
    log = []
    run = list(refine(torch.zeros(1, 3, 1, 1), precisions, begun(gradients, log), lambda x: x))
    return ["".join(step.precision[0] for _, step, _ in run), log, run]


UP, ASIDE = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])


def test_one_precision_goes_on_until_it_stands_still():
    found, log, _ = precisions_of({"float32": UP}, ("float32",))
    assert found == "f" * 11 and log == ["float32"]


@pytest.mark.parametrize("exact", [3 * torch.tensor([1.0, 0.0]), torch.tensor([4.0, 3.0])])
def test_where_the_gradients_agree_the_faster_precision_goes_on_to_the_end(exact):
    """Slow, asked, not rounding; done, asked, not rounding: the exact one is evaluated twice, at the same picture."""
    found, log, run = precisions_of({"bfloat16": UP, "float32": exact}, ("bfloat16", "float32"))
    assert found == "b" * 11 + "f" + "b" * 11 + "f"
    assert log == ["bfloat16", "float32", "float32"]
    assert torch.equal(run[11][0], run[10][0]) and torch.equal(run[-1][0], run[-2][0])


@pytest.mark.parametrize("gradient", [ASIDE, -UP, torch.zeros(2)])
def test_where_rounding_stops_the_faster_precision_the_exact_one_goes_on(gradient):
    found, log, run = precisions_of({"bfloat16": gradient, "float32": UP}, ("bfloat16", "float32"))
    assert found == "b" * 11 + "f" + "f" * 11 and log == ["bfloat16", "float32"]
    assert torch.equal(run[11][0], run[10][0])


def test_agreement_is_the_cosine_as_the_preconditioner_weighs_it():
    weights = torch.tensor([1.0, 3.0])
    assert agreement(UP, ASIDE, lambda x: x) == pytest.approx(0.6)
    assert agreement(UP, ASIDE, weights.mul) == pytest.approx(3 / 57**0.5)
    assert agreement(UP, -2 * UP, weights.mul) == pytest.approx(-1)


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


def test_a_finer_scale_begins_with_the_enlarged_picture_and_detail_of_the_seed(picture, settings):
    """The first picture of a scale, evaluated before any step; the last of the scale before is what it came from."""
    style, seen = picture(128, 128), []
    options = {"callback": lambda image, _: seen.append(image), "evaluations": 8, "seed": 3, **settings}
    synthesize_texture(style, "conv1_1", **options)
    coarse, fine = next(pair for pair in itertools.pairwise(seen) if pair[1].shape[-1] == 128)
    noise = draw_noise((128, 128), 3, "cpu", deviation=0.1)
    detail = noise - resize(resize(noise, (64, 64)), (128, 128))
    assert 0.01 < detail.std() < 0.1
    torch.testing.assert_close(fine, (resize(coarse, (128, 128)) + detail).clamp(0, 1))


def test_a_picture_of_another_size_to_start_from_is_scaled(picture, settings):
    result = synthesize_texture(picture(64, 64), "conv1_1", init=picture(40, 90), evaluations=1, **settings)
    torch.testing.assert_close(result.image, resize(picture(40, 90), (64, 64)))


def test_each_scale_has_a_share_of_the_evaluations_and_a_large_one_fewer():
    assert most_evaluations([(64, 64), (128, 128), (256, 256)], 100) == [25, 25, 100]
    assert most_evaluations([(512, 1024)], 60) == [60]
    assert most_evaluations([(512, 1024), (1024, 2048), (2048, 4096)], 80) == [20, 20, 20]
    assert most_evaluations([(1500, 2000), (3000, 4000)], 1) == [0, 1]
    assert most_evaluations([(3000, 4000)], 100) == [21]  # the root of 524,288 / 12,000,000


@pytest.mark.parametrize("done, expected", [(0, [2, 2, 2, 4]), (1, [1, 2, 2, 4])])
def test_a_run_that_goes_on_has_its_scales_evaluations_but_those_that_are_done(done, expected):
    """Ten over four scales; of the first one's two, one may be done already."""

    def evaluate_at(shape, precision):
        return lambda x: ([(x.double() - 0.3).square().sum().item(), 0.0, 0.0], 2 * (x - 0.3))

    def curvature_at(shape):
        return InverseCurvature(lambda x: x / shape[0], torch.zeros(3 * shape[0] * shape[1]), 1)

    scales = [(k, k) for k in (1, 2, 3, 4)]
    image = torch.rand(1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    run = descend(
        image,
        scales,
        ("float32",),
        lambda image, shape: torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1)),
        evaluate_at,
        curvature_at,
        10 - done,
        done,
    )
    shapes = [step.shape for _, step in run]
    assert [shapes.count(scale) for scale in scales] == expected


def test_a_large_picture_to_start_from_goes_through_scales_and_keeps_its_detail(vgg, picture, monkeypatch):
    """From 512 pixels on; what the coarse scale changed is enlarged, and the rest is the picture's own."""
    monkeypatch.setattr(preparation, "BROAD", 32)
    init, seen = picture(64, 96), {}
    task = Task(init, init.flip(3), ("conv1_1",), {"conv1_1": 1.0})
    prepared = preparation.Preparation(vgg, torch.device("cpu"), "float32")
    monkeypatch.setattr(Task, "smallest_side", 1)
    image, scales = prepared.start(task, (64, 96), init)
    assert scales == [(32, 48), (64, 96)]
    torch.testing.assert_close(image, resize(init, (32, 48)))
    for shown, step in prepared.run(task, image, scales, 24, 0, init):
        seen.setdefault(step.shape, []).append(shown)
    change = seen[32, 48][-1] - resize(init, (32, 48))
    expected = init + torch.nn.functional.interpolate(change, (64, 96), mode="bicubic")
    assert change.abs().max() > 0.003
    torch.testing.assert_close(seen[64, 96][0], expected.clamp(0, 1))
    assert prepared.start(task, (63, 63), init)[1] == [(63, 63)]
    result = optimise(task, init=init, evaluations=24, vgg=vgg, precision="float32", progress=False)
    assert torch.equal(result.image, shown)


def test_what_a_scale_needed_is_gone_when_the_next_begins(picture):
    """Among it curvature pairs, which are most of a run's memory."""
    alive, counts = weakref.WeakSet(), []

    def curvature_at(shape):
        counts.append(len(alive))
        alive.add(curvature := InverseCurvature(lambda vector: vector, torch.zeros(3 * math.prod(shape))))
        return curvature

    def evaluate(x):
        return [(x @ x).item()] * 3, 2 * x

    scales, settings = [(4, 4), (8, 8), (16, 16)], (resize, lambda shape, precision: evaluate, curvature_at)
    for _ in descend(picture(4, 4), scales, ("float32",), *settings, 12):
        pass
    assert counts == [0, 0, 0]


def test_from_a_picture_a_scale_has_512_pixels_to_a_side_at_least(vgg, picture):
    prepared, init = preparation.Preparation(vgg, torch.device("cpu"), "float32"), picture(8, 8)
    task = Task(init, None, ("conv1_1",))
    assert prepared.start(task, (1023, 1030), init)[1] == [(1023, 1030)]
    assert prepared.start(task, (1024, 1030), init)[1] == [(512, 515), (1024, 1030)]
