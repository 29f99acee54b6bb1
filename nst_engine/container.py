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
    with contextlib.suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS if not controllers else CGROUPS / controller
            if not controllers or controller in controllers.split(","):
                # Seen from within a container, the path may be the one outside; its own group is then the root.
                inner = Path(path.lstrip("/"))
                yield from (root / folder for folder in (inner, *inner.parents))


def number(file: Path, index: int = 0, absent: float = math.inf) -> float:
    """One of the numbers in a file; infinite for "max", which is no limit; `absent` where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return float(file.read_text().split()[index].replace("max", "inf"))
    return absent


def memory_left() -> float:
    """How many bytes may still be allocated; what the kernel caches of files makes room and does not count."""
    left = math.inf
    for group in groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            in_use = number(group / used, absent=0) - statistic(group / "memory.stat", cached)
            left = min(left, number(group / limit) - in_use)
    return max(0.0, left)


def statistic(file: Path, name: str) -> float:
    """The number after a name in a file of lines "name number"; 0 if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        return float(dict(line.split() for line in file.read_text().splitlines()).get(name, 0))
    return 0.0


def processors() -> float:
    """How many processors' time this process may use; infinite without a limit."""
    share = math.inf
    for group in groups("cpu"):
        share = min(share, number(group / "cpu.max") / number(group / "cpu.max", 1))
        quota = number(group / "cpu.cfs_quota_us")
        if quota > 0:  # -1: no limit
            share = min(share, quota / number(group / "cpu.cfs_period_us"))
    return share


def limit_threads() -> None:
    """No more of torch's threads than processors: the others would wait for one another, many times as long."""
    share = processors()
    if torch.get_num_threads() > share:
        torch.set_num_threads(max(1, math.ceil(share)))
