"""What this process may use of the machine: a container's memory and processors, and how OpenMP's threads wait.

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
    """Let OpenMP's threads sleep soon while they wait for each other, if the processors are shared.

    By default they spin for milliseconds, which makes an evaluation beside other processes up to twenty times slower.
    To wake them costs an idle machine a tenth, so there the default stays, as does what the user has set. Without
    effect once torch is imported.
    """
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys()
    shared = set(SHARED) & environment.keys() or container_processors() < (os.cpu_count() or 1)
    if "torch" not in sys.modules and not chosen and (shared or running_tasks() > 1):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def running_tasks() -> int:
    """How many tasks of the machine keep wanting a processor, this one included; 0 where Linux does not say."""
    running = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _ in range(5):
            running.append(int(LOAD.read_text().split()[3].split("/")[0]))
            time.sleep(0.005)  # so that one that wakes for a moment does not count
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
    """The numbers in files; infinite for "max", which means no limit; none if one of the files cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return [float(word.replace("max", "inf")) for file in files for word in file.read_text().split()]
    return []


def container_memory() -> float:
    """How many bytes the container lets this process allocate; memory that caches files counts as free."""
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
    """How much of a group's memory caches files, from lines "name number"."""
    with contextlib.suppress(OSError, ValueError):
        found = dict(line.split() for line in file.read_text().splitlines())
        names = "inactive_file", "active_file"
        return sum(float(found.get(f"total_{name}", found.get(name, 0))) for name in names)  # total: with groups inside
    return 0.0


def container_processors() -> float:
    """How many processors' time the container lets this process use; infinite without a limit."""
    share = math.inf
    for group in control_groups("cpu"):
        numbers = read_numbers(group / "cpu.max")
        numbers = numbers or read_numbers(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
        with contextlib.suppress(ValueError, ZeroDivisionError):  # without such a limit
            quota, period = numbers
            if quota > 0:  # -1 means no limit
                share = min(share, quota / period)
    return share
