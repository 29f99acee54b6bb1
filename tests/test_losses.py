import pytest
import torch

import nst_utils
from nst_utils import (
    content_loss,
    features,
    gram_matrices,
    gram_matrix,
    make_objective,
    make_targets,
    style_loss,
    weigh_losses,
    whiten_errors,
    whiten_style,
)

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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["content", "style"])
def test_gradients_are_those_of_the_formulas(kind, channels_last):
    maps, others = random_maps(0), random_maps(1)
    if kind == "content":
        loss, loss64, targets = content_loss, content64, others
    else:
        loss, loss64, targets = style_loss, style64, gram_matrices(others)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    leaves = {name: m.clone(memory_format=layout).requires_grad_() for name, m in maps.items()}
    (3 * loss(leaves, targets)).backward()  # the factor shows that the incoming gradient is used
    expected = finite_differences(lambda m: 3 * loss64(m, targets), {name: m.double() for name, m in maps.items()})
    for name in maps:
        torch.testing.assert_close(leaves[name].grad.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_gram_gradient_for_a_gradient_that_is_not_symmetric():
    feature_map = random_maps(0)["a"]
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(2))
    leaf = feature_map.clone().requires_grad_()
    (gram_matrix(leaf) * weights).sum().backward()
    expected = finite_differences(lambda m: (gram64(m["x"]) * weights).sum(), {"x": feature_map.double()})
    torch.testing.assert_close(leaf.grad.double(), expected["x"], rtol=1e-4, atol=1e-6)


def test_bfloat16_maps_are_summed_in_float32():
    # 0.01^2 * 2^18 = 26.2: a bfloat16 sum would stop growing after 256 equal terms.
    feature_map = torch.full((1, 1, 512, 512), 0.1, dtype=torch.bfloat16)
    loss = content_loss({"x": feature_map}, {"x": torch.zeros_like(feature_map)})
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.01, rel=0.01)
    assert gram_matrix(feature_map).item() == pytest.approx(0.01, rel=0.01)


# --- The objective -------------------------------------------------------------------------------

CONTENT_LAYERS, STYLE_LAYERS = ("conv1_2",), ("relu1_1", "conv2_1")


def test_content_loss_is_zero_at_the_content_and_style_loss_at_the_style(vgg, picture):
    content, style = (
        picture(24, 30, seed=1),
        picture(24, 30, seed=2) * 0.5,
    )  # of one size, so that they could be mixed up
    objective = make_objective(vgg, content, style, CONTENT_LAYERS, STYLE_LAYERS, 1.0, 1e4)
    _, content_part, style_part = objective(content).tolist()
    assert content_part == pytest.approx(0, abs=1e-9) and style_part > 1e-3
    _, content_part, style_part = objective(style).tolist()
    assert style_part == pytest.approx(0, abs=1e-9) and content_part > 1e-3


def test_total_is_the_weighted_sum_of_both_losses(vgg, content, style, picture):
    image = picture(48, 50)
    content = content[..., :50]
    total, content_part, style_part = make_objective(vgg, content, style, CONTENT_LAYERS, STYLE_LAYERS, 3.0, 500.0)(
        image
    ).tolist()
    assert total == pytest.approx(3 * content_part + 500 * style_part, rel=1e-5)
    assert 3 * content_part != pytest.approx(500 * style_part, rel=0.1)
    assert total != pytest.approx(500 * content_part + 3 * style_part, rel=0.1)


def test_a_picture_left_out_costs_nothing(vgg, content, style):
    assert make_objective(vgg, content, None, CONTENT_LAYERS, (), 1.0, 1e4)(content * 0.9)[2] == 0
    assert make_objective(vgg, None, style, (), STYLE_LAYERS, 1.0, 1e4)(content)[1] == 0


def test_the_objectives_gradient_by_finite_differences(vgg, picture):
    """Along one direction in the picture: normalisation, network and both losses together."""
    image, direction = picture(8, 10), picture(8, 10, seed=3) - 0.5
    objective = make_objective(vgg, picture(8, 10, 1), picture(9, 7, 2), CONTENT_LAYERS, STYLE_LAYERS, 1.0, 10.0)
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf)[0], leaf)
    ahead, behind = (objective(image + step * direction)[0].item() for step in (0.003, -0.003))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 0.006, rel=0.01)


# --- Whitened errors -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whitening(vgg, style):
    return whiten_style(vgg, style, STYLE_LAYERS)


def test_the_basis_makes_the_answer_to_noise_and_the_gram_matrix_diagonal(vgg, style, whitening):
    change = 0.01 * torch.randn(style.shape, generator=torch.Generator().manual_seed(0))
    for name, (basis, weights) in whitening.items():
        still, moved = (features(vgg, image, [name])[name].flatten(2)[0].double() for image in (style, style + change))
        answer = (moved - still) @ (moved - still).T
        answer = answer / answer.diagonal().mean() + 0.3 * torch.eye(len(answer))
        unit, rates = basis.T.double() @ answer @ basis.double(), basis.T.double() @ still @ still.T @ basis.double()
        torch.testing.assert_close(unit, torch.eye(len(answer), dtype=torch.float64), atol=5e-3, rtol=0)
        rates = rates / still.numel()
        assert (rates - rates.diag().diag()).abs().max() < 1e-3 * rates.max()
        # What falls fast weighs little: weight^2 * rate is one number for all entries that are not at the bottom.
        sums = rates.diagonal()[:, None] + rates.diagonal()
        even = weights.double().square() * (sums + 0.003 * sums.max())
        assert even.max() / even.min() < 1.05


def test_whitened_errors_are_zero_only_where_the_errors_are(whitening):
    zero = {name: torch.zeros_like(weights) for name, (_, weights) in whitening.items()}
    assert all((error == 0).all() for error in whiten_errors(zero, whitening).values())
    for name, (basis, weights) in whitening.items():
        error = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
        error = error + error.T
        found = whiten_errors({**zero, name: error}, whitening)[name]
        torch.testing.assert_close(found, weights * (basis.T @ error @ basis))
        back = torch.linalg.solve(basis.T.double(), (found / weights).double())
        back = torch.linalg.solve(basis.T.double(), back.T).T
        torch.testing.assert_close(back.float(), error, atol=0.02 * error.abs().max().item(), rtol=0)


def test_a_whitened_objective_puts_its_loss_before_the_others(vgg, style, whitening, picture):
    image = picture(*style.shape[-2:]).requires_grad_()
    targets = make_targets(vgg, None, style, (), STYLE_LAYERS)
    plain = weigh_losses(vgg, *targets, 0.0, 1e4)(image)
    layer_weights = dict(zip(STYLE_LAYERS, (0.5, 2.0)))
    whitened = weigh_losses(vgg, *targets, 0.0, 1e4, None, whitening)(image)
    torch.testing.assert_close(whitened[1:], plain)
    assert weigh_losses(vgg, *targets, 0.0, 1e4, None, whitening)(style)[0] < 1e-6 * whitened[0]
    maps, expected = features(vgg, image, STYLE_LAYERS), {}
    for name, (basis, weights) in whitening.items():
        error = maps[name].flatten(2)[0] @ maps[name].flatten(2)[0].T / maps[name].numel() - targets[1][name]
        expected[name] = ((basis.T @ error @ basis) * weights).square().mean()
    torch.testing.assert_close(whitened[0], sum(expected.values()), rtol=1e-3, atol=0)
    gradients = [
        torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in (whitened[0], sum(expected.values()))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3 * gradients[1].abs().max().item())
    weighed = weigh_losses(vgg, *targets, 0.0, 1e4, layer_weights, whitening)(image)[0]
    torch.testing.assert_close(
        weighed, sum(layer_weights[name] * expected[name] for name in expected), rtol=1e-3, atol=0
    )


def test_a_silent_layer_is_whitened_without_a_nan(vgg, style, monkeypatch):
    """As a ReLU of block 5 may be at a single position."""
    monkeypatch.setattr(nst_utils, "features", lambda *_: {"relu5_4": torch.zeros(1, 8, 1, 1)})
    for matrix in whiten_style(vgg, style, ["relu5_4"])["relu5_4"]:
        assert matrix.isfinite().all()
