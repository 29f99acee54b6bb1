"""Memory: what an evaluation needs, what the device has, and that freed memory is kept for the next one."""

import contextlib
import ctypes
import math
import re
import sys

import psutil
import torch


def keep_freed_memory(below=2**30):
    """Have the C library keep what an evaluation frees for the next one, up to 2 GiB (glibc, so Linux alone).

    Feature maps are freed and asked for again all the time. Given back to the system, each of their pages is cleared
    when it returns, which took a third of an evaluation at 512 pixels. Other threads than the main one, the panel's
    among them, have small heaps of their own and gain little. Blocks of `below` bytes and more do go back: among
    smaller ones they leave gaps in which the next has no room. What has been kept so far goes back first.
    """
    give_back_freed_memory()
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: from here on a block is the system's and goes back to it. Before version 2.35 refused.
        if mallopt(-3, below):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this, free at the end of the heap, goes back


def give_back_freed_memory():
    """Have the C library give the system what it keeps."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def memory_to_use(device, gibibytes=None, processes=1):
    """How many bytes may still be asked for on `device`, so that the process has `gibibytes` in all, or what is free.

    Nine tenths of what is given, four fifths of what is free, as what a run needs is an estimate; where `processes`
    share what is free, this one's part.
    """
    if gibibytes is not None:
        used = used_memory(device)
        if gibibytes * 2**30 <= used:
            raise ValueError(
                f"memory is {gibibytes}: so many GiB are too few, as {used / 2**30:.2f} are in use already"
            )
        return int(0.9 * (gibibytes * 2**30 - used))
    return int(0.8 * free_memory(device) / (1 if device.type == "cuda" else processes))


def used_memory(device):
    """How many bytes this process has on `device`."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def free_memory(device):
    """How many bytes may still be asked for on `device`."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


@contextlib.contextmanager
def fitting(shape, free, bytes_per_pixel, constant, device):
    """Turn too little memory into a ValueError that names the size that fits: before work begins where it is foreseen,
    and where it is not, when the device refuses.

    free: bytes; so many are needed for each pixel of a picture of `shape`, and `constant` ones besides.
    """
    height, width = shape
    share = (free - constant) / (bytes_per_pixel * height * width)

    def advice(share):
        """share: of what was asked for that may be asked for."""
        return f"{device} has memory for about {int(min(shape) * math.sqrt(share))} pixels along the shorter side"

    if share <= 0:
        raise ValueError(f"{free / 2**20:.1f} MiB of memory are too few: {constant / 2**20:.1f} are the least")
    if share < 1:
        needed = bytes_per_pixel * height * width + constant
        raise ValueError(f"a picture of {height} x {width} needs about {needed / 2**30:.1f} GiB: {advice(share)}")
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA, which is one too, and no class of its own elsewhere
        if not re.search("out of memory|allocate memory", str(error)):
            raise
        raise ValueError(f"out of memory for a picture of {height} x {width}: {advice(min(share, 0.5))}") from error
