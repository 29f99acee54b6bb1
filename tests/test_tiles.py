"""Loss and gradient by tiles are those of the whole, at every layer, size and number of tiles."""

import itertools
import math

import pytest
import torch

from nst_engine import tiles
from nst_engine.evaluation import Objective
from nst_engine.layers import deepest
from nst_engine.network import cut_network, margin_and_step
from nst_engine.optimiser import InverseCurvature
from nst_engine.preparation import (
    FEWEST,
    IN_EVALUATION,
    IN_STEP,
    MOST,
    PAIR,
    Preparation,
    Task,
    gram_matrices,
    objective_of,
)
from nst_engine.tiles import cut, largest_window, loss_and_gradient_of, plan_tiles, sum_tiles
from nst_utils import FIRST_FIVE, IMAGES, load_image, load_vgg19, transfer_style

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network_to(vgg):
    """A function: the network in float64, cut after the deepest of some layers."""
    return lambda layers: cut_network(vgg, deepest(layers), CPU, "float64")


@pytest.fixture
def tiled(monkeypatch):
    """A function: from now on tiles have at most this many pixels to a side, and the graphs of so many are kept."""

    def set_tiles(side, kept=0):
        def plan(shape, room, bytes_per_pixel, margin, step):
            return cut(shape, side, margin, step), kept

        monkeypatch.setattr("nst_engine.preparation.plan_tiles", plan)

    return set_tiles


@pytest.mark.parametrize(
    "content_layers, style_layers, shape, side",
    [
        (("conv1_2",), FIRST_FIVE, (100, 140), 32),
        (("conv1_2",), FIRST_FIVE, (77, 131), 16),
        (("conv1_1",), (), (9, 33), 8),
        (("relu2_2", "conv_7"), (), (61, 90), 32),
        ((), ("relu3_1", "conv4_1"), (90, 100), 48),
        (("conv5_2",), ("conv1_1",), (65, 97), 48),
    ],
)
@pytest.mark.parametrize("kept, room", [(0, 0), (2, 0), (2, math.inf)])
def test_tiles_give_the_loss_and_gradient_of_the_whole(
    content_layers, style_layers, shape, side, kept, room, network_to, picture, tiled
):
    """To rounding in float64; with the content's feature maps stored or found anew, graphs kept or made again."""
    network = network_to((*content_layers, *style_layers))
    content, image = picture(*shape, seed=1).double(), picture(*shape, seed=2).double()
    style = picture(64, 90).double()
    pictures = content if content_layers else None, style if style_layers else None
    weights = torch.tensor([2.0, 1e4, *[1.0] * len(style_layers)], dtype=torch.float64)

    def found(room):
        objective = objective_of(network, *pictures, content_layers, style_layers, shape, room)
        return len(objective.tiles), *loss_and_gradient_of(objective, image, weights)

    count, losses, gradient = found(math.inf)
    assert count == 1
    tiled(side, kept)
    count, losses_of_tiles, gradient_of_tiles = found(room)
    assert count > 3
    torch.testing.assert_close(losses_of_tiles, losses, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradient_of_tiles, gradient, rtol=0, atol=1e-11 * gradient.abs().max().item())


def test_the_contents_stored_maps_leave_less_room_for_tiles(network_to, picture, monkeypatch):
    rooms, content = [], picture(20, 30).double()

    def plan(shape, room, *rest):
        rooms.append(room)
        return cut(shape, 64, 2, 1), 1

    monkeypatch.setattr("nst_engine.preparation.plan_tiles", plan)
    objective_of(network_to(["conv1_2"]), content, None, ("conv1_2",), (), (20, 30), 1e9)
    assert rooms == [1e9 - 64 * 20 * 30 * 8]


@pytest.mark.parametrize("kept", [0, 1, 2, 4])
def test_as_many_graphs_are_kept_as_there_is_memory_for(kept, picture):
    image, tracked = picture(8, 8), []

    def statistics(part, tile):
        tracked.append(torch.is_grad_enabled())
        return [part.square().sum()]

    objective = Objective(statistics, lambda sums, weights: torch.stack(sums), cut((8, 8), 4, 0, 4), kept)
    losses, gradient = loss_and_gradient_of(objective, image, None)
    assert tracked == [True] * kept + [False] * (4 - kept) + [True] * (4 - kept)
    torch.testing.assert_close(gradient, 2 * image)


def test_gram_matrices_of_a_large_style_are_found_in_tiles(network_to, picture, tiled):
    network, style = network_to(FIRST_FIVE), picture(70, 91).double()
    whole = gram_matrices(network, style, FIRST_FIVE, math.inf)
    tiled(16)
    parts = gram_matrices(network, style, FIRST_FIVE, 0)
    for name in FIRST_FIVE:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("side, expected", [(2, [32, 62]), (4, [])])
def test_what_a_pass_over_tiles_freed_goes_back_before_the_next(side, expected, picture, monkeypatch):
    """After the first, of 32 tiles, and the second; where of a fourth of them the graphs are kept, it stays."""
    seen, log = [], []

    def statistics(part, tile):
        seen.append(tile)
        return [part.square().sum()]

    monkeypatch.setattr(tiles, "give_back_freed_memory", lambda: log.append(len(seen)))
    objective = Objective(statistics, lambda sums, weights: sums[0][None], cut((8, 16), side, 0, 1), 2)
    loss_and_gradient_of(objective, picture(8, 16), torch.ones(1))
    assert log == expected


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (17, 100), (255, 33), (300, 301)])
@pytest.mark.parametrize("side, margin, step", [(16, 8, 4), (64, 12, 4), (512, 128, 16), (1, 2, 1)])
def test_tiles_cover_each_pixel_once_and_windows_reach_a_margin_further(shape, side, margin, step):
    covered, planned = torch.zeros(shape), cut(shape, side, margin, step)
    for tile in planned:
        covered[slice(*tile.rows), slice(*tile.columns)] += 1
        for (first, end), (start, stop), length in zip(tile[:2], tile[2:], shape):
            assert 0 < end - first <= side + 2 * margin and first % step == start % step == 0
            assert start == max(0, first - margin) and stop == min(length, end + margin)
    assert (covered == 1).all()
    for windows, length in zip(zip(*(tile[2:] for tile in planned)), shape):
        lengths = {stop - start for start, stop in windows if stop < length or start == 0}
        assert max(lengths) <= side + 2 * margin and (len(lengths) == 1 or side < 4 * margin)


def test_the_margin_is_as_far_as_the_deepest_layer_looks(vgg):
    """By hand: 1 for each convolution of block 1, 2 of block 2 and so on, rounded up to the layer's step."""
    for layer, expected in {"conv1_1": (1, 1), "conv1_2": (2, 1), "conv3_1": (12, 4), "conv5_4": (128, 16)}.items():
        assert margin_and_step(cut_network(vgg, layer, CPU, "float32")) == expected


def test_the_largest_window_has_margins_on_all_sides():
    assert largest_window(cut((100, 100), 32, 8, 4)) == (28 + 16) ** 2


def test_memory_decides_on_the_tiles():
    def plan(room):
        planned, kept = plan_tiles((2000, 3000), room, 1000.0, 12, 4)
        height, width = planned[0].rows[1], planned[0].columns[1]
        return len(planned), kept, max(height, width)

    assert plan(6e9) == (1, 1, 3000)
    assert plan(5.99e9)[1:] == (int(5.99e9 / (1000 * 280**2)) - 1, 260)
    assert plan(1000 * 281**2)[1:] == (0, 260)
    assert plan(1000 * 279**2)[1:] == (int(279**2 / 152**2) - 1, 136)
    assert 4 <= plan(0)[2] <= 8


class Ranks:
    """Stands in for torch.distributed: the processes one after the other, and what they add up."""

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
def test_processes_share_the_tiles_and_add_up(count, monkeypatch):
    ranks, parts = Ranks(monkeypatch, count), cut((64, 64), 16, 0, 4)
    sums = []
    for ranks.rank in range(count):
        found = sum_tiles(lambda tile: [torch.tensor([float(tile.rows[0] * 64 + tile.columns[0])])], parts)
        assert ranks.seen[-1] is found[0]
        sums.append(found[0])
    assert sum(sums) == sum(row * 64 + column for row, column in itertools.product(range(0, 64, 16), repeat=2))
    planned, _ = plan_tiles((64, 64), math.inf if count == 1 else 1e12, 1.0, 4, 4)
    assert len(planned) >= count


def test_processes_go_by_the_least_memory_that_one_of_them_has(settings, monkeypatch):
    """Or each would plan tiles of its own."""

    def all_reduce(tensor, op):
        assert op == tiles.dist.ReduceOp.MIN and tensor == 5000
        tensor.fill_(3000)

    Ranks(monkeypatch, 2)
    monkeypatch.setattr(tiles.dist, "all_reduce", all_reduce)
    monkeypatch.setattr("nst_engine.preparation.memory_to_use", lambda device, memory, processes: 5000)
    assert Preparation(settings["vgg"], CPU).memory == 3000


def test_a_picture_of_fewer_tiles_than_processes_is_refused(monkeypatch, refuses):
    Ranks(monkeypatch, 5)
    with refuses(ValueError, "a picture of 8 x 8 is too small to share out over 5 processes"):
        plan_tiles((8, 8), 1e12, 1.0, 4, 4)


def test_a_run_in_tiles_is_that_on_the_whole(settings, content, style, tiled):
    """The same start and the same steps, but for rounding."""
    runs = []
    for _ in range(2):
        runs.append(transfer_style(content, style, evaluations=4, init="content", **settings))
        tiled(16, 3)
    assert not torch.equal(runs[0].image, runs[1].image)
    torch.testing.assert_close(runs[0].image, runs[1].image, rtol=0, atol=1e-3)


def one_of_several(rank, count, folder, result):
    """What one process does: join the others, evaluate a picture, and store the loss and gradient."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    image, content, style = torch.rand(3, 1, 3, 60, 90, generator=torch.Generator().manual_seed(0)).split(1)
    prepared = Preparation(load_vgg19(device="cpu"), CPU, "float32")
    task = Task(content[0], style[0], ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0))
    evaluate = prepared.evaluation(task, (60, 90), (60, 90), "float32")
    torch.save(evaluate(image.flatten(), torch.tensor([1.0, 1e4, *[1.0] * 5])), f"{result}{rank}")
    torch.distributed.destroy_process_group()


def test_processes_find_the_loss_and_gradient_that_one_finds(tmp_path):
    found = {}
    for count in (1, 2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        torch.multiprocessing.spawn(one_of_several, (count, folder, folder / "of"), count)
        found[count] = [torch.load(folder / f"of{rank}") for rank in range(count)]
    losses, gradient = found[1][0]
    for each in itertools.chain(*found.values()):
        assert each[0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(each[1], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


def test_little_memory_has_few_curvature_pairs(settings, content, style, monkeypatch):
    """In a run each scale has what `divide_memory` gives it, and that is no more than there is."""
    pixels, seen = 1_000_000, []
    prepared = Preparation(settings["vgg"], CPU, "float32")
    for each, expected in ((100, FEWEST), (IN_STEP + 3 * 5 * PAIR, 5), (1e4, MOST)):
        prepared.memory = each * pixels
        pairs, room = prepared.divide_memory((1000, 1000))
        assert pairs == expected and room + (pairs * PAIR + IN_EVALUATION) * pixels == each * pixels
        assert each < IN_STEP or (IN_STEP + pairs * PAIR) * pixels <= prepared.memory

    class Noted(InverseCurvature):
        def __init__(self, precondition, x, memory):
            seen.append(memory)
            super().__init__(precondition, x, memory)

    monkeypatch.setattr("nst_engine.preparation.InverseCurvature", Noted)
    monkeypatch.setattr(Preparation, "divide_memory", lambda self, shape: (7, math.inf))
    transfer_style(content, style, evaluations=1, **settings)
    assert seen == [7]


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


def test_a_picture_made_in_tiles_shows_no_seam(settings, monkeypatch, tiled):
    """Its borders are no sharper than where they would be in the picture made whole; without margins they are."""
    content, style = (
        load_image(IMAGES / name, 64, "cpu") for name in ("content/chenonceau.jpg", "style/starry_night.jpg")
    )
    planned = cut(tuple(content.shape[-2:]), 24, 12, 4)
    assert len(planned) > 8

    def jump():
        result = transfer_style(content, style, init="content", evaluations=20, **settings)
        return jump_at_borders(result.image, planned)

    whole = jump()
    tiled(24, len(planned))
    assert jump() == pytest.approx(whole, rel=0.03)
    monkeypatch.setattr("nst_engine.preparation.margin_and_step", lambda network: (0, 4))
    assert jump() > 1.2 * whole
