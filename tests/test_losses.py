import math

import pytest
import torch

from nst_utils import content_loss, features, gram_matrices, gram_matrix, make_objective, style_loss
from style_transfer.engine.losses import Target, losses_from, statistics_of
from style_transfer.engine.objective import Task, objective_of
from style_transfer.engine.vgg import cut_network

SHAPES = {"a": (1, 5, 3, 4), "b": (1, 7, 2, 6)}  # C != h * w, h != w


def random_maps(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# The papers' formulas, written out in float64.


def gram64(feature_map):
    c, h, w = feature_map.shape[1:]
    maps = feature_map[0].double()
    return torch.einsum("ihw,jhw->ij", maps, maps) / (c * h * w)


def content64(maps, targets):
    return sum((maps[name].double() - targets[name].double()).square().mean() for name in targets)


def style64(maps, targets):
    return sum((gram64(maps[name]) - targets[name].double()).square().mean() for name in targets)


def test_gram_of_integers_is_exact():
    # Two channels of 1x3 positions. F F^T = [[1+4+9, 1*1-2+0], [-1, 1+1]] and C h w = 6.
    feature_map = torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]]).view(1, 2, 1, 3)
    assert torch.equal(gram_matrix(feature_map), torch.tensor([[14.0, -1.0], [-1.0, 2.0]]) / 6)


@pytest.mark.parametrize("shape", [(1, 5, 3, 4), (1, 3, 5, 2), (1, 4, 2, 2), (1, 1, 3, 2), (1, 6, 1, 1)])
def test_gram_is_the_papers_sum(shape):
    feature_map = random_maps(0, {"x": shape})["x"]
    gram = gram_matrix(feature_map)
    assert gram.shape == (shape[1], shape[1])
    torch.testing.assert_close(gram.double(), gram64(feature_map), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gram, gram.T)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (5, 3, 4), (5, 12)])
def test_gram_of_anything_but_one_feature_map_is_refused(shape, refuses):
    with refuses(f"the feature map is {shape}"):
        gram_matrix(torch.ones(shape))


def test_gram_has_the_precision_of_its_feature_map():
    assert gram_matrix(random_maps(0)["a"].double()).dtype == torch.float64


def test_gram_does_not_depend_on_memory_layout_or_on_where_things_are():
    feature_map = random_maps(1)["a"]
    gram = gram_matrix(feature_map)
    last = feature_map.contiguous(memory_format=torch.channels_last)
    assert last.stride() != feature_map.stride()
    torch.testing.assert_close(gram_matrix(last), gram)
    torch.testing.assert_close(gram_matrix(feature_map.flip(2, 3)), gram)  # positions are averaged away
    torch.testing.assert_close(gram_matrix(feature_map.repeat(1, 1, 2, 3)), gram)  # and sizes with them
    assert gram_matrices({"x": feature_map, "y": last}).keys() == {"x", "y"}


def test_losses_of_integers_are_exact():
    maps = {"x": torch.tensor([[1.0, 2.0, 3.0], [1.0, -1.0, 0.0]]).view(1, 2, 1, 3)}
    target = {"x": torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 3.0]]).view(1, 2, 1, 3)}
    assert content_loss(maps, target).item() == pytest.approx((1 + 0 + 4 + 0 + 1 + 9) / 6, rel=1e-6)
    grams = {"x": torch.tensor([[12.0, 1.0], [1.0, 2.0]]) / 6}
    assert style_loss(maps, grams).item() == pytest.approx((4 + 4 + 4 + 0) / 36 / 4, rel=1e-6)


def test_losses_are_the_papers_formulas():
    maps, others = random_maps(0), random_maps(1)
    assert content_loss(maps, others).item() == pytest.approx(content64(maps, others).item(), rel=1e-5)
    grams = {name: gram64(feature_map) for name, feature_map in others.items()}
    single = {name: gram.float() for name, gram in grams.items()}
    assert style_loss(maps, single).item() == pytest.approx(style64(maps, grams).item(), rel=1e-5)
    only = {"b": others["b"]}  # maps that have no target do not count
    assert content_loss(maps, only).item() == pytest.approx(content64(maps, only).item(), rel=1e-5)


def test_layer_weights_multiply_each_layers_style_loss():
    maps = {name: torch.full((1, 1, 1, 1), value) for name, value in (("conv1_1", 1.0), ("conv2_1", 2.0))}
    targets = {name: torch.zeros(1, 1) for name in maps}  # losses 1 and 16
    assert style_loss(maps, targets).item() == 17
    assert style_loss(maps, targets, {"conv1_1": 0.5, "conv2_1": 2.0}).item() == 32.5


def test_losses_at_the_target_are_zero():
    maps = random_maps(0)
    assert content_loss(maps, maps).item() == 0
    assert style_loss(maps, gram_matrices(maps)).item() == 0


def finite_differences(function, maps, step=1e-4):
    """Central differences of a float64 function, element by element."""
    gradients = {name: torch.zeros_like(feature_map) for name, feature_map in maps.items()}
    for name, feature_map in maps.items():
        for k in range(feature_map.numel()):
            sides = []
            for sign in (1, -1):
                moved = feature_map.clone()
                moved.view(-1)[k] += sign * step
                sides.append(function({**maps, name: moved}))
            gradients[name].view(-1)[k] = (sides[0] - sides[1]) / (2 * step)
    return gradients


def fast_losses(maps, content_targets, style_targets, weights=(1.0, 1.0), layer_weights=None):
    """(total, content, style) by the engine."""
    weights = torch.tensor([*weights, *(layer_weights or dict.fromkeys(style_targets, 1.0)).values(), 1.0])
    statistics = statistics_of(maps, content_targets, style_targets, sizes_of(maps))
    targets = [Target({0: gram}, layer, 1.0) for layer, gram in enumerate(style_targets.values())]
    return losses_from(statistics, targets, weights, len(targets))


def sizes_of(maps):
    return {name: feature_map.numel() for name, feature_map in maps.items()}


def fast_gram_matrices(maps):
    return dict(zip(maps, statistics_of(maps, {}, maps, sizes_of(maps))))


def as_leaves(maps, layout=torch.contiguous_format):
    return {name: feature_map.clone(memory_format=layout).requires_grad_() for name, feature_map in maps.items()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fast_losses_are_the_plain_ones_values_and_gradients(layout):
    maps, others = ({name: x.double() for name, x in random_maps(seed).items()} for seed in (0, 1))
    layer_weights = {"a": 0.5, "b": 2.0}
    grams = gram_matrices(others)
    fast, plain = as_leaves(maps, layout), as_leaves(maps)
    found = fast_losses(fast, others, grams, (3.0, 700.0), layer_weights)
    content, style = content_loss(plain, others), style_loss(plain, grams, layer_weights)
    expected = torch.stack([3 * content + 700 * style, content, style])
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found[0].backward()
    expected[0].backward()
    for name in maps:
        torch.testing.assert_close(fast[name].grad, plain[name].grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast_gram_matrices(maps), gram_matrices(maps), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["content", "style"])
def test_gradients_are_those_of_the_formulas(kind):
    maps, others = ({name: x.double() for name, x in random_maps(seed).items()} for seed in (0, 1))
    targets, plain, formula = others, content_loss, content64
    if kind == "style":
        targets, plain, formula = {name: gram64(x) for name, x in others.items()}, style_loss, style64
    leaves = as_leaves(maps)
    plain(leaves, targets).backward()
    expected = finite_differences(lambda moved: formula(moved, targets), maps)
    for name in maps:
        torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-6, atol=1e-8)


def test_gram_gradient_for_a_gradient_that_is_not_symmetric():
    feature_map = random_maps(0)["a"].double()
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = as_leaves({"x": feature_map})
    (fast_gram_matrices(leaves)["x"] * weights).sum().backward()
    expected = finite_differences(lambda m: (gram64(m["x"]) * weights).sum(), {"x": feature_map})
    torch.testing.assert_close(leaves["x"].grad, expected["x"], rtol=1e-6, atol=1e-8)


def test_bfloat16_maps_are_summed_in_float32():
    # 0.01^2 * 2^18 = 26.2: a bfloat16 sum would stop growing after 256 equal terms.
    maps, zeros = ({"x": torch.full((1, 1, 512, 512), value, dtype=torch.bfloat16)} for value in (0.1, 0.0))
    found = fast_losses(maps, zeros, {})
    assert found.dtype == torch.float32 and found[1].item() == pytest.approx(0.01, rel=0.01)
    assert all(x.dtype == torch.float32 for x in statistics_of(maps, zeros, maps, sizes_of(maps)))  # tiles' are summed
    assert fast_gram_matrices(maps)["x"].item() == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_precision_of_the_feature_map(dtype):
    maps, others = ({name: x.to(dtype) for name, x in random_maps(seed).items()} for seed in (0, 1))
    leaves = as_leaves(maps)
    fast_losses(leaves, others, gram_matrices(random_maps(2)))[0].backward()
    assert all(leaf.grad.dtype == dtype for leaf in leaves.values())


def test_statistics_of_tiles_add_up_to_those_of_the_whole_and_their_halo_has_no_gradient():
    """Tiles of three columns and of one; the window of the first has a halo of one column, that of the other of two."""
    maps, targets = (
        {name: x.double() for name, x in random_maps(seed, {"a": (1, 5, 3, 4)}).items()} for seed in (0, 1)
    )
    whole = as_leaves(maps)
    gradient_of = torch.tensor([[float(i * j + i) for j in range(5)] for i in range(5)]).double()
    expected = statistics_of(whole, targets, ["a"], {"a": 60})
    (7 * expected[0] + (gradient_of * expected[1]).sum()).backward()
    parts, gradient = [], torch.zeros_like(maps["a"])
    for window, halo in ((slice(0, 4), slice(3, 4)), (slice(1, 4), slice(0, 2))):
        leaf, target = maps["a"][..., window].clone().requires_grad_(), targets["a"][..., window]
        part = statistics_of({"a": leaf}, {"a": target}, ["a"], {"a": 60}, {"a": [(..., halo)]}.get)
        (7 * part[0] + (gradient_of * part[1]).sum()).backward()
        assert not leaf.grad[..., halo].any()
        gradient[..., window] += leaf.grad
        parts.append(part)
    torch.testing.assert_close([a + b for a, b in zip(*parts)], expected)
    torch.testing.assert_close(gradient, whole["a"].grad)


CONTENT_LAYERS, STYLE_LAYERS = ("conv1_2",), ("relu1_1", "conv2_1")


def test_content_loss_is_zero_at_the_content_and_style_loss_at_the_style(vgg, picture):
    content, style = picture(24, 30, seed=1), picture(24, 30, seed=2) * 0.5  # of one size: they could be mixed up
    objective = make_objective(vgg, content, style, CONTENT_LAYERS, STYLE_LAYERS, 1.0, 1e4)
    _, content_part, style_part = objective(content).tolist()
    assert content_part == pytest.approx(0, abs=1e-9) and style_part > 1e-3
    _, content_part, style_part = objective(style).tolist()
    assert style_part == pytest.approx(0, abs=1e-9) and content_part > 1e-3


def test_total_is_the_weighted_sum_of_both_losses(vgg, content, style, picture):
    objective = make_objective(vgg, content[..., :50], style, CONTENT_LAYERS, STYLE_LAYERS, 3.0, 500.0)
    total, content_part, style_part = objective(picture(48, 50)).tolist()
    assert total == pytest.approx(3 * content_part + 500 * style_part, rel=1e-5)
    assert 3 * content_part != pytest.approx(500 * style_part, rel=0.1)
    assert total != pytest.approx(500 * content_part + 3 * style_part, rel=0.1)


def test_an_image_left_out_costs_nothing(vgg, content, style):
    assert make_objective(vgg, content, None, CONTENT_LAYERS, (), 1.0, 1e4)(content * 0.9)[2] == 0
    assert make_objective(vgg, None, style, (), STYLE_LAYERS, 1.0, 1e4)(content)[1] == 0


@pytest.mark.parametrize(
    "content_layers, style_layers",
    [
        (("conv1_2",), {"conv1_1": 1.0, "conv1_2": 1.0, "conv2_1": 1.0}),
        (("conv_4", "relu3_1"), {"relu1_1": 0.5, "conv_4": 2.0}),
        (("conv1_1",), {}),
        ((), {"conv3_1": 1.0}),
    ],
)
def test_the_engines_objective_is_the_helpers_values_and_gradients(content_layers, style_layers, vgg, picture):
    """In float64, through the whole network; sizes that pooling does not divide."""
    network, image = cut_network(vgg, "relu3_1", torch.device("cpu"), "float64"), picture(21, 27).double()
    content, style = picture(21, 27, 1).double(), picture(18, 33, 2).double()
    weights = {"content_weight": 3.0, "style_weight": 700.0}
    task = Task(content, style, content_layers, style_layers, **weights)
    leaves = [image.clone().requires_grad_() for _ in range(2)]
    objective = objective_of(network, task, (21, 27), math.inf)
    fast = objective.losses(objective.statistics(leaves[0], *objective.tiles), task.weights)
    plain = make_objective(network, content, style, content_layers, style_layers, *weights.values())(leaves[1])
    if set(style_layers.values()) <= {1.0}:  # the helper's has no weights of single layers
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=0)
        gradients = [torch.autograd.grad(losses[0], leaf)[0] for losses, leaf in zip((fast, plain), leaves)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    targets = gram_matrices(features(network, style, style_layers)) if style_layers else {}
    style_part = style_loss(features(network, image, style_layers), targets, style_layers) if style_layers else 0.0
    assert fast[2].item() == pytest.approx(float(style_part), rel=1e-10)


def test_the_objectives_gradient_by_finite_differences(vgg, picture):
    """Along one direction in the image: normalisation, network and both losses together."""
    image, direction = picture(8, 10), picture(8, 10, seed=3) - 0.5
    objective = make_objective(vgg, picture(8, 10, 1), picture(9, 7, 2), CONTENT_LAYERS, STYLE_LAYERS, 1.0, 10.0)
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf)[0], leaf)
    ahead, behind = (objective(image + step * direction)[0].item() for step in (0.003, -0.003))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 0.006, rel=0.01)
