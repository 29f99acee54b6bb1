"""Too little memory is foreseen where it can be, and answered in one sentence; freed memory is kept."""

import ctypes
import sys

import pytest
import torch

from nst_utils import Run, Task, load_vgg19, reconstruct_content, synthesize_texture
from style_transfer.engine import run as run_module
from style_transfer.engine.memory import (
    EVALUATION_BYTES,
    MIN_HISTORY_SIZE,
    PAIR_BYTES,
    UPDATE_BYTES,
    budget_of,
    divide_budget,
    fitting,
    free_memory,
    keep_freed_memory,
    used_memory,
)
from style_transfer.engine.optimiser import HISTORY_SIZE, ProjectedLBFGS

CPU, GIB = torch.device("cpu"), 2**30
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other ways elsewhere")


@pytest.fixture
def run_with(vgg, content):
    """run_with(budget_bytes, layer="conv1_1"): a reconstruction of 48 x 64 pixels in one scale."""

    def make(budget_bytes, layer="conv1_1"):
        run = Run(Task(content, None, layer), coarse_to_fine=False, vgg=vgg, precision="float32")
        run.budget_bytes = budget_bytes
        return run

    return make


def test_a_size_that_does_not_fit_is_refused_before_any_work(settings, style, refuses):
    with refuses("an image of 100000 x 100001 needs about 2216.6 GiB: cpu has memory for about"):
        synthesize_texture(style, shape=(100_000, 100_001), **settings)


def test_the_size_that_fits_is_named(run_with, vgg, refuses):
    """27 pixels along the shorter side, where the smallest tile and a third of 48 x 64 pixels fit."""
    tile = vgg.cut("conv3_1", CPU, "float32").bytes_per_pixel * (12 + 4 + 12) ** 2
    with refuses("cpu has memory for about 27 pixels along the shorter side"):
        run_with(tile + (UPDATE_BYTES + MIN_HISTORY_SIZE * PAIR_BYTES) * 48 * 64 / 3, "conv3_1").step()
    with refuses("1.4 MiB of memory is too little: at least 2.7 are needed"):
        run_with(tile / 2, "conv3_1").step()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_memory_that_runs_out_is_answered_in_one_sentence(error, refuses):
    with refuses("out of memory for an image of 200 x 100: cpu has memory for about 70 pixels"):
        with fitting((200, 100), 1e12, 0.0, CPU):
            raise error
    with pytest.raises(RuntimeError, match="^something else$"), fitting((100, 200), 1e12, 0.0, CPU):
        raise RuntimeError("something else")


def test_a_budget_is_of_the_whole_process_or_a_share_of_what_is_free(refuses, settings, content):
    for use in (lambda: budget_of(CPU, 0.01), lambda: reconstruct_content(content, memory=0.01, **settings)):
        with refuses("memory is 0.01: give more GiB, since"):
            use()
    assert 1e7 < used_memory(CPU) < 1e11
    assert budget_of(CPU, used_memory(CPU) / GIB + 1) == pytest.approx(0.9 * GIB, rel=0.05)
    for processes in (1, 4):
        assert processes * budget_of(CPU, processes=processes) == pytest.approx(0.8 * free_memory(CPU), rel=0.1)


def test_on_cuda_a_budget_counts_what_is_reserved(monkeypatch, refuses):
    """With stand-ins for the device."""
    emptied, device = [], torch.device("cuda", 0)
    for name, found in {"memory_reserved": 3 * GIB, "memory_allocated": GIB, "mem_get_info": (5 * GIB, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert budget_of(device, 10) == int(0.9 * (10 - 3) * GIB) and emptied
    assert budget_of(device, processes=4) == int(0.8 * (5 + 3 - 1) * GIB)
    with refuses("memory is 1.5: give more GiB, since 3.00 are already in use"):
        budget_of(device, 1.5)


def test_a_budget_is_measured_after_the_network_has_been_loaded(content, monkeypatch):
    order = []
    monkeypatch.setattr(run_module, "load_vgg19", lambda **_: order.append("network") or load_vgg19(device="cpu"))
    monkeypatch.setattr(run_module, "budget_of", lambda *_: order.append("budget") or 2**33)
    Run(Task(content, None, "conv1_1"))
    assert order == ["network", "budget"]


@on_linux
def test_what_is_used_is_what_is_resident():
    import resource  # which Windows does not have

    # The kernel counts in batches, so at the peak itself it may be some pages less.
    assert used_memory(CPU) <= 1.01 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- Within a budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("each, expected", [(100, MIN_HISTORY_SIZE), (UPDATE_BYTES + 361, 5), (1e4, HISTORY_SIZE)])
def test_a_third_of_what_an_update_leaves_is_for_correction_pairs(each, expected):
    """each: bytes per pixel of an image; a pair takes 24."""
    pixels = 1000 * 2000
    history_size, budget_bytes = divide_budget(each * pixels, (1000, 2000))
    assert history_size == expected and budget_bytes == (each - EVALUATION_BYTES - history_size * 24) * pixels


def test_a_run_keeps_as_many_correction_pairs_as_its_budget_allows(run_with):
    run = run_with((UPDATE_BYTES + 3 * 3 * PAIR_BYTES) * 48 * 64)
    for _ in range(6):
        run.step()
    assert len(run.state_dict()["s"]) == 3
    assert ProjectedLBFGS(torch.zeros(3 * 4 * 5), None, 7).history.nbytes == 7 * PAIR_BYTES * 4 * 5


def test_the_estimate_counts_what_a_network_puts_out(vgg):
    """Two layers of 64 channels, before and after ReLU, in float32: 1024 bytes, and 120 % more."""
    assert vgg.cut("conv1_2", CPU, "float32").bytes_per_pixel == pytest.approx(2.2 * 1024)
    assert vgg.cut("conv2_1", CPU, "bfloat16").bytes_per_pixel == pytest.approx(2.2 * (512 + 128))


@pytest.mark.parametrize("budget_bytes, blocks", [(1e12, []), (2e6, [257 * 18**2])])
def test_in_tiles_no_block_larger_than_a_tiles_feature_map_is_kept(budget_bytes, blocks, run_with, monkeypatch):
    """64 float32 per pixel of its window, here 16 pixels wide and one more on each side."""
    asked = []
    monkeypatch.setattr(run_module, "keep_freed_memory", lambda below=None: asked.append(below))
    run_with(budget_bytes).step()
    assert asked == [None, *blocks]


@on_linux
def test_freed_memory_is_kept_for_the_next_evaluation():
    """40 MB in pages of 4 KiB are 10,000 page faults each time they come from the system."""
    import resource

    if not ctypes.CDLL(None).mallopt(-3, 2**30):
        pytest.skip("glibc before 2.35")
    keep_freed_memory()
    faults = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert sum(faults[-6:]) < 1000, faults  # the first ones may still enlarge the heap
