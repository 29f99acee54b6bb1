"""Several styles: which share a region, what their masks and weights mean, and which are refused."""

import math

import pytest
import torch

import nst_utils as nst
from nst_utils import Style, Task, features, gram_matrix
from style_transfer.engine.losses import average, resize_mask, share_of, tile_mask
from style_transfer.engine.objective import as_task, min_evaluation_bytes, objective_of, regions_of
from style_transfer.engine.tiles import cut_tiles

CPU = torch.device("cpu")
LAYERS = {"conv1_1": 0.5, "conv2_1": 2.0}


def ramp(height, width):
    """0 on the left, 1 on the right."""
    return torch.linspace(-0.5, 1.5, width).clamp(0, 1).repeat(height, 1)


def test_styles_with_equal_masks_are_a_region_in_which_their_weights_are_shares(picture):
    image, mask = picture(8, 8), ramp(6, 9)
    styles = [Style(image, 3.0, mask), Style(image, 2.0), Style(image, 1.0, mask.clone()), Style(image, 5.0, 1 - mask)]
    task = as_task(Task(None, styles, (), LAYERS, 0.0, 7.0))
    assert regions_of(task.styles) == [[0, 2], [1], [3]]
    assert [weight.tolist() for weight in task.weights] == [0.0, 7.0, [0.5, 2.0], [0.75, 1.0, 0.25, 1.0]]
    assert regions_of([]) == [] and Task(picture(8, 8), None, ("conv1_1",), {}).weights.blend.tolist() == []


def test_a_mask_is_scaled_with_the_result_and_an_image_mask_with_its_image(picture):
    task = Task(None, Style(picture(40, 50), 2.0, ramp(9, 7), ramp(40, 50)), (), LAYERS)
    (style,) = task.at_scale((24, 32), (48, 64)).styles
    assert style.weight == 2.0 and style.mask.shape == (24, 32)
    assert style.image.shape[-2:] == style.image_mask.shape == (20, 25)
    torch.testing.assert_close(style.image_mask, resize_mask(ramp(40, 50), (20, 25)))


def test_masks_of_any_size_are_resized_and_stay_masks():
    mask = ramp(32, 17)
    mask[1::4] = 0  # bilinear sampling alone would see too much of it
    assert resize_mask(mask, (32, 17)) is mask and resize_mask(None, (3, 4)) is None
    for shape in ((8, 8), (100, 90), (1, 40)):
        found = resize_mask(mask, shape)
        assert found.shape == shape and 0 <= found.min() <= found.max() <= 1
        assert found.mean().item() == pytest.approx(mask.mean().item(), abs=0.03)


def test_only_where_a_mask_is_above_0_is_computed():
    mask = torch.zeros(40, 60)
    mask[8:21, 30:44] = 0.49
    (tile,) = cut_tiles((40, 60), 64, 0, 4)
    box, root, mean = tile_mask(mask, tile, 4, torch.float64)
    assert box == (..., slice(2, 6), slice(7, 11)) and root.shape == (4, 4)
    assert root[1, 1] == pytest.approx(0.7) and root[3, 0] == pytest.approx(math.sqrt(0.49 / 8))
    assert mean == share_of(mask, 4) == pytest.approx(0.49 * 13 * 14 / 2400)
    assert tile_mask(0 * mask, tile, 4, torch.float64).mean > 0  # as if no position had a share
    assert tile_mask(None, tile, 1, torch.float64) is None and share_of(None, 1) == 1


def test_masks_take_their_memory_from_that_for_tiles(vgg, picture):
    """The sum of a style's Gram matrices is tiled as well, and its `image_mask` is counted there."""
    network, shape, sides = vgg.cut("conv2_1", CPU, "float32"), (40, 52), (44, 50)
    image, task = picture(*sides), Task(None, None, (), LAYERS)
    masked = (Style(image, 1.0, ramp(*shape), ramp(*sides)), Style(image, 1.0, 1 - ramp(*shape), ramp(*sides)))
    passes = []

    def counted(styles, budget_bytes):
        """(tiles of the image, tiles of all style images)"""
        passes.clear()
        objective = objective_of(network, task._replace(style=styles), shape, shape, budget_bytes)
        return len(objective.tiling.tiles), len(passes)

    network.conv1_1.register_forward_hook(lambda *_: passes.append(1))
    pixels, of_style = math.prod(shape), math.prod(sides)
    whole = network.bytes_per_pixel * pixels
    assert counted(image, whole)[0] == counted(masked, whole + 2 * 16 * pixels)[0] == 1
    assert counted(image, whole - 1)[0] > 1 < counted(masked, whole + 2 * 16 * pixels - 1)[0]
    whole = network.bytes_per_pixel * of_style
    assert counted(masked, whole + 16 * of_style)[1] == 2 < counted(masked, whole + 16 * of_style - 1)[1]
    least = [min_evaluation_bytes(network, task._replace(style=styles), shape) for styles in (image, masked * 2)]
    assert least[1] - least[0] == 2 * 16 * pixels


TENSORS = ("content", "image", "mask", "image_mask")


@pytest.mark.parametrize(
    "name, change, by_weights_alone",
    [
        ("content_weight", lambda weight: 3.0, True),
        ("style_weight", lambda weight: 3.0, True),
        ("weight", lambda weight: 3.0, True),
        ("style_layers", lambda layers: dict.fromkeys(layers, 3.0), True),
        ("style_layers", lambda layers: dict(reversed(layers.items())), False),
        ("content_layers", lambda layers: ("conv2_1",), False),
        ("style", lambda styles: styles[:1], False),
        *[(name, torch.clone, True) for name in TENSORS],
        *[(name, lambda tensor: tensor.flip(-1), False) for name in TENSORS],
        *[(name, lambda tensor: None, False) for name in ("content", "mask", "image_mask")],
    ],
)
def test_tasks_are_compared_by_what_their_images_masks_and_layers_hold(name, change, by_weights_alone, picture):
    styles = Style(picture(20, 24, 1), 2.0, ramp(9, 8), ramp(5, 6)), Style(picture(18, 16, 2))
    task = as_task(Task(picture(30, 34), styles, ("conv1_2",), LAYERS))
    place = task.styles[0] if name in Style._fields else task
    other = place._replace(**{name: change(getattr(place, name))})
    if place is not task:
        other = task._replace(style=(other, task.styles[1]))
    assert task.differs_by_weights_alone(other) == other.differs_by_weights_alone(task) == by_weights_alone


def test_each_region_takes_on_its_own_style(vgg, content, style, settings):
    """Left and right in two styles: each half comes nearer to its own."""
    left = torch.arange(64).repeat(48, 1) < 32
    other = nst.load_image(nst.IMAGES / "style" / "great_wave.jpg", 40, "cpu")
    styles = [Style(style, mask=left), Style(other, mask=~left)]
    image = nst.transfer_style(content, styles, init="content", evaluations=20, **settings).image
    layer = "conv2_1"
    maps, targets = features(vgg, image, layer), [features(vgg, x, layer)[layer] for x in (style, other)]
    for mine, mask in enumerate((left, ~left)):
        gram = gram_matrix(maps[layer], average(mask.float(), 2))
        errors = [(gram - gram_matrix(target)).square().mean() for target in targets]
        assert errors[mine] < 0.2 * errors[1 - mine]


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, problem",
    [
        (torch.rand(1, 3, 8, 8), "mask of style is (1, 3, 8, 8) torch.float32"),
        (torch.ones(8, 8, dtype=torch.uint8), "mask of style is (8, 8) torch.uint8"),
        ("sky.png", "mask of style is str"),
        (torch.zeros(4, 4), "mask of style is 0 everywhere"),
        (torch.full((4, 4), 255.0), "mask of style has values from 255 to 255"),
        (torch.tensor([[0.5, math.nan]]), "mask of style has values from nan to nan"),
        (torch.rand(0, 4), "mask of style has no pixels"),
    ],
)
def test_a_bad_mask_is_named(mask, problem, style, refuses):
    with refuses(problem):
        as_task(Task(None, Style(style, mask=mask), (), LAYERS))
    with refuses(problem.replace("mask", "image_mask", 1)):
        as_task(Task(None, Style(style, image_mask=mask), (), LAYERS))


@pytest.mark.parametrize(
    "bad, problem",
    [
        (lambda style: [], "style is empty"),
        (lambda style: [style, "wave.jpg"], "style[1] is str"),
        (lambda style: Style(style[0]), "style is (3, 40,"),
        (lambda style: [Style(style, -1.0), style], "weight of style[0] is -1.0"),
        (lambda style: Style(style, 0), "the weight of style is 0, and no other style shares the mask"),
        (lambda style: [Style(style, 0), Style(style, 0.0)], "the weight of style[0], style[1] is 0"),
        (lambda style: [style, Style(style, 0, torch.ones(4, 4))], "the weight of style[1] is 0"),
    ],
)
def test_bad_styles_are_named(bad, problem, content, style, settings, refuses):
    with refuses(problem):
        nst.transfer_style(content, bad(style), **settings)


def test_a_mask_at_a_layer_that_the_image_is_too_small_for_is_refused_in_a_sentence(style, settings, refuses):
    with refuses("a 8x8 image is too small for conv5_1"):
        nst.synthesize_texture(Style(style, mask=torch.ones(8, 8)), "conv5_1", shape=(8, 8), **settings)
