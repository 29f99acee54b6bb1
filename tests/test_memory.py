"""Too little memory is foreseen where it can be, and answered in one sentence; freed memory is kept."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nst_utils import load_vgg19, reconstruct_content, synthesize_texture
from style_transfer.engine import memory
from style_transfer.engine import run as run_module
from style_transfer.engine.memory import FEWEST, IN_EVALUATION, IN_UPDATE, MOST, PAIR, fitting, limit_threads
from style_transfer.engine.objective import Task
from style_transfer.engine.optimiser import ProjectedLBFGS
from style_transfer.engine.run import Run
from style_transfer.engine.tiles import cut_tiles, largest_window
from style_transfer.engine.vgg import cut_network, memory_per_pixel

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]


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


GIB = 2**30


@pytest.fixture
def container(tmp_path, monkeypatch):
    """container(membership, {file: text}): this process in control groups; returns what they leave, and processors."""

    def enter(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(module, "CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(module, "MEMBERSHIP", tmp_path / "membership")
        return module.memory_left(), module.processors()

    module = sys.modules["style_transfer.engine.memory"]
    return enter


SECOND = {
    "memory.max": 6 * GIB, "memory.current": 4 * GIB, "memory.stat": f"anon 7\ninactive_file {GIB}\nfile 5",
    "cpu.max": "250000 100000",
}  # fmt: skip
FIRST = {
    "memory/memory.limit_in_bytes": 7 * GIB, "memory/memory.usage_in_bytes": 4 * GIB,
    "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}",
    "cpu/cpu.cfs_quota_us": 350000, "cpu/cpu.cfs_period_us": 100000,
}  # fmt: skip
FREE = {"memory.max": "max", "memory.current": 4 * GIB, "cpu.max": "max 100000"}
LONG = {name.replace("cpu/", "cpu,cpuacct/"): text for name, text in FIRST.items()}
READ = {"memory.stat": f"active_file {3 * GIB}\ninactive_file 5"}
NARROW = {"memory.max": 5 * GIB, "cpu.max": "90 60"}
ODD = {"memory.max": "lots", "cpu.max": "", "memory.stat": "a b c"}
HUGE = {"memory/memory.limit_in_bytes": 2**63 - 4096, "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}


def below(folder, files):
    """Files in a group further in; of the first version, below each controller's folder."""
    return {str(Path(name).parent / folder / Path(name).name): text for name, text in files.items()}


ENDLESS = float("inf")
V1 = "5:cpu,cpuacct:/{0}\n4:memory:/{0}\n3:cpuset:/\n1:name=systemd:/x\n0::/\n"
GROUPS = {
    "the second version, its root": ("0::/\n", SECOND, (3 * GIB, 2.5)),
    "a group without limits in one with": ("0::/user/lab", SECOND | below("user/lab", FREE), (3 * GIB, 2.5)),
    "a group with limits in one without": ("0::/user/lab", FREE | below("user", SECOND), (3 * GIB, 2.5)),
    "the narrower of two": (
        "0::/a",
        SECOND | below("a", SECOND | {"memory.max": 5 * GIB, "cpu.max": "90 60"}),
        (2 * GIB, 1.5),
    ),
    "the path outside is not seen within": ("0::/docker/0123", SECOND, (3 * GIB, 2.5)),
    "another's group": ("0::/mine", FREE | below("other", SECOND), (ENDLESS, ENDLESS)),
    "more used than allowed": ("0::/", SECOND | {"memory.current": 9 * GIB}, (0, 2.5)),
    "the first version": (V1.format("docker/0123"), below("docker/0123", FIRST), (4 * GIB, 3.5)),
    "the first version, seen from within": (V1.format("docker/0123"), FIRST, (4 * GIB, 3.5)),
    "the first version without limits": (V1.format(""), HUGE, (2**63 - 4096, ENDLESS)),
    "hybrid": ("3:cpu:/\n0::/\n", below("unified", SECOND), (3 * GIB, 2.5)),
    "without the short name": (V1.format(""), LONG, (4 * GIB, 3.5)),
    "slowed down from": ("0::/", SECOND | {"memory.high": 5 * GIB}, (2 * GIB, 2.5)),
    "files that are read again and again": ("0::/", SECOND | READ, (5 * GIB + 5, 2.5)),
    "no period": ("0::/", SECOND | {"cpu.max": "5000 0"}, (3 * GIB, ENDLESS)),
    "one word": ("0::/", SECOND | {"cpu.max": "5000"}, (3 * GIB, ENDLESS)),
    "no colons": ("nonsense\n", SECOND, (ENDLESS, ENDLESS)),
    "no groups": ("", {}, (ENDLESS, ENDLESS)),
    "what nobody understands": (
        "0::/\n",
        {"memory.max": "lots", "cpu.max": "", "memory.stat": "a b c"},
        (ENDLESS, ENDLESS),
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_a_container_leaves_what_its_groups_leave(case, container):
    membership, files, expected = GROUPS[case]
    assert container(membership, files) == expected


def test_what_is_free_is_the_smaller_of_machine_and_container(container):
    container("0::/", SECOND | {"memory.max": 4 * GIB, "memory.current": 4 * GIB})
    assert memory.free_memory(CPU) == GIB and memory.budget_of(CPU) == int(0.8 * GIB)
    container("0::/", SECOND | {"memory.max": 2**60})
    assert memory.free_memory(CPU) < 2**50


@pytest.mark.parametrize("quota, threads", [("250000 100000", 3), ("50000 100000", 1), ("max 100000", 7), ("9 1", 7)])
def test_there_are_no_more_threads_than_processors(quota, threads, container, monkeypatch):
    container("0::/", {"cpu.max": quota})
    now = [7]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    limit_threads()
    assert now[-1] == threads


def test_threads_are_limited_where_the_package_is_imported():
    """Before anyone computes; a user may ask for more afterwards."""
    code = """
import pathlib, sys
read = pathlib.Path.read_text
files = {"cpu.max": "100000 100000", "cgroup": "0::/"}
pathlib.Path.read_text = lambda self, *a, **k: files.get(self.name) or read(self, *a, **k)
import torch
torch.set_num_threads(5)
import nst_utils
print(torch.get_num_threads())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout == "1\n", out.stderr


@pytest.mark.parametrize("reserved, allocated", [(3 * GIB, GIB), (2 * GIB, 2 * GIB)])
def test_on_cuda_a_budget_counts_what_is_reserved(reserved, allocated, monkeypatch, refuses):
    """With a stand-in for the device."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 16 * GIB))
    device = torch.device("cuda", 0)
    assert memory.budget_of(device, 10) == int(0.9 * (10 * GIB - reserved)) and emptied
    assert memory.budget_of(device, processes=4) == int(0.8 * (5 * GIB + reserved - allocated))
    with refuses(f"memory is 1.5: that is too few GiB, since {reserved / GIB:.2f} are in use already"):
        memory.budget_of(device, 1.5)


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
def test_a_budget_is_measured_when_the_network_is_there(content, monkeypatch):
    """It is in use by then, and what is left is less."""
    order = []
    monkeypatch.setattr(run_module, "load_vgg19", lambda **_: order.append("network") or load_vgg19(device="cpu"))
    monkeypatch.setattr(run_module, "budget_of", lambda *_: order.append("budget") or 2**33)
    Run(Task(content, None, ("conv1_1",)))
    assert order == ["network", "budget"]


def test_what_is_used_is_what_is_resident():
    import resource  # which Windows does not have

    # The kernel counts in batches, so at the peak itself it may be some pages less.
    assert memory.used_memory(CPU) <= 1.01 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


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
