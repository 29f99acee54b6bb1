"""The helper's formulas are the papers'; the engine finds the losses and gradients of the helper's, whole or in tiles.

The engine's are compared in float64, on examples in which no two sizes, shares or weights are equal.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nst_utils import (
    Style,
    Task,
    content_loss,
    features,
    gram_matrices,
    gram_matrix,
    make_objective,
    style_loss,
)
from style_transfer.engine.losses import Mask, Weights, gram_sum, square_sum
from style_transfer.engine.objective import objective_of
from style_transfer.engine.tiles import losses_and_gradient
from style_transfer.engine.vgg import deepest, stride

CPU = torch.device("cpu")
CONTENT_LAYERS, STYLE_LAYERS = ("conv1_2",), ("relu1_1", "conv2_1")


def random_maps(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (1, 5, 3, 4), "b": (1, 7, 2, 6)}  # C != h * w, h != w
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# --- The helper's formulas -----------------------------------------------------------------------


def paper_gram(feature_map):
    c, h, w = feature_map.shape[1:]
    maps = feature_map[0].double()
    return torch.einsum("ihw,jhw->ij", maps, maps) / (c * h * w)


def test_a_gram_matrix_of_integers_is_exact():
    # Two channels of 1x3 positions. F F^T = [[1+4+9, 1*1-2+0], [-1, 1+1]] and C h w = 6.
    feature_map = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]]).view(1, 2, 1, 3)
    assert torch.equal(gram_matrix(feature_map), torch.tensor([[14.0, -1.0], [-1.0, 2.0]]) / 6)


@pytest.mark.parametrize("name", "ab")
def test_a_gram_matrix_is_the_papers_sum_whatever_the_order_of_positions(name):
    feature_map = random_maps(0)[name]
    last = feature_map.contiguous(memory_format=torch.channels_last)
    assert last.stride() != feature_map.stride()
    for same in (feature_map, last, feature_map.flip(2, 3), feature_map.repeat(1, 1, 2, 3), feature_map.double()):
        gram = gram_matrix(same)
        assert gram.dtype == same.dtype
        torch.testing.assert_close(gram.double(), paper_gram(feature_map), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (5, 3, 4)])
def test_only_one_images_feature_map_has_a_gram_matrix(shape, refuses):
    with refuses(f"the feature map is {shape}"):
        gram_matrix(torch.ones(shape))


def test_a_mask_needs_the_shape_of_the_feature_map(refuses):
    with refuses("the mask is (4, 5) and the feature map (5, 4)"):
        gram_matrix(torch.rand(1, 3, 5, 4), torch.ones(4, 5))


def test_losses_are_the_papers_formulas():
    maps, others = random_maps(0), random_maps(1)
    errors = {name: (maps[name] - others[name]).double().square().mean().item() for name in maps}
    assert content_loss(maps, others).item() == pytest.approx(errors["a"] + errors["b"], rel=1e-5)
    assert content_loss(maps, {"b": others["b"]}).item() == pytest.approx(errors["b"], rel=1e-5)
    grams = {name: paper_gram(others[name]) for name in maps}
    errors = {name: (paper_gram(maps[name]) - grams[name]).square().mean().item() for name in maps}
    grams = {name: gram.float() for name, gram in grams.items()}
    assert style_loss(maps, grams).item() == pytest.approx(errors["a"] + errors["b"], rel=1e-5)
    weighted = style_loss(maps, grams, {"a": 0.5, "b": 3.0}).item()
    assert weighted == pytest.approx(0.5 * errors["a"] + 3 * errors["b"], rel=1e-5)


def test_every_target_needs_a_layer_of_its_shape(refuses):
    maps, wide = random_maps(0), {"a": random_maps(0)["a"][..., :1]}  # wide's would be broadcast
    for loss, targets in ((content_loss, maps), (style_loss, gram_matrices(maps))):
        with refuses(f"b is missing and its target {tuple(targets['b'].shape)}"):
            loss({"a": maps["a"]}, targets)
    with refuses("a is (1, 5, 3, 1) and its target (1, 5, 3, 4)"):
        content_loss(wide, {"a": maps["a"]})
    ignored = {"c": torch.ones(2, 5, 3, 4)}  # of two images, and without a target
    assert style_loss(maps | ignored, gram_matrices(maps)) == 0
    with refuses("a is (5, 5) and its target (7, 7)"):
        style_loss(maps, {"a": gram_matrix(maps["b"])})


def test_content_loss_is_zero_at_the_content_and_style_loss_at_the_style(vgg, picture):
    content, style = picture(24, 30, seed=1), picture(24, 30, seed=2) * 0.5  # of one size: they could be mixed up
    objective = make_objective(vgg, content, style, CONTENT_LAYERS, STYLE_LAYERS, 3.0, 500.0)
    _, content_part, style_part = objective(content).tolist()
    assert content_part == pytest.approx(0, abs=1e-9) and style_part > 1e-3
    _, content_part, style_part = objective(style).tolist()
    assert style_part == pytest.approx(0, abs=1e-9) and content_part > 1e-3
    total, content_part, style_part = objective(picture(24, 30)).tolist()
    assert total == pytest.approx(3 * content_part + 500 * style_part, rel=1e-5)


def test_an_image_left_out_costs_nothing(vgg, content, style):
    assert make_objective(vgg, content, None, CONTENT_LAYERS, (), 1.0, 1e4)(content * 0.9)[2] == 0
    assert make_objective(vgg, None, style, (), STYLE_LAYERS, 1.0, 1e4)(content)[1] == 0


def test_the_gradient_by_finite_differences(vgg, picture):
    """Along one direction in the image: normalisation, network and both losses together."""
    image, direction = picture(8, 10), picture(8, 10, seed=3) - 0.5
    objective = make_objective(vgg, picture(8, 10, 1), picture(9, 7, 2), CONTENT_LAYERS, STYLE_LAYERS, 1.0, 10.0)
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf)[0], leaf)
    ahead, behind = (objective(image + step * direction)[0].item() for step in (0.003, -0.003))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 0.006, rel=0.01)


# --- The engine's losses and gradients -----------------------------------------------------------


def one_style(picture, shape):
    """(style, [(mask of a region, {number of a style: its share})])"""
    return picture(29, 46, 2).double(), [(None, {0: 1.0})]


def overlapping_regions(picture, shape):
    """Two styles blended under a soft mask, one under a hard mask and with a mask of its own, one for the rest.

    Values are multiples of 1/32: their averages have no rounding in float32, which the helper computes masks in.
    """
    height, width = shape
    soft = (torch.linspace(-4, 12, width).clamp(0, 8).round() / 8).double().repeat(height, 1)
    soft[height // 3 :] *= 0.25
    hard, part = torch.zeros(shape).double(), torch.zeros(40, 24).double()
    hard[20:, :30] = 1
    part[5:30, 3:20] = 0.5
    rest = (1 - soft - hard).clamp(0, 1)
    assert (soft * hard).any() and rest.any()
    sides = (30, 41), (26, 33), (40, 24), (37, 29)
    images = [picture(*each, seed).double() * 0.9**seed for seed, each in enumerate(sides)]
    styles = (
        Style(images[0], 3.0, soft),
        Style(images[1], 1.0, soft.clone()),
        Style(images[2], 7.0, hard, part),
        Style(images[3], 0.5, rest),
    )
    return styles, [(soft, {0: 0.75, 1: 0.25}), (hard, {2: 1.0}), (rest, {3: 1.0})]


def alike_once_scaled(picture, shape):
    """Two masks that are equal at the shape alone, so they remain two regions, beside one without a mask."""
    images = [picture(*sides, seed).double() * 0.8**seed for seed, sides in enumerate([(30, 41), (26, 33), (19, 28)])]
    masks = torch.ones(8, 9).double(), torch.ones(7, 5).double(), None
    styles = [Style(image, 1.0 + k, mask) for k, (image, mask) in enumerate(zip(images, masks))]
    return styles, [(None, {k: 1.0}) for k in range(3)]


def formulas(network, task, regions, image):
    """(total, content, style) at an image, by the helper; a mask is averaged over the pixels of a layer's positions."""

    def averaged(mask, name):
        return None if mask is None else F.avg_pool2d(mask[None], stride(name))[0]

    def grams(image, mask):
        maps = features(network, image, task.style_layers)
        return {name: gram_matrix(feature_map, averaged(mask, name)) for name, feature_map in maps.items()}

    zero = image.new_zeros(())
    style, content = (
        zero,
        zero + content_loss(*(features(network, x, task.content_layers) for x in (image, task.content))),
    )
    for mask, shares in regions:
        own = grams(image, mask)
        wanted = {k: grams(task.styles[k].image, task.styles[k].image_mask) for k in shares}
        for name, weight in task.style_layers.items():
            target = sum(share * wanted[k][name] for k, share in shares.items())
            area = 1 if mask is None else averaged(mask, name).mean()
            style = style + weight * area * (own[name] - target).square().mean()
    return torch.stack([task.content_weight * content + task.style_weight * style, content, style])


@pytest.mark.parametrize(
    "content_layers, style_layers, styles, shape, share, count, stored",
    [
        (("conv1_1", "conv1_2", "conv2_1"), ("relu1_2", "conv2_2"), one_style, (31, 45), 0.6, 6, False),
        (("relu2_2", "conv_5"), ("conv1_1", "conv2_1", "conv3_1"), overlapping_regions, (45, 70), 0.6, 12, True),
        ((), ("relu1_2", "conv2_1"), alike_once_scaled, (20, 27), 0.9, 6, True),
        (("conv1_1",), (), one_style, (9, 33), 0.4, 4, False),
        (("conv4_1",), ("conv1_1", "relu4_1"), one_style, (8, 26), 0.9, 4, True),
    ],
)
def test_the_engine_finds_losses_and_gradient_of_the_formulas_whole_and_in_tiles(
    content_layers, style_layers, styles, shape, share, count, stored, vgg, picture
):
    """With the graphs of no tile or of two kept, and the content's feature maps stored or computed at each evaluation.

    share: the share of the memory for the whole image that there is.
    """
    network = vgg.cut(deepest((*content_layers, *style_layers)), CPU, "float64")
    content, image = picture(*shape, 8).double(), picture(*shape, 9).double().requires_grad_()
    style, regions = styles(picture, shape)
    layer_weights = {name: 0.5 + k for k, name in enumerate(style_layers)}
    task = Task(content, style, content_layers, layer_weights, 2.0, 700.0)
    expected = formulas(network, task, regions, image)
    (expected_gradient,) = torch.autograd.grad(expected[0], image)
    weights = Weights(*(weight.double() for weight in task.weights))
    target_bytes = sum(8 * network.map_size(name, shape) for name in content_layers)
    budget = share * network.bytes_per_pixel * math.prod(shape) + stored * target_bytes
    for budget_bytes, tiles, kept in ((math.inf, 1, 1), (budget, count, 0), (budget, count, 2)):
        objective = objective_of(network, task, shape, shape, budget_bytes)
        assert len(objective.tiling.tiles) == tiles
        assert (objective.content_maps is not None) == (stored or tiles == 1)
        objective.tiling = objective.tiling._replace(kept=kept)
        losses, gradient = losses_and_gradient(objective, image.detach(), weights)
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-10, atol=0)
        largest = expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("halo, mask", [([], False), ([(..., slice(0, 4), slice(3, 4))], False), ([], True)])
def test_a_gram_sums_gradient_is_right_for_one_that_is_not_symmetric(halo, mask, layout):
    feature_map, root = random_maps(0)["a"].double(), torch.rand(2, 3).double()
    upstream = torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()
    box = (..., slice(1, 3), slice(0, 3)) if mask else (..., slice(0, 3), slice(0, 3 if halo else 4))
    leaves = [feature_map.clone(memory_format=layout).requires_grad_() for _ in range(2)]
    found = gram_sum(leaves[0], halo, Mask(box, root, 0.4) if mask else None)
    rows = (leaves[1][box] * (root if mask else 1)).flatten(2)[0]
    torch.testing.assert_close(found, rows @ rows.T)
    gradients = [torch.autograd.grad((gram * upstream).sum(), x)[0] for gram, x in zip((found, rows @ rows.T), leaves)]
    torch.testing.assert_close(*gradients)


def test_bfloat16_is_summed_in_float32():
    # 0.1^2 * 2^18 = 2621: a bfloat16 sum would stop growing after 256 equal terms.
    feature_map = torch.full((1, 1, 512, 512), 0.1, dtype=torch.bfloat16)
    for found in (square_sum(feature_map), gram_sum(feature_map, [], None)[0, 0]):
        assert found.dtype == torch.float32 and found.item() == pytest.approx(2621, rel=0.01)
