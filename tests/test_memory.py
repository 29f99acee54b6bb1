"""Too little memory is foreseen where it can be, and answered in one sentence; freed memory is kept."""

import ctypes
import sys

import pytest
import torch

from nst_engine import memory, preparation
from nst_engine.memory import fitting, free_memory, keep_freed_memory, memory_to_use, used_memory
from nst_engine.network import cut_network, memory_per_pixel
from nst_engine.optimiser import InverseCurvature
from nst_engine.preparation import FEWEST, IN_STEP, PAIR
from nst_utils import reconstruct_content

CPU = torch.device("cpu")


def test_a_size_that_does_not_fit_is_refused_before_any_work_and_the_one_that_fits_is_named(
    settings, content, monkeypatch, refuses
):
    """48 pixels along the shorter side where there is memory for a tile and a third of that area."""
    network = cut_network(settings["vgg"], "conv1_2", CPU, "float32")
    tile = memory_per_pixel(network) * 5**2  # one pixel, and two to each side
    free = tile + (IN_STEP + FEWEST * PAIR) * content[0, 0].numel() / 3
    monkeypatch.setattr(preparation, "memory_to_use", lambda device, memory, processes: free)
    monkeypatch.setattr(preparation, "objective_of", None)  # nothing is computed
    with refuses(ValueError, "cpu has memory for about 27 pixels along the shorter side"):
        reconstruct_content(content, **settings)
    free = tile / 2
    with refuses(ValueError, f"{free / 2**20:.1f} MiB of memory are too few: {tile / 2**20:.1f} are the least"):
        reconstruct_content(content, **settings)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_memory_that_runs_out_is_answered_in_one_sentence(error, refuses):
    with refuses(ValueError, "out of memory for a picture of 100 x 200: cpu has memory for about 70 pixels"):
        with fitting((100, 200), 1e6, 1.0, 0.0, CPU):
            raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^something else$"):
        with fitting((100, 200), 1e6, 1.0, 0.0, CPU):
            raise RuntimeError("something else")


def test_what_is_free_is_what_this_machine_has():
    assert 1e6 < free_memory(CPU) < 1e14
    assert 1e6 < memory_to_use(CPU) < 0.9 * free_memory(CPU)


def test_a_budget_is_of_the_whole_process(refuses, settings, content):
    assert 1e7 < used_memory(CPU) < 1e11
    with refuses(ValueError, "memory is 0.01: so many GiB are too few, as"):
        memory_to_use(CPU, 0.01)
    with refuses(ValueError, "memory is 0.01: so many GiB are too few, as"):
        reconstruct_content(content, memory=0.01, **settings)
    budget = used_memory(CPU) / 2**30 + 1
    assert memory_to_use(CPU, budget) == pytest.approx(0.9 * 2**30, rel=0.05)


@pytest.mark.parametrize("free, window, expected", [(1e4, 1, []), (2e3, 1, [257])])
def test_in_tiles_no_block_as_large_as_a_picture_is_kept(free, window, expected, settings, content, monkeypatch):
    """Nor more than a tile's largest feature map. All in bytes a pixel; `conv1_2` takes 2253, of `free` ones."""
    pixels, asked = content[0, 0].numel(), []
    monkeypatch.setattr(preparation, "keep_freed_memory", lambda below=None: asked.append(below))
    monkeypatch.setattr(preparation, "memory_to_use", lambda device, memory, processes: free * pixels)
    monkeypatch.setattr(preparation, "largest_window", lambda tiles: window * pixels)
    monkeypatch.setattr(preparation, "LARGE", 0)
    reconstruct_content(content, evaluations=1, coarse_to_fine=False, **settings)
    assert asked == [None, *(each * pixels for each in expected)]


def test_processes_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e9)
    assert memory_to_use(CPU, processes=4) == 2e8


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is in bytes elsewhere")
def test_what_is_used_is_what_is_resident():
    import resource  # which Windows does not have

    assert used_memory(CPU) <= 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_curvature_pair_is_counted_as_it_is_stored():
    assert InverseCurvature(None, torch.zeros(3 * 4 * 5), 7).pairs.nbytes == 7 * PAIR * 4 * 5


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
    keep_freed_memory()
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-6:]) < 1000, faults  # the first ones may still enlarge the heap
