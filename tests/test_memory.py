"""Too little memory is foreseen where it can be, and answered in one sentence; freed memory is kept."""

import ctypes
import sys

import pytest
import torch

from nst_engine import memory
from nst_engine import run as run_module
from nst_engine.memory import FEWEST, IN_EVALUATION, IN_UPDATE, MOST, PAIR, fitting
from nst_engine.network import cut_network, memory_per_pixel
from nst_engine.objective import Task
from nst_engine.optimiser import ProjectedLBFGS
from nst_engine.run import Run
from nst_engine.tiles import cut_tiles, largest_window
from nst_utils import reconstruct_content, synthesize_texture

CPU = torch.device("cpu")


@pytest.fixture
def run_with(vgg, content):
    """A function: a run in this budget of memory, of the content's `layer` at its full size."""

    def make(budget_bytes, layer="conv1_1"):
        run = Run(Task(content, None, (layer,)), coarse_to_fine=False, vgg=vgg, precision="float32")
        run.budget_bytes = budget_bytes
        return run

    return make


def test_a_size_that_does_not_fit_is_refused_before_any_work(settings, style, refuses):
    with refuses("an image of 100000 x 100001 needs about 2216.6 GiB: cpu has memory for about"):
        synthesize_texture(style, shape=(100_000, 100_001), **settings)


def test_the_size_that_fits_is_named(run_with, vgg, refuses):
    """27 pixels along the shorter side where there is memory for the smallest tile and a third of 48 x 64 pixels."""
    tile = memory_per_pixel(cut_network(vgg, "conv3_1", CPU, "float32")) * (4 + 2 * 12) ** 2
    with refuses("cpu has memory for about 27 pixels along the shorter side"):
        run_with(tile + (IN_UPDATE + FEWEST * PAIR) * 48 * 64 / 3, "conv3_1").step()
    with refuses("1.4 MiB of memory is too little: 2.7 is the least"):
        run_with(tile / 2, "conv3_1").step()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_memory_that_runs_out_is_answered_in_one_sentence(error, refuses):
    with refuses("out of memory for an image of 100 x 200: cpu has memory for about 70 pixels"):
        with fitting((100, 200), 1e12, 0.0, CPU):
            raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^something else$"):
        with fitting((100, 200), 1e12, 0.0, CPU):
            raise RuntimeError("something else")


def test_what_is_free_is_what_this_machine_has():
    assert 1e6 < memory.free_memory(CPU) < 1e14
    assert 1e6 < memory.budget_of(CPU) < 0.9 * memory.free_memory(CPU)


def test_processes_share_what_is_free():
    assert 4 * memory.budget_of(CPU, processes=4) == pytest.approx(memory.budget_of(CPU), rel=0.3)


def test_a_budget_is_of_the_whole_process(refuses, settings, content):
    assert 1e7 < memory.used_memory(CPU) < 1e11
    for use in (lambda: memory.budget_of(CPU, 0.01), lambda: reconstruct_content(content, memory=0.01, **settings)):
        with refuses("memory is 0.01: that is too few GiB, since"):
            use()
    budget = memory.used_memory(CPU) / 2**30 + 1
    assert memory.budget_of(CPU, budget) == pytest.approx(0.9 * 2**30, rel=0.05)


@pytest.mark.parametrize("budget_bytes, side", [(1e12, None), (2e6, 16)])
def test_in_tiles_no_block_as_large_as_an_image_is_kept(budget_bytes, side, run_with, monkeypatch):
    """Nor any larger than a tile's largest feature map, 64 float32 per pixel of its window."""
    asked = []
    monkeypatch.setattr(run_module, "keep_freed_memory", lambda below=None: asked.append(below))
    monkeypatch.setattr(run_module, "LARGE", 0)
    run_with(budget_bytes).step()
    assert asked == [None, *([257 * largest_window(cut_tiles((48, 64), side, 1, 1))] if side else [])]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in bytes elsewhere")
def test_what_is_used_is_what_is_resident():
    import resource  # which Windows does not have

    assert memory.used_memory(CPU) <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_correction_pair_is_counted_as_it_is_stored():
    assert ProjectedLBFGS(torch.zeros(3 * 4 * 5), None, 7).history.nbytes == 7 * PAIR * 4 * 5


@pytest.mark.parametrize("each, expected", [(100, FEWEST), (IN_UPDATE + 3 * 5 * PAIR, 5), (1e4, MOST)])
def test_little_memory_has_few_correction_pairs(each, expected):
    """each: bytes per pixel. A third of what an update leaves is for pairs."""
    pixels = 1000 * 2000
    history_size, budget_bytes = memory.divide_budget(each * pixels, (1000, 2000))
    assert history_size == expected and budget_bytes == (each - IN_EVALUATION - history_size * PAIR) * pixels
    assert each < IN_UPDATE or IN_UPDATE + history_size * PAIR <= each


def test_a_run_keeps_as_many_correction_pairs_as_its_budget_allows(run_with):
    run = run_with((IN_UPDATE + 3 * 3 * PAIR) * 48 * 64)
    for _ in range(7):
        run.step()
    assert len(run.state_dict()["optimiser.s"]) == 3


def test_the_estimate_counts_what_a_network_puts_out(vgg):
    """Two layers of 64 channels, before and after ReLU, in float32: 1024 bytes, and as much again and a fifth."""
    assert memory_per_pixel(cut_network(vgg, "conv1_2", CPU, "float32")) == pytest.approx(2.2 * 1024)
    assert memory_per_pixel(cut_network(vgg, "conv2_1", CPU, "bfloat16")) == pytest.approx(2.2 * (512 + 128))


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_is_kept_for_the_next_evaluation():
    """40 MB in pages of 4 KiB are 10,000 page faults each time they come from the system."""
    import resource  # which Windows does not have

    if not ctypes.CDLL(None).mallopt(-3, 2**30):
        pytest.skip("glibc before 2.35")
    memory.keep_freed_memory()
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-6:]) < 1000, faults  # the first ones may still enlarge the heap
