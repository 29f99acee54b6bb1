"""The container's limits on memory and processors, the machine's load, and how OpenMP's threads wait.

It does not import torch, since `limit_spinning` must run before torch is imported.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # control groups of Linux, versions 1 and 2
LOAD = Path("/proc/loadavg")
SPIN_COUNT = 10_000  # about a thirtieth of OpenMP's default
# Set where other processes are likely to share the processors: hubs, Colab, Kaggle, CI, tests in parallel.
SHARED = ("JUPYTERHUB_USER", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "CI", "PYTEST_XDIST_WORKER")


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make waiting OpenMP threads sleep sooner, if the processors are shared.

    By default they spin for milliseconds, which makes an evaluation beside other processes up to twenty times slower.
    Waking them makes an idle machine a tenth slower, so there the default stays, and so do the user's own settings.
    Has no effect once torch is imported.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys()
    shared = set(SHARED) & environment.keys() or container_processors() < (os.cpu_count() or 1)
    if "torch" not in sys.modules and not chosen and (shared or running_tasks() > 1):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def running_tasks() -> int:
    """The number of runnable tasks on the machine, this one included; 0 where it is unknown."""
    running = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _ in range(5):
            running.append(int(LOAD.read_text().split()[3].split("/")[0]))
            time.sleep(0.005)  # the minimum leaves out tasks that run for a moment only
    return min(running, default=0)


def control_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups, innermost first; a group's limit holds for all groups within it."""
    with contextlib.suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            # In a container the path may be the one outside; its own group is then the root.
            inner = Path(path.lstrip("/"))
            for root in (controller, controllers) if controllers else ("", "unified"):
                for folder in (inner, *inner.parents):
                    yield CGROUPS / root / folder


def read_numbers(*files: Path) -> list[float]:
    """The numbers in files; inf for "max", which means no limit; [] if one of the files cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return [float(word.replace("max", "inf")) for file in files for word in file.read_text().split()]
    return []


def container_memory() -> float:
    """The bytes that the container still lets this process allocate; page cache counts as free."""
    free = math.inf
    for group in control_groups("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it the kernel slows the group down
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with contextlib.suppress(ValueError):  # without such a limit
                allowed, taken = read_numbers(group / limit, group / used)
                free = min(free, allowed - taken + cached_bytes(group / "memory.stat"))
    return max(0.0, free)


def cached_bytes(file: Path) -> float:
    """Bytes of page cache in a group, from the lines "name number" of its memory.stat."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in file.read_text().splitlines())
        names = "inactive_file", "active_file"
        return sum(float(found.get(f"total_{name}", found.get(name, 0))) for name in names)  # total: nested groups too
    return 0.0


def container_processors() -> float:
    """The container's CPU limit, in processors; infinite without one."""
    share = math.inf
    for group in control_groups("cpu"):
        numbers = read_numbers(group / "cpu.max")
        numbers = numbers or read_numbers(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, ZeroDivisionError):  # without such a limit
            quota, period = numbers
            if quota > 0:  # -1 means no limit
                share = min(share, quota / period)
    return share
