"""How an image is cut into tiles, what memory decides, and processes that share the tiles.

That the losses and gradient in tiles are those of the whole is tested in test_losses.py.
"""

import datetime
import math

import pytest
import torch

from style_transfer.engine import tiles
from style_transfer.engine.losses import Statistics
from style_transfer.engine.objective import Style, Task, objective_of, style_grams
from style_transfer.engine.run import Run
from style_transfer.engine.tiles import Tiling, cut_tiles, losses_and_gradient, plan_tiles
from style_transfer.engine.vgg import load_vgg19

CPU = torch.device("cpu")


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


def test_a_window_has_a_halo_on_all_sides():
    assert Tiling(cut_tiles((100, 30), 32, 8, 4), 0).largest_window_pixels == (28 + 16) * 30


def test_memory_decides_on_the_tiles():
    def plan(budget_bytes):
        tiling = plan_tiles((2000, 3000), budget_bytes, 1000.0, 12, 4)
        return len(tiling.tiles), tiling.kept, max(tiling.tiles[0].rows[1], tiling.tiles[0].columns[1])

    assert plan(6e9) == (1, 1, 3000)
    assert plan(5.99e9)[1:] == (int(5.99e9 / (1000 * 280**2)) - 1, 260)
    assert plan(1000 * 281**2)[1:] == (0, 260)
    assert plan(1000 * 279**2)[1:] == (int(279**2 / 152**2) - 1, 136)
    assert plan_tiles((90, 50), 0, 1000.0, 12, 4).tiles[0].rows[1] == 4
    assert len(plan_tiles((2000, 3000), 5.99e9, 1000.0, 128, 16).tiles) == 4 * 6  # of 512 pixels, four halos


@pytest.mark.parametrize("halo, stride", [(2, 1), (12, 4), (56, 8), (80, 16), (96, 16), (128, 16)])
def test_every_planned_tile_has_pixels_and_fits(halo, stride):
    """pixels: that memory has space for, a little less than the whole image, and less and less."""
    least = (stride + 2 * halo) ** 2
    for pixels in (0.9 * 200 * 300, 0.5 * 200 * 300, least):
        tiling = plan_tiles((200, 300), pixels, 1.0, halo, stride)
        assert all(first < end for tile in tiling.tiles for first, end in tile[:2])
        assert tiling.largest_window_pixels <= max(pixels, least)


@pytest.mark.parametrize(
    "kept, columns, expected",
    [
        (1, 1, "G L"),
        (0, 4, "ssss R L GGGG R"),
        (1, 4, "Gsss L GGG"),
        (2, 4, "GGss L GG"),
        (4, 4, "GGGG L"),
        (1, 5, "Gssss R L GGGG R"),
    ],
)
def test_graphs_are_kept_as_planned_and_where_few_are_freed_memory_is_released(
    kept, columns, expected, picture, monkeypatch
):
    """Statistics with their graph (G) or without (s), losses (L), and the release of freed memory (R), in order."""

    class SumOfSquares:
        tiling = Tiling(cut_tiles((4, 4 * columns), 4, 0, 4), kept)

        def statistics(self, part, tile):
            events.append("G" if torch.is_grad_enabled() else "s")
            return Statistics([part.square().sum()], [])

        def losses(self, statistics, weights):
            events.append("L")
            return torch.stack(statistics.content)

    image, events = picture(4, 4 * columns), []
    monkeypatch.setattr(tiles, "release_freed_memory", lambda: events.append("R"))
    _, gradient = losses_and_gradient(SumOfSquares(), image, None)
    assert "".join(events) == expected.replace(" ", "")
    torch.testing.assert_close(gradient, 2 * image)


def test_stored_feature_maps_leave_less_memory_for_tiles(vgg, picture):
    """They are stored from a budget of four times their size on: one tile's graph less can then be kept."""
    shape, network = (20, 35), vgg.cut("conv1_2", CPU, "float64")
    task = Task(picture(*shape), None, ("conv1_2",), {})
    budget = 4 * 8 * network.map_size("conv1_2", shape)
    found = [objective_of(network, task, shape, shape, budget - less) for less in (0, 1)]
    assert [objective.tiling.kept for objective in found] == [0, 1]
    assert found[0].content_maps and found[1].content_maps is None


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_gram_matrices_of_a_large_style_are_summed_in_tiles(share, vgg, picture):
    """As many as its own size and the memory ask for."""
    network, style, passes = vgg.cut("conv2_1", CPU, "float64"), picture(30, 41), []
    network.conv1_1.register_forward_hook(lambda *_: passes.append(1))
    style_grams(network, Style(style), ("conv2_1",), share * network.bytes_per_pixel * 30 * 41)
    assert len(passes) == (1 if share == 1 else 6)


@pytest.mark.parametrize("memory", [0, -1.0, math.nan, math.inf, "4"])
def test_a_bad_budget_is_named(memory, vgg, content, refuses):
    with refuses(f"memory is {memory!r}"):
        Run(Task(content, None, "conv1_1"), vgg=vgg, memory=memory)


# --- Several processes ---------------------------------------------------------------------------


@pytest.fixture
def processes(monkeypatch):
    """processes(count): as if this process were one of so many."""

    def pretend(count):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)

    return pretend


def test_there_is_a_tile_for_each_process_or_the_image_is_refused(processes, refuses):
    processes(4)
    assert len(plan_tiles((8, 7), 1e12, 1.0, 4, 4).tiles) == 4
    processes(5)
    with refuses("an image of 8 x 7 is too small to share among 5 processes"):
        plan_tiles((8, 7), 1e12, 1.0, 4, 4)


def run_of(rank, budget_bytes):
    """(budget that the processes agree on, description, steps, image) of a run, by the process with this rank.

    The first has the least memory.
    """
    a, b, content = torch.rand(3, 1, 3, 30, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.linspace(0, 1, 100).repeat(30, 1)
    task = Task(content, (Style(a, 1.0, mask), Style(b, 1.0, 1 - mask)), "conv1_2", ("conv1_1", "conv2_1"))
    run = Run(task, precision="float32", vgg=load_vgg19(device=CPU), memory=60 + 30 * rank)
    agreed, run.budget_bytes = run.budget_bytes, budget_bytes
    steps = [tuple(run.step()) for _ in range(3)]
    return agreed, run.describe(), steps, run.image


def share_run(rank, folder):
    """The same by one of two processes."""
    meeting = {"init_method": f"file://{folder}/meeting", "timeout": datetime.timedelta(minutes=5)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, **meeting)
    try:
        return run_of(rank, 7.9e6)
    finally:
        torch.distributed.destroy_process_group()


def store_shared_run(_, folder):
    torch.save(share_run(1, folder), folder / "found.pt")


def test_a_run_shared_by_two_processes_is_that_of_one(tmp_path):
    """This one and another have three tiles; alone this one has the whole image."""
    other = torch.multiprocessing.spawn(store_shared_run, (tmp_path,), join=False)
    agreed, description, steps, image = share_run(0, tmp_path)
    other.join()
    found = torch.load(tmp_path / "found.pt")
    assert agreed == found[0] <= 0.9 * 60 * 2**30 and "in 3 tiles, graphs kept for 0" in description == found[1]
    assert steps == found[2] and torch.equal(image, found[3])
    _, description, alone, expected = run_of(0, 1e12)
    assert "whole" in description and alone[0][2] > alone[1][2] > alone[2][2]
    for shared, step in zip(steps, alone):
        assert shared[:2] == step[:2] and shared[2:] == pytest.approx(step[2:], rel=1e-4)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-3)
