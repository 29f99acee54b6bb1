"""Memory: how much a run needs, how much the device has, and how the C library caches freed blocks."""

import contextlib
import ctypes
import math
import re
import sys
from collections.abc import Iterator

import psutil
import torch

from ..machine import container_memory
from .checks import Shape, UserError, as_number
from .optimiser import HISTORY_SIZE

# Bytes per pixel of the image: for images, gradients, direction and preconditioner during an evaluation; for the same
# and temporaries during an update of the optimiser; for one correction pair.
EVALUATION_BYTES, UPDATE_BYTES, PAIR_BYTES = 160, 190, 24
MIN_HISTORY_SIZE = 2


def divide_budget(budget_bytes: float, shape: Shape) -> tuple[int, float]:
    """(history size, bytes for an evaluation) for images of `shape`."""
    pixels = math.prod(shape)
    affordable = int((budget_bytes - UPDATE_BYTES * pixels) / 3 / (PAIR_BYTES * pixels))
    history_size = max(MIN_HISTORY_SIZE, min(HISTORY_SIZE, affordable))
    return history_size, budget_bytes - (EVALUATION_BYTES + history_size * PAIR_BYTES) * pixels


def budget_of(device: torch.device, memory: float | None = None, processes: int = 1) -> int:
    """How many bytes a run may allocate on `device`: what `memory` GiB for the whole process leave, or what is free.

    Only nine tenths of what `memory` leaves, or four fifths of what is free, since a run's needs are estimates. Free
    memory, except on CUDA, is divided by `processes`. Raises UserError unless `memory` is above 0 and above what is
    already in use.
    """
    if memory is not None:
        memory = as_number(memory, "memory", sys.float_info.min, sys.float_info.max, " of GiB above 0")
        used = used_memory(device)
        if memory * 2**30 <= used:
            raise UserError(f"memory is {memory}: give more GiB, since {used / 2**30:.2f} are already in use")
        return int(0.9 * (memory * 2**30 - used))
    sharing = 1 if device.type == "cuda" else processes
    return int(0.8 * free_memory(device) / sharing)


def used_memory(device: torch.device) -> int:
    """How many bytes this process uses on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what remains reserved counts, in use or not
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """How many bytes can still be allocated on `device`."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return int(min(psutil.virtual_memory().available, container_memory()))


@contextlib.contextmanager
def fitting(shape: Shape, budget_bytes: float, constant: float, device: torch.device) -> Iterator[None]:
    """Raise a UserError that names the size that fits, before too large a run or when memory runs out.

    An image of `shape` needs at least the bytes per pixel of an update with the smallest history, plus `constant` bytes
    for the masks and the smallest tile.
    """
    height, width = shape
    needed = (UPDATE_BYTES + MIN_HISTORY_SIZE * PAIR_BYTES) * height * width
    share = (budget_bytes - constant) / needed

    def advice(share):
        """What fits if this share of the needed memory is available."""
        return f"{device} has memory for about {int(min(shape) * math.sqrt(share))} pixels along the shorter side"

    if share <= 0:
        raise UserError(
            f"{budget_bytes / 2**20:.1f} MiB of memory is too little: at least {constant / 2**20:.1f} are needed"
        )
    if share < 1:
        gib = (needed + constant) / 2**30
        raise UserError(f"an image of {height} x {width} needs about {gib:.1f} GiB: {advice(share)}")
    try:
        yield
    except RuntimeError as error:  # CUDA raises its subclass torch.OutOfMemoryError; other devices have none
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise UserError(f"out of memory for an image of {height} x {width}: {advice(min(share, 0.5))}") from error


# --- The C library's cache -----------------------------------------------------------------------


def keep_freed_memory(below: int = 2**30) -> None:
    """Let the C library keep up to 2 GiB that an evaluation frees for the next one (glibc, so only on Linux).

    Feature maps are freed and allocated all the time. The system zeroes returned memory page by page before it hands it
    out again, which took a third of an evaluation at 512 pixels. Blocks of `below` bytes or more are still
    returned, since they would fragment the heap. Memory kept so far is returned first.
    """
    release_freed_memory()
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: a freed block of at least this size is returned. glibc before 2.35 refuses it.
        if mallopt(-3, below):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the top of the heap beyond this is returned


def release_freed_memory() -> None:
    """Have the C library return its freed memory to the system."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
