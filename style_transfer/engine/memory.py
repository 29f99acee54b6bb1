"""What a container leaves to this process, of memory and of processors: the control groups of Linux, both versions.

psutil and torch see the whole machine, of which a hub gives each student a part.


Memory: what a run takes, what the device has, and that freed memory is kept for the next evaluation."""

import contextlib
import ctypes
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from .checks import Shape, UserError

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def groups(controller: str) -> Iterator[Path]:
    """The folders of the groups that this process is in, the innermost first; a limit holds for all within it."""
    with contextlib.suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            # Seen from within a container, the path may be the one outside; its own group is then the root.
            inner = Path(path.lstrip("/"))
            if not controllers or controller in controllers.split(","):
                for root in ("", "unified") if not controllers else (controller, controllers):
                    yield from (CGROUPS / root / folder for folder in (inner, *inner.parents))


def number(file: Path, index: int = 0, absent: float = math.inf) -> float:
    """One of the numbers in a file; infinite for "max", which is no limit; `absent` where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float(file.read_text().split()[index].replace("max", "inf"))
    return absent


def memory_left() -> float:
    """How many bytes may still be allocated; what the kernel caches of files makes room and does not count."""
    left = math.inf
    for group in groups("memory"):
        cached = sum(statistic(group / "memory.stat", f"{kind}_file") for kind in ("inactive", "active"))
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it the kernel slows the group down
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            left = min(left, number(group / limit) - number(group / used, absent=0) + cached)
    return max(0.0, left)


def statistic(file: Path, name: str) -> float:
    """The number after a name in a file of lines "name number", of the whole group; 0 if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in file.read_text().splitlines())
        return float(found.get(f"total_{name}", found.get(name, 0)))
    return 0.0


def processors() -> float:
    """How many processors' time this process may use; infinite without a limit."""
    share = math.inf
    for group in groups("cpu"):
        for quota, period in (
            (number(group / "cpu.max"), number(group / "cpu.max", 1)),
            (number(group / "cpu.cfs_quota_us"), number(group / "cpu.cfs_period_us")),
        ):
            if quota > 0 and 0 < period < math.inf:  # -1: no limit
                share = min(share, quota / period)
    return share


def limit_threads() -> None:
    """No more of torch's threads than processors: the others would wait for one another, many times as long."""
    share = processors()
    if torch.get_num_threads() > share:
        torch.set_num_threads(max(1, math.ceil(share)))


# Bytes per pixel of the image: images, gradients, direction and preconditioner during an evaluation; the same during
# an update of the optimiser, with its temporaries; one correction pair.
IN_EVALUATION, IN_UPDATE, PAIR = 160, 190, 24
FEWEST, MOST = 2, 20  # correction pairs


def divide_budget(budget_bytes: float, shape: Shape) -> tuple[int, float]:
    """(history size, bytes for an evaluation) for images of `shape`."""
    pixels = math.prod(shape)
    pairs = max(FEWEST, min(MOST, int((budget_bytes - IN_UPDATE * pixels) / 3 / (PAIR * pixels))))
    return pairs, budget_bytes - (IN_EVALUATION + pairs * PAIR) * pixels


def keep_freed_memory(below: int = 2**30) -> None:
    """Have the C library keep what an evaluation frees for the next one, up to 2 GiB (glibc, so Linux alone).

    Feature maps are freed and allocated all the time. Returned to the system, each of their pages is cleared before it
    comes back, which took a third of an evaluation at 512 pixels. Threads other than the main one, the panel's among
    them, have small heaps of their own and gain little. Blocks of `below` bytes and more are returned: among smaller
    ones they leave gaps in which the next does not fit. What has been kept so far is returned first.
    """
    release_freed_memory()
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: a block of this size or more is returned when freed. Refused before version 2.35.
        if mallopt(-3, below):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this, free at the end of the heap, is returned


def release_freed_memory() -> None:
    """Have the C library return to the system what it keeps."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def budget_of(device: torch.device, memory: float | None = None, processes: int = 1) -> int:
    """How many bytes a run may allocate on `device`, so that the process has `memory` GiB in all, or what is free.

    Nine tenths of what is given, four fifths of what is free, since what a run takes is an estimate; where `processes`
    share what is free, this one's part. Raises UserError if that much is in use already.
    """
    if memory is not None:
        used = used_memory(device)
        if memory * 2**30 <= used:
            raise UserError(f"memory is {memory}: that is too few GiB, since {used / 2**30:.2f} are in use already")
        return int(0.9 * (memory * 2**30 - used))
    return int(0.8 * free_memory(device) / (1 if device.type == "cuda" else processes))


def used_memory(device: torch.device) -> int:
    """How many bytes this process has on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what its allocator has reserved is the process's, whether in use or not
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """How many bytes may still be allocated on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return int(min(psutil.virtual_memory().available, memory_left()))


@contextlib.contextmanager
def fitting(shape: Shape, budget_bytes: float, constant: float, device: torch.device) -> Iterator[None]:
    """Turn too little memory into a UserError that names the size that fits: before work begins where it is foreseen,
    and where it is not, when the device refuses.

    An image of `shape` needs at least so many bytes per pixel as an update with the fewest pairs, and `constant` bytes
    for the smallest tile.
    """
    height, width = shape
    per_pixel = IN_UPDATE + FEWEST * PAIR
    share = (budget_bytes - constant) / (per_pixel * height * width)

    def advice(share):
        """share: of what is needed that is there."""
        return f"{device} has memory for about {int(min(shape) * math.sqrt(share))} pixels along the shorter side"

    if share <= 0:
        raise UserError(f"{budget_bytes / 2**20:.1f} MiB of memory is too little: {constant / 2**20:.1f} is the least")
    if share < 1:
        needed = per_pixel * height * width + constant
        raise UserError(f"an image of {height} x {width} needs about {needed / 2**30:.1f} GiB: {advice(share)}")
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, which is one too, and no class of its own elsewhere
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise UserError(f"out of memory for an image of {height} x {width}: {advice(min(share, 0.5))}") from error
