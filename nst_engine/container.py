"""What a container leaves to this process, of memory and of processors: the control groups of Linux, both versions.

psutil and torch see the whole machine, of which a hub gives each student a part.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

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
