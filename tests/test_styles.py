"""Several styles: blends are one target, masks make weighted Gram matrices, in tiles and on ranks as on the whole."""

import math

import pytest
import torch

import nst_utils as nst
from nst_utils import features, gram_matrix
from style_transfer.engine.losses import average, mask_of, resize_mask, share_of
from style_transfer.engine.objective import Style, Task, blending, least_memory, objective_of, regions
from style_transfer.engine.run import Run
from style_transfer.engine.tiles import cut_tiles, losses_and_gradient, world_size
from style_transfer.engine.vgg import cut_network, memory_per_pixel

CPU = torch.device("cpu")
LAYERS = {"conv1_1": 0.5, "conv2_1": 2.0, "conv3_1": 1.5}
SHAPE = (45, 70)


@pytest.fixture(scope="module")
def network(vgg):
    return cut_network(vgg, "conv3_1", CPU, "float64")


def ramp(height, width):
    """A soft mask: 0 on the left, 1 on the right, with a hard edge below."""
    mask = torch.linspace(-0.5, 1.5, width).clamp(0, 1).repeat(height, 1)
    mask[height // 3 :] *= 0.25
    return mask


@pytest.fixture(scope="module")
def styles(picture):
    """Four in three regions: two blended in one with a soft mask, one with a hard mask of its own image, one all over.

    They overlap. Each of another size.
    """
    hard = torch.zeros(45, 70)
    hard[20:, :30] = 1
    part = torch.zeros(40, 24)
    part[5:30, 3:20] = 0.5
    images = [
        picture(*sides, seed).double() * 0.9**seed
        for seed, sides in enumerate([(30, 41), (26, 33), (40, 24), (37, 29)])
    ]
    soft = ramp(*SHAPE)
    return (
        Style(images[0], 3.0, soft),
        Style(images[1], 1.0, soft),
        Style(images[2], 7.0, hard, part),
        Style(images[3]),
    )


def plain_style_loss(network, image, styles):
    """By the formulas: each region's weighted Gram matrix against the blend of its styles', by the region's share."""

    def gram(image, mask):
        maps = features(network, image, LAYERS)
        return {name: gram_matrix(maps[name], None if mask is None else average(mask.double(), name)) for name in maps}

    first, second, third, fourth = (gram(style.image, style.image_mask) for style in styles)
    total = 0.0
    for name, weight in LAYERS.items():
        wanted = [0.75 * first[name] + 0.25 * second[name], third[name], fourth[name]]
        for target, mask in zip(wanted, (styles[0].mask, styles[2].mask, None)):
            share = 1.0 if mask is None else average(mask.double(), name).mean()
            total = total + weight * share * (gram(image, mask)[name] - target).square().mean()
    return total


def found(objective, image, task):
    return losses_and_gradient(objective, image, task.weights.double())


def double(styles):
    """The same with masks in float64, to compare to more digits."""
    same = {}
    return tuple(
        Style(*(same.setdefault(id(x), x.double()) if torch.is_tensor(x) else x for x in style)) for style in styles
    )


def test_the_engines_loss_and_gradient_are_those_of_the_formulas(network, styles, picture):
    image = picture(*SHAPE, 9).double().requires_grad_()
    task = Task(None, double(styles), (), LAYERS, 0.0, 700.0)
    losses, gradient = found(objective_of(network, task, SHAPE, math.inf), image.detach(), task)
    expected = 700 * plain_style_loss(network, image, double(styles))
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-9)
    (expected_gradient,) = torch.autograd.grad(expected, image)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-9 * expected_gradient.abs().max().item())


@pytest.mark.parametrize("kept", [0, 2])
def test_tiles_give_the_loss_and_gradient_of_the_whole(kept, network, styles, picture):
    """Among them tiles in which a mask is 0 everywhere, and content besides."""
    content, image = (picture(*SHAPE, seed).double() for seed in (8, 9))
    task = Task(content, double(styles), ("conv1_2",), LAYERS, 2.0, 700.0)
    whole = objective_of(network, task, SHAPE, math.inf)
    tiles = objective_of(network, task, SHAPE, 0.6 * memory_per_pixel(network) * math.prod(SHAPE))
    assert len(whole.tiles) == 1 and len(tiles.tiles) > 4
    hidden = [mask_of(styles[2].mask, tile, "conv3_1", torch.float64, 1.0).root.numel() == 0 for tile in tiles.tiles]
    assert any(hidden) and not all(hidden)
    losses, gradient = found(whole, image, task)
    losses_of_tiles, gradient_of_tiles = found(tiles._replace(kept=kept), image, task)
    torch.testing.assert_close(losses_of_tiles, losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient_of_tiles, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())


def found_by(rank, folder):
    """(losses, gradient) with masks, by one of two processes; or by one alone if `rank` is None."""
    if rank is not None:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    a, b, content, image = torch.rand(4, 1, 3, 30, 100, generator=torch.Generator().manual_seed(0))
    mask = ramp(30, 100)
    task = Task(content, (Style(a, 1.0, mask), Style(b, 1.0, 1 - mask)), ("conv1_2",), LAYERS)
    network = cut_network(nst.load_vgg19(device=CPU), "conv3_1", CPU, "float32")
    objective = objective_of(network, task, (30, 100), 1.7 * 56**2 * 3661 if world_size() > 1 else math.inf)
    result = len(objective.tiles), *losses_and_gradient(objective, image, task.weights)
    if rank is not None:
        torch.distributed.destroy_process_group()
    return result


def store_what_is_found(rank, folder):
    torch.save(found_by(1 + rank, folder), folder / "found")


def test_two_ranks_find_what_one_finds(tmp_path):
    other = torch.multiprocessing.spawn(store_what_is_found, (tmp_path,), join=False)
    count, *mine = found_by(0, tmp_path)
    other.join()
    one, losses, gradient = found_by(None, tmp_path)
    assert (count, one) == (3, 1)
    for each in (mine, torch.load(tmp_path / "found")[1:]):
        torch.testing.assert_close(each[0], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(each[1], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_a_blend_is_one_target_but_for_a_constant(network, picture):
    """sum_k b_k |G - G_k|^2 = |G - sum_k b_k G_k|^2 + constant: so the difference is the same for any two images."""
    styles = [
        Style(picture(20, 24, seed).double() ** (seed + 1), weight) for seed, weight in enumerate((2.0, 1.0, 5.0))
    ]
    blended = Task(None, styles, (), LAYERS, 0.0, 1.0)
    apart = [Task(None, style.image, (), LAYERS, 0.0, style.weight / 8) for style in styles]
    differences, totals = [], []
    for seed in (5, 6, 7):
        image = picture(20, 24, seed).double() ** seed
        losses = [
            found(objective_of(network, task, (20, 24), math.inf), image, task)[0][0].item()
            for task in [blended, *apart]
        ]
        differences.append(sum(losses[1:]) - losses[0])
        totals.append(losses[0])
    assert differences == pytest.approx([differences[0]] * 3, rel=1e-9) and differences[0] > 0
    assert max(totals) > 1.1 * min(totals)


def test_no_mask_is_a_mask_of_ones(network, picture):
    image, style = picture(21, 30).double(), picture(17, 19, 1).double()
    tasks = [
        Task(None, each, (), LAYERS)
        for each in (
            style,
            Style(style, 0.3),
            [Style(style, 1.0, torch.ones(3, 5))],
            Style(style, image_mask=torch.ones(7, 3)),
        )
    ]
    tasks = [nst.as_task(task)._replace(style=double(task.at_scale((21, 30), (21, 30)).styles)) for task in tasks]
    (first, gradient), *others = [found(objective_of(network, task, (21, 30), math.inf), image, task) for task in tasks]
    for losses, other in others:
        torch.testing.assert_close(losses, first, rtol=1e-9, atol=0)
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())


def test_styles_with_equal_masks_are_one_region_and_their_weights_its_shares(picture):
    image, mask = picture(8, 8), ramp(6, 9)
    styles = [Style(image, 3.0, mask), Style(image, 2.0), Style(image, 1.0, mask.clone()), Style(image, 5.0, 1 - mask)]
    styles = nst.as_task(Task(None, styles, (), LAYERS)).styles
    assert regions(styles) == [[0, 2], [1], [3]]
    assert blending(styles) == [0.75, 1.0, 0.25, 1.0]
    assert regions([]) == blending([]) == []


def test_only_where_a_mask_is_above_0_is_computed():
    mask = torch.zeros(40, 60)
    mask[8:21, 30:44] = 0.49
    (tile,) = cut_tiles((40, 60), 64, 0, 4)
    share = share_of(mask, "conv3_1")
    box, root, kept = mask_of(mask, tile, "conv3_1", torch.float64, share)
    assert box == (..., slice(2, 6), slice(7, 11)) and root.shape == (4, 4)
    assert root[1, 1] == pytest.approx(0.7) and root[3, 0] == pytest.approx(math.sqrt(0.49 / 8))
    assert share == kept == pytest.approx(0.49 * 13 * 14 / 2400)
    assert mask_of(None, tile, "conv1_1", torch.float64, 1.0) is None and share_of(None, "conv1_1") == 1


def test_masks_of_any_size_are_resized_and_stay_masks():
    mask = ramp(31, 17)
    assert resize_mask(mask, (31, 17)) is mask and resize_mask(None, (3, 4)) is None
    for shape in ((8, 8), (100, 90), (1, 40)):
        found = resize_mask(mask, shape)
        assert found.shape == shape and 0 <= found.min() <= found.max() <= 1
        assert found.mean().item() == pytest.approx(mask.mean().item(), abs=0.03)


def test_each_region_takes_on_its_own_style(vgg, content, style, settings):
    """Left and right in two styles: each half comes nearer to its own."""
    left = (torch.arange(64) < 32).float().repeat(48, 1)
    other = nst.load_image(nst.IMAGES / "style" / "great_wave.jpg", 40, "cpu")
    result = nst.transfer_style(
        content,
        [nst.Style(style, mask=left), nst.Style(other, mask=1 - left)],
        init="content",
        evaluations=30,
        **settings,
    )
    layer = "conv2_1"
    maps, targets = features(vgg, result.image, layer), [features(vgg, x, layer)[layer] for x in (style, other)]
    for mine, his, mask in ((0, 1, left), (1, 0, 1 - left)):
        gram = gram_matrix(maps[layer], average(mask, layer))
        near, far = ((gram - gram_matrix(targets[k])).square().mean() for k in (mine, his))
        assert near < 0.2 * far


def test_another_blend_keeps_the_targets_and_another_mask_does_not(vgg, content, style):
    """Its loss is at once the new blend's."""
    other, made = content.flip(-1) * 0.5, []
    blends = [(Style(style, 1 - share), Style(other, share)) for share in (0.0, 0.25, 1.0)]
    tasks = [Task(None, blend, (), {"conv1_1": 1.0}, 0.0, 1e4) for blend in blends]
    run = Run(tasks[0], (48, 64), vgg=vgg, init=content, precision="float32")
    run.step()
    for task in tasks:
        run.retarget(task)
        made.append(run.step().total)
        expected = Run(task, (48, 64), vgg=vgg, init=run.image, precision="float32")
        assert expected.step().total == pytest.approx(made[-1], rel=1e-3)
    evaluators = run._evaluators
    assert evaluators
    run.retarget(tasks[1])
    assert run._evaluators is evaluators
    run.retarget(tasks[1]._replace(style=[style, Style(other, mask=ramp(9, 9))]))
    assert not run._evaluators


@pytest.mark.parametrize(
    ("mask", "problem"),
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
def test_a_bad_mask_is_named(mask, problem, content, style, settings, refuses):
    with refuses(problem):
        nst.transfer_style(content, nst.Style(style, mask=mask), **settings)
    with refuses(problem.replace("mask", "image_mask")):
        nst.synthesize_texture(nst.Style(style, image_mask=mask), **settings)


def test_bad_styles_are_named(content, style, settings, refuses):
    for bad, problem in [
        ([], "style is empty"),
        ([style, "wave.jpg"], "style[1] is str"),
        ([Style(style, -1.0), style], "weight of style[0] is -1.0"),
        ([Style(style, 0), Style(style, 0.0)], "weight 0 is all that style[0], style[1] have where they are to go"),
        ([style, Style(style, 0, torch.ones(4, 4))], "weight 0 is all that style[1] have"),
        (Style(style[0]), "style is (3, 40,"),
    ]:
        with refuses(problem):
            nst.transfer_style(content, bad, **settings)


def test_masks_of_truth_values_will_do_and_may_overlap(content, style, settings):
    sky = torch.arange(48)[:, None].expand(48, 64) < 30
    result = nst.transfer_style(content, [Style(style, mask=sky), Style(style.flip(1))], evaluations=3, **settings)
    assert result.image.shape == content.shape and result.image.isfinite().all()


def test_masks_that_are_equal_once_scaled_stay_two_regions(vgg, content, style, settings):
    """As they were given: each has its own target, and the loss is not that of a sum of both."""
    other = content.flip(-1) * 0.5
    tasks = [
        Task(None, [Style(style, mask=torch.ones(8, 8)), Style(other, mask=mask)], (), {"conv1_1": 1.0})
        for mask in (torch.ones(64, 64), torch.ones(64, 64) * 0.999)
    ]
    steps = [Run(task, (48, 64), vgg=vgg, init=content, precision="float32").step() for task in tasks]
    assert steps[0].style == pytest.approx(steps[1].style, rel=0.01)


def test_a_mask_at_a_layer_that_the_image_is_too_small_for_is_refused_in_a_sentence(content, style, settings, refuses):
    with refuses("a 8x8 image is too small for conv5_1"):
        nst.synthesize_texture(Style(style, mask=torch.ones(8, 8)), "conv5_1", shape=(8, 8), **settings)


def test_masks_are_counted_where_memory_is_scarce(network, picture):
    content, style = picture(*SHAPE), picture(20, 20)
    tasks = [Task(content, each, ("conv1_2",), LAYERS) for each in (style, [Style(style, mask=ramp(*SHAPE))])]
    budget = 0.6 * memory_per_pixel(network) * math.prod(SHAPE)
    fewer, more = (len(objective_of(network, task, SHAPE, budget).tiles) for task in tasks)
    assert least_memory(network, tasks[1], SHAPE) - least_memory(network, tasks[0], SHAPE) == 16 * math.prod(SHAPE)
    assert more >= fewer


def test_a_mask_of_truth_values_or_a_new_copy_keeps_the_targets(vgg, content, style):
    """Of a retargeted run: what matters is what a mask holds."""
    mask = torch.arange(48)[:, None].expand(48, 64) < 20
    task = Task(content, [Style(style, mask=mask), Style(style.flip(1), mask=~mask)], ("conv1_2",), {"conv1_1": 1.0})
    run = Run(task, vgg=vgg, precision="float32")
    run.step()
    evaluators = run._evaluators
    run.retarget(task._replace(style_weight=3.0, content=content.clone()))
    assert run._evaluators is evaluators
    run.retarget(task._replace(style=[Style(style, mask=~mask), Style(style.flip(1), mask=mask)]))
    assert not run._evaluators


def test_a_mask_of_another_shape_than_the_feature_map_is_named(refuses):
    with refuses("the mask is (4, 5) and the feature map (5, 4)"):
        gram_matrix(torch.rand(1, 3, 5, 4), torch.ones(4, 5))
