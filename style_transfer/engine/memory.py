"""Memory: what a run needs, what the device has, and a C library that keeps freed memory."""

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

# Bytes per pixel of the image: images, gradients, direction and preconditioner during an evaluation; the same during
# an update of the optimiser, with its temporaries; one correction pair.
EVALUATION_BYTES, UPDATE_BYTES, PAIR_BYTES = 160, 190, 24
MIN_HISTORY_SIZE = 2


def divide_budget(budget_bytes: float, shape: Shape) -> tuple[int, float]:
    """(history size, bytes for an evaluation) for images of `shape`."""
    pixels = math.prod(shape)
    affordable = int((budget_bytes - UPDATE_BYTES * pixels) / 3 / (PAIR_BYTES * pixels))
    history_size = max(MIN_HISTORY_SIZE, min(HISTORY_SIZE, affordable))
    return history_size, budget_bytes - (EVALUATION_BYTES + history_size * PAIR_BYTES) * pixels


def budget_of(device: torch.device, memory: float | None = None, processes: int = 1) -> int:
    """How many bytes a run may allocate on `device`, so that the process has `memory` GiB in all, or what is free.

    Nine tenths of what is given, four fifths of what is free, since what a run needs is an estimate; if `processes`
    share what is free, this one's part. Raises UserError for other numbers, and if that much is in use already.
    """
    if memory is not None:
        memory = as_number(memory, "memory", sys.float_info.min, sys.float_info.max, " of GiB above 0")
        used = used_memory(device)
        if memory * 2**30 <= used:
            raise UserError(f"memory is {memory}: that is too few GiB, since {used / 2**30:.2f} are in use already")
        return int(0.9 * (memory * 2**30 - used))
    sharing = 1 if device.type == "cuda" else processes
    return int(0.8 * free_memory(device) / sharing)


def used_memory(device: torch.device) -> int:
    """How many bytes this process uses on `device`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what its allocator has reserved belongs to the process, in use or not
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
    """Turn too little memory into a UserError that names the size that fits: before the work where it is foreseen, else
    when the device refuses.

    An image of `shape` needs at least the bytes per pixel of an update with the smallest history, and `constant` bytes
    for the smallest tile.
    """
    height, width = shape
    needed = (UPDATE_BYTES + MIN_HISTORY_SIZE * PAIR_BYTES) * height * width
    share = (budget_bytes - constant) / needed

    def advice(share):
        """What to do if this share of the needed memory is there."""
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
    except RuntimeError as error:  # on CUDA torch.OutOfMemoryError, a subclass; elsewhere it has no class of its own
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise UserError(f"out of memory for an image of {height} x {width}: {advice(min(share, 0.5))}") from error


# --- The C library's cache -----------------------------------------------------------------------


def keep_freed_memory(below: int = 2**30) -> None:
    """Let the C library keep what an evaluation frees for the next one, up to 2 GiB (glibc, so only on Linux).

    Feature maps are freed and allocated all the time. Memory returned to the system is cleared page by page before it
    comes back, which took a third of an evaluation at 512 pixels. Threads other than the main one, such as the panel's,
    have small heaps of their own and gain little. Blocks of `below` bytes and more are returned: among smaller ones
    they leave gaps too small for the next. Starts by returning what has been kept so far.
    """
    release_freed_memory()
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: a freed block of at least this size is returned. glibc before 2.35 refuses it.
        if mallopt(-3, below):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this, free at the end of the heap, is returned


def release_freed_memory() -> None:
    """Let the C library return what it keeps to the system."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
