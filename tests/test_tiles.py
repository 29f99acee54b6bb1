"""Loss and gradient by tiles are those of the whole, at every layer, size and number of tiles."""

import itertools
import math

import pytest
import torch

from nst_engine import tiles
from nst_engine.evaluation import evaluator
from nst_engine.layers import deepest
from nst_engine.network import cut_network, first_kernels, halo_and_stride, load_vgg19, map_size, memory_per_pixel
from nst_engine.objective import Task, gram_matrices, objective_of
from nst_engine.optimiser import Iterate, ProjectedLBFGS
from nst_engine.prior import spectral_preconditioner
from nst_engine.run import Run
from nst_engine.tiles import Objective, cut_tiles, largest_window, losses_and_gradient, plan_tiles, sum_statistics
from nst_utils import FIRST_FIVE, IMAGES, load_image, transfer_style

CPU = torch.device("cpu")
FIVE = dict.fromkeys(FIRST_FIVE, 1.0)


@pytest.fixture(scope="module")
def network_to(vgg):
    """A function: the network in float64, cut after the deepest of some layers."""
    return lambda layers: cut_network(vgg, deepest(layers), CPU, "float64")


def content_bytes(network, task, shape):
    """What the content's feature maps take in float64."""
    return sum(8 * map_size(network, name, shape) for name in task.content_layers)


@pytest.mark.parametrize(
    "content_layers, style_layers, shape, share, count, stored",
    [
        (("conv1_2",), FIRST_FIVE, (70, 90), 0.26, 30, False),
        (("conv1_2",), FIRST_FIVE, (51, 89), 0.36, 24, True),
        (("conv1_1",), (), (9, 33), 0.4, 4, False),
        (("relu2_2", "conv_7"), (), (61, 90), 0.7, 20, True),
        ((), ("relu3_1", "conv4_1"), (84, 90), 0.9, 30, True),
        (("conv5_2",), ("conv1_1",), (33, 40), 0.9, 9, True),
    ],
)
@pytest.mark.parametrize("kept", [0, 2])
def test_tiles_give_the_loss_and_gradient_of_the_whole(
    content_layers, style_layers, shape, share, count, stored, kept, network_to, picture
):
    """To rounding in float64; with graphs kept or made again, and the content's feature maps stored or made again.

    share: of the memory for the whole image that there is.
    """
    network = network_to((*content_layers, *style_layers))
    content, image, style = (picture(*sides, seed).double() for seed, sides in enumerate((shape, shape, (29, 46))))
    task = Task(content, style, content_layers, {name: 0.5 + k for k, name in enumerate(style_layers)}, 2.0)
    place, needed = content_bytes(network, task, shape), memory_per_pixel(network) * math.prod(shape)

    def found(objective):
        return losses_and_gradient(objective, image, task.weights.double())

    losses, gradient = found(objective_of(network, task, shape, math.inf))
    objective = objective_of(network, task, shape, share * needed + stored * place)
    assert len(objective.tiles) == count and (place <= share * needed / 3) == stored
    losses_of_tiles, gradient_of_tiles = found(objective._replace(kept=kept))
    torch.testing.assert_close(losses_of_tiles, losses, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient_of_tiles, gradient, rtol=0, atol=1e-11 * gradient.abs().max().item())


def test_the_contents_stored_maps_leave_less_memory_for_tiles(network_to, picture):
    """They are stored from a budget of four times their size on: one tile's graph less can then be kept."""
    shape, network = (20, 35), network_to(["conv1_2"])
    task = Task(picture(*shape), None, ("conv1_2",))
    budget = 4 * content_bytes(network, task, shape)
    assert [objective_of(network, task, shape, budget - less).kept for less in (0, 1)] == [0, 1]


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_as_many_graphs_are_kept_as_there_is_memory_for(kept, picture):
    image, tracked = picture(8, 8), []

    def statistics(part, tile):
        tracked.append(torch.is_grad_enabled())
        return [part.square().sum()]

    objective = Objective(statistics, lambda found, weights: torch.stack(found), cut_tiles((8, 8), 4, 0, 4), kept)
    losses, gradient = losses_and_gradient(objective, image, None)
    assert tracked == [True] * kept + [False] * (4 - kept) + [True] * (4 - kept)
    torch.testing.assert_close(gradient, 2 * image)


def test_gram_matrices_of_a_large_style_are_found_in_tiles(network_to, picture):
    network, style = network_to(FIRST_FIVE), picture(46, 61).double()
    whole, parts = (gram_matrices(network, style, FIRST_FIVE, pixels * 7322) for pixels in (46 * 61, 40**2))
    assert memory_per_pixel(network) == pytest.approx(7322, abs=1)
    for name in FIRST_FIVE:
        assert not torch.equal(parts[name], whole[name])
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("side, expected", [(2, [32, 62]), (4, [])])
def test_what_a_pass_over_tiles_freed_is_released_before_the_next(side, expected, picture, monkeypatch):
    """After the first, of 32 tiles, and the second; where of a fourth of them the graphs are kept, it stays."""
    seen, log = [], []

    def statistics(part, tile):
        seen.append(tile)
        return [part.square().sum()]

    monkeypatch.setattr(tiles, "release_freed_memory", lambda: log.append(len(seen)))
    objective = Objective(statistics, lambda found, weights: found[0][None], cut_tiles((8, 16), side, 0, 1), 2)
    losses_and_gradient(objective, picture(8, 16), torch.ones(1))
    assert log == expected


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 100), (255, 33), (300, 301)])
@pytest.mark.parametrize("side, halo, stride", [(16, 8, 4), (64, 12, 4), (512, 128, 16), (1, 2, 1)])
def test_tiles_cover_each_pixel_once_and_windows_reach_a_halo_further(shape, side, halo, stride):
    covered, planned = torch.zeros(shape), cut_tiles(shape, side, halo, stride)
    for tile in planned:
        covered[slice(*tile.rows), slice(*tile.columns)] += 1
        for (first, end), (start, stop), length in zip(tile[:2], tile[2:], shape):
            assert 0 < end - first <= side + 2 * halo and first % stride == start % stride == 0
            assert start == max(0, first - halo) and stop == min(length, end + halo)
    assert (covered == 1).all()
    for windows, length in zip(zip(*(tile[2:] for tile in planned)), shape):
        lengths = {stop - start for start, stop in windows if stop < length or start == 0}
        assert max(lengths) <= side + 2 * halo and (len(lengths) == 1 or side < 4 * halo)


def test_the_halo_is_the_receptive_field_of_the_deepest_layer(vgg):
    """By hand: 1 for each convolution of block 1, 2 of block 2 and so on, rounded up to the layer's stride."""
    for layer, expected in {"conv1_1": (1, 1), "conv1_2": (2, 1), "conv3_1": (12, 4), "conv5_4": (128, 16)}.items():
        assert halo_and_stride(cut_network(vgg, layer, CPU, "float32")) == expected


def test_the_largest_window_has_a_halo_on_all_sides():
    assert largest_window(cut_tiles((100, 100), 32, 8, 4)) == (28 + 16) ** 2


def test_memory_decides_on_the_tiles():
    def plan(budget_bytes):
        planned, kept = plan_tiles((2000, 3000), budget_bytes, 1000.0, 12, 4)
        height, width = planned[0].rows[1], planned[0].columns[1]
        return len(planned), kept, max(height, width)

    assert plan(6e9) == (1, 1, 3000)
    assert plan(5.99e9)[1:] == (int(5.99e9 / (1000 * 280**2)) - 1, 260)
    assert plan(1000 * 281**2)[1:] == (0, 260)
    assert plan(1000 * 279**2)[1:] == (int(279**2 / 152**2) - 1, 136)
    assert 4 <= plan(0)[2] <= 8


# --- Several processes ---------------------------------------------------------------------------


class Ranks:
    """Stands in for torch.distributed: the processes one after the other, and what they all-reduce."""

    def __init__(self, monkeypatch, count):
        self.rank, self.seen = 0, []
        for name, function in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: count,
            "get_rank": lambda: self.rank,
            "all_reduce": self.seen.append,
        }.items():
            monkeypatch.setattr(tiles.dist, name, function)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_the_tiles_and_sum_their_statistics(count, monkeypatch):
    ranks, parts, total = Ranks(monkeypatch, count), cut_tiles((64, 64), 16, 0, 4), 0
    for ranks.rank in range(count):
        (found,) = sum_statistics(lambda tile: [torch.tensor([tile.rows[0] * 64.0 + tile.columns[0]])], parts)
        assert ranks.seen[-1] is found
        total += found
    assert total == sum(row * 64 + column for row, column in itertools.product(range(0, 64, 16), repeat=2))
    assert len(plan_tiles((64, 64), 1e12, 1.0, 4, 4)[0]) >= count


def test_ranks_go_by_the_least_memory_that_one_of_them_has(vgg, content, monkeypatch):
    """Or each would plan tiles of its own."""
    seen = []

    def all_reduce(tensor, op):
        assert op == tiles.dist.ReduceOp.MIN
        seen.append(tensor.item())
        tensor.sub_(12345)

    Ranks(monkeypatch, 2)
    monkeypatch.setattr(tiles.dist, "all_reduce", all_reduce)
    assert [Run(Task(content, None, ("conv1_1",)), vgg=vgg).budget_bytes] == [free - 12345 for free in seen]


def test_an_image_of_fewer_tiles_than_processes_is_refused(monkeypatch, refuses):
    Ranks(monkeypatch, 5)
    with refuses(ValueError, "an image of 8 x 9 is too small to share among 5 processes"):
        plan_tiles((8, 9), 1e12, 1.0, 4, 4)


def loss_and_gradient_of_rank(rank, count, folder):
    """What one process does: join the others, evaluate an image, and store loss and gradient."""
    torch.set_num_threads(1)
    if count > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    image, content, style = torch.rand(3, 1, 3, 50, 77, generator=torch.Generator().manual_seed(0)).split(1)
    task = Task(content, style, ("conv1_2",), FIVE)
    objective = objective_of(cut_network(load_vgg19(device=CPU), "conv3_1", CPU, "float32"), task, (50, 77), 1e12)
    found = losses_and_gradient(objective, image, task.weights)
    torch.save((len(objective.tiles), *found), folder / f"{count} {rank}")
    if count > 1:
        torch.distributed.destroy_process_group()


def test_processes_find_the_loss_and_gradient_that_one_finds(tmp_path):
    """Three, of four tiles: one of them has two."""
    torch.multiprocessing.spawn(loss_and_gradient_of_rank, (3, tmp_path), 3)
    threads = torch.get_num_threads()
    loss_and_gradient_of_rank(0, 1, tmp_path)
    torch.set_num_threads(threads)
    count, losses, gradient = torch.load(tmp_path / "1 0")
    assert count == 1
    for rank in range(3):
        count, losses_of_rank, gradient_of_rank = torch.load(tmp_path / f"3 {rank}")
        assert count == 4
        torch.testing.assert_close(losses_of_rank, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient_of_rank, gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


# --- Whole runs ----------------------------------------------------------------------------------


def test_a_run_in_tiles_is_that_on_the_whole(vgg, content, style):
    """The same start and the same steps, but for rounding."""
    images = []
    for budget_bytes, parts in ((1e12, "whole"), (9e6, "in 12 tiles, the graphs of 0 kept")):
        task = Task(content, style, ("conv1_2",), FIVE)
        run = Run(task, init="content", vgg=vgg, precision="float32")
        run.budget_bytes = budget_bytes
        assert parts in run.describe()
        for _ in range(4):
            step = run.step()
        images.append(run.image)
    assert step.total < 1000
    assert not torch.equal(*images)
    torch.testing.assert_close(*images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("memory", [0, -1.0, math.nan, math.inf, "4"])
def test_a_bad_budget_is_named(memory, settings, content, style, refuses):
    with refuses(ValueError, f"memory is {memory!r}"):
        transfer_style(content, style, memory=memory, **settings)


def jump_at_borders(image, planned):
    """How much neighbours differ across the borders of tiles, as a multiple of how much they do a few pixels away."""
    across, near = [], []
    for spans, side in (({tile.columns for tile in planned}, image), ({tile.rows for tile in planned}, image.mT)):
        steps = (side[..., 1:] - side[..., :-1]).abs().mean((0, 1, 2))
        borders = [first for first, _ in spans if first]
        across += [steps[border - 1] for border in borders]
        near += [steps[border - 1 + away] for border in borders for away in (-4, -3, -2, 2, 3, 4)]
    return (sum(across) / len(across) / (sum(near) / len(near))).item()


def test_an_image_made_in_tiles_shows_no_seam(vgg):
    """Its borders are no sharper than where they would be in the image made whole; without a halo they are."""
    content, style = (
        load_image(IMAGES / name, 48, "cpu") for name in ("content/chenonceau.jpg", "style/starry_night.jpg")
    )
    shape, task = tuple(content.shape[-2:]), Task(content, style, ("conv1_2",), FIVE)
    network = cut_network(vgg, "conv3_1", CPU, "float32")
    objective = objective_of(network, task, shape, 40**2 * memory_per_pixel(network) / 2)  # targets are not stored
    precondition = spectral_preconditioner(first_kernels(vgg), shape, 0.01, CPU)

    def image_made(planned):
        evaluate = evaluator(objective._replace(tiles=planned, kept=len(planned)), content, len(task.weights))
        iterate = Iterate(content.flatten())
        optimiser = ProjectedLBFGS(iterate.x, precondition)
        for _ in range(12):
            iterate = optimiser.step(iterate, lambda x: evaluate(x, task.weights))
        return iterate.x.view_as(content)

    planned = cut_tiles(shape, 16, 12, 4)
    assert len(planned) > 8
    whole, tiled, without = (
        jump_at_borders(image_made(cut_tiles(shape, side, halo, 4)), planned)
        for side, halo in ((64, 12), (16, 12), (16, 0))
    )
    print(whole, tiled, without)
    assert tiled == pytest.approx(whole, rel=0.03)
    assert without > 1.2 * whole
