"""Loss and gradient by tiles are those of the whole, at every layer, size and number of tiles."""

import datetime
import itertools
import math

import pytest
import torch

from nst_utils import FIRST_FIVE, transfer_style
from style_transfer.engine import tiles
from style_transfer.engine.evaluation import evaluator
from style_transfer.engine.objective import Task, gram_matrices, objective_of
from style_transfer.engine.optimiser import Iterate, ProjectedLBFGS
from style_transfer.engine.prior import spectral_preconditioner
from style_transfer.engine.run import Run
from style_transfer.engine.tiles import (
    Objective,
    cut_tiles,
    largest_window,
    losses_and_gradient,
    plan_tiles,
    sum_statistics,
)
from style_transfer.engine.vgg import (
    cut_network,
    deepest,
    first_kernels,
    halo_and_stride,
    load_vgg19,
    map_size,
    memory_per_pixel,
)

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
        (("conv1_2",), FIRST_FIVE, (70, 90), 0.26, 24, False),
        (("conv1_2",), FIRST_FIVE, (51, 89), 0.36, 18, True),
        (("conv1_1",), (), (9, 33), 0.4, 4, False),
        (("relu2_2", "conv_7"), (), (61, 90), 0.95, 6, True),
        ((), ("relu3_1", "conv4_1"), (96, 102), 0.95, 9, True),
        (("conv5_4",), ("conv1_1",), (33, 40), 0.9, 9, True),
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
    budget = share * needed + stored * place
    objective = objective_of(network, task, shape, budget)
    assert len(objective.tiles) == count and (place <= budget / 4) == stored
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


@pytest.mark.parametrize("shape, expected", [((6, 6), [9, 16]), ((4, 8), [])])
def test_what_a_pass_over_tiles_freed_is_released_before_the_next(shape, expected, picture, monkeypatch):
    """After the first, of 9 tiles, and the second; where of a fourth of them the graphs are kept, of 8, it stays."""
    seen, log = [], []

    def statistics(part, tile):
        seen.append(tile)
        return [part.square().sum()]

    monkeypatch.setattr(tiles, "release_freed_memory", lambda: log.append(len(seen)))
    objective = Objective(statistics, lambda found, weights: found[0][None], cut_tiles(shape, 2, 0, 1), 2)
    losses_and_gradient(objective, picture(*shape), torch.ones(1))
    assert log == expected


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 100), (255, 33), (150, 151)])
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
    assert tiles.smallest_tile(12, 4) == (12 + 4 + 12) ** 2


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
    assert len(plan_tiles((2000, 3000), 5.99e9, 1000.0, 128, 16)[0]) == 4 * 6  # of 512 pixels, four halos


@pytest.mark.parametrize("halo, stride", [(1, 1), (12, 4), (56, 8), (80, 16), (96, 16), (128, 16)])
def test_every_planned_tile_has_pixels_and_fits(halo, stride):
    """`memory` pixels: a little less than the whole image, and less and less. conv5_2 has a halo of 96 pixels."""
    for memory in (0.9 * 350 * 500, 0.5 * 350 * 500, (stride + 2 * halo) ** 2):
        planned, _ = plan_tiles((350, 500), memory, 1.0, halo, stride)
        assert all(first < end for tile in planned for first, end in tile[:2])
        assert largest_window(planned) <= max(memory, (stride + 2 * halo) ** 2)


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
    Ranks(monkeypatch, 4)
    assert len(plan_tiles((8, 7), 1e12, 1.0, 4, 4)[0]) == 4
    Ranks(monkeypatch, 5)
    with refuses("an image of 8 x 7 is too small to share among 5 processes"):
        plan_tiles((8, 7), 1e12, 1.0, 4, 4)


def found_by(rank, folder, budget_bytes):
    """(how many tiles, losses, gradient) of an image, by one of two processes; or by one alone if `rank` is None."""
    if rank is not None:
        where = {"init_method": f"file://{folder}/meet", "timeout": datetime.timedelta(minutes=5)}
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **where)
    image, content, style = torch.rand(3, 1, 3, 30, 100, generator=torch.Generator().manual_seed(0))
    task, network = (
        Task(content, style, ("conv1_2",), FIVE),
        cut_network(load_vgg19(device=CPU), "conv3_1", CPU, "float32"),
    )
    objective = objective_of(network, task, (30, 100), budget_bytes)
    found = len(objective.tiles), *losses_and_gradient(objective, image, task.weights)
    if rank is not None:
        torch.distributed.destroy_process_group()
    return found


def store_what_is_found(rank, folder, budget_bytes):
    torch.save(found_by(1 + rank, folder, budget_bytes), folder / "found")


def test_processes_find_the_loss_and_gradient_that_one_finds(tmp_path):
    """Two, this one and another, of three tiles."""
    budget_bytes = 1.5 * 56**2 * 3661  # for a tile of 32 pixels with its halo
    other = torch.multiprocessing.spawn(store_what_is_found, (tmp_path, budget_bytes), join=False)
    count, *found = found_by(0, tmp_path, budget_bytes)
    other.join()
    count_of_other, *found_by_other = torch.load(tmp_path / "found")
    one, losses, gradient = found_by(None, tmp_path, 1e12)
    assert (count, count_of_other, one) == (3, 3, 1)
    for each in (found, found_by_other):
        torch.testing.assert_close(each[0], losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(each[1], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


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
    with refuses(f"memory is {memory!r}"):
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


def test_an_image_made_in_tiles_shows_no_seam(vgg, content, style):
    """Its borders are no sharper than where they would be in the image made whole; without a halo they are."""
    shape, task = tuple(content.shape[-2:]), Task(content, style, ("conv1_2",), FIVE)
    network = cut_network(vgg, "conv3_1", CPU, "float32")
    objective = objective_of(network, task, shape, 4 * 64 * 4 * 48 * 64 - 1)  # so nothing is stored
    precondition = spectral_preconditioner(first_kernels(vgg), shape, 0.01, CPU)

    def jump(made_in, planned):
        evaluate = evaluator(objective._replace(tiles=made_in, kept=len(made_in)), content.shape[-2:], content.device)
        iterate = Iterate(content.flatten())
        optimiser = ProjectedLBFGS(iterate.x, precondition)
        for _ in range(5):
            iterate = optimiser.step(iterate, lambda x: evaluate(x, task.weights))
        return jump_at_borders(iterate.x.view_as(content), planned)

    whole, planned, without = (cut_tiles(shape, *sides, 4) for sides in ((64, 12), (16, 12), (16, 0)))
    assert (len(whole), len(planned), len(without)) == (1, 12, 12)
    assert jump(planned, planned) == pytest.approx(jump(whole, planned), rel=0.03)
    assert jump(without, without) > 1.2 * jump(whole, without)
