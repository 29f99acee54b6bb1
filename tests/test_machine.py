"""What a container and other processes leave of the machine, and how OpenMP's threads wait there."""

import os
import subprocess
import sys
from math import inf
from pathlib import Path
from unittest import mock

import pytest
import torch

from style_transfer import machine
from style_transfer.engine.memory import budget_of, free_memory

GIB, CPU = 2**30, torch.device("cpu")
SHARED = "JUPYTERHUB_USER", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "CI", "PYTEST_XDIST_WORKER"


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """control_groups(membership, {file: content}): this process is now a member of groups that have these files."""

    def enter(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, content in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    return enter


V2 = {
    "memory.max": 6 * GIB, "memory.current": 4 * GIB, "memory.stat": f"anon 7\ninactive_file {GIB}\nfile 5",
    "cpu.max": "250000 100000",
}  # fmt: skip
V2_UNLIMITED = {"memory.max": "max", "memory.current": 4 * GIB, "cpu.max": "max 100000"}
V2_STRICT = V2 | {"memory.max": 5 * GIB, "cpu.max": "90 60"}
V2_CACHED = V2 | {"memory.stat": f"active_file {2 * GIB}\ninactive_file {GIB}"}
V1 = {
    "memory/memory.limit_in_bytes": 7 * GIB, "memory/memory.usage_in_bytes": 4 * GIB,
    "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}",
    "cpu/cpu.cfs_quota_us": 350000, "cpu/cpu.cfs_period_us": 100000,
}  # fmt: skip
V1_UNLIMITED = {"memory/memory.limit_in_bytes": 2**62, "cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}
V1_UNLIMITED |= {"memory/memory.usage_in_bytes": 0}
V1_JOINED = {name.replace("cpu/", "cpu,cpuacct/"): content for name, content in V1.items()}
V1_ROOT = "5:cpu,cpuacct:/\n4:memory:/\n3:cpuset:/other\n1:name=systemd:/x\n0::/\n"
V1_DOCKER = V1_ROOT.replace(":/\n", ":/docker/0123\n")
NONSENSE = {"memory.max": "lots", "cpu.max": "", "memory.stat": "a b c"}


def below(folder, files):
    """The same files in a group further in; in version 1 below each controller's folder."""
    return {str(Path(name).parent / folder / Path(name).name): content for name, content in files.items()}


GROUPS = {  # {what is special: (membership, files, GiB free, processors)}
    "version 2, its root": ("0::/\n", V2, 3, 2.5),
    "no limits inside limits": ("0::/user/lab", V2 | below("user/lab", V2_UNLIMITED), 3, 2.5),
    "limits inside no limits": ("0::/user/lab", V2_UNLIMITED | below("user", V2), 3, 2.5),
    "two limits": ("0::/a", V2 | below("a", V2_STRICT), 2, 1.5),
    "a path seen from outside": ("0::/docker/0123", V2, 3, 2.5),
    "limits of another group": ("0::/mine", V2_UNLIMITED | below("other", V2), inf, inf),
    "more in use than allowed": ("0::/", V2 | {"memory.current": 9 * GIB}, 0, 2.5),
    "version 1": (V1_DOCKER, below("docker/0123", V1), 4, 3.5),
    "version 1, a path seen from outside": (V1_DOCKER, V1, 4, 3.5),
    "version 1 without limits": (V1_ROOT, V1_UNLIMITED | below("other", V1), 2**32, inf),
    "version 1, a folder for two controllers": (V1_ROOT, V1_JOINED, 4, 3.5),
    "both versions": ("3:cpu:/\n0::/\n", below("unified", V2), 3, 2.5),
    "a soft limit": ("0::/", V2 | {"memory.high": 5 * GIB}, 2, 2.5),
    "much cached": ("0::/", V2_CACHED, 5, 2.5),
    "a period of 0": ("0::/", V2 | {"cpu.max": "5000 0"}, 3, inf),
    "no period": ("0::/", V2 | {"cpu.max": "5000"}, 3, inf),
    "a membership without colons": ("nonsense\n", V2, inf, inf),
    "no groups": ("", {}, inf, inf),
    "nonsense": ("0::/\n", NONSENSE, inf, inf),
}


@pytest.mark.parametrize("membership, files, gib, processors", GROUPS.values(), ids=GROUPS)
def test_a_container_leaves_what_its_groups_leave(membership, files, gib, processors, control_groups):
    control_groups(membership, files)
    assert (machine.container_memory(), machine.container_processors()) == (gib * GIB, processors)


def test_free_memory_is_the_smaller_of_the_machines_and_the_containers(control_groups):
    control_groups("0::/", V2 | {"memory.max": 4 * GIB})
    assert free_memory(CPU) == GIB and budget_of(CPU) == int(0.8 * GIB)
    control_groups("0::/", V2_UNLIMITED)
    assert 1e6 < free_memory(CPU) < 1e14


def loads(*running):
    """Stands in for /proc/loadavg: so many tasks want a processor, one reading after the other, again and again."""
    readings = [f"0.5 0.4 0.3 {count}/200 4321\n" for count in running]
    return mock.Mock(**{"read_text.side_effect": readings * 9})


@pytest.mark.parametrize(
    "environment, quota, load, limited",
    [
        ({"HOME": "/"}, "max 100", loads(1), False),
        *[({name: ""}, "max 100", loads(1), True) for name in SHARED],
        ({}, "50 100", loads(1), True),
        ({}, f"{100 * os.cpu_count()} 100", loads(1), False),
        ({}, "max 100", loads(2), True),
        ({}, "max 100", loads(9, 9, 1, 9, 9), False),  # the others woke for a moment
        ({}, "max 100", Path("absent"), False),
        ({}, "max 100", Path(__file__), False),
        ({"CI": "1", "GOMP_SPINCOUNT": "7"}, "50 100", loads(2), False),
        ({"CI": "1", "OMP_WAIT_POLICY": "active"}, "50 100", loads(2), False),
    ],
)
def test_threads_spin_less_where_processors_are_shared_unless_the_user_has_chosen(
    environment, quota, load, limited, control_groups, monkeypatch
):
    control_groups("0::/", {"cpu.max": quota})
    monkeypatch.setattr(machine, "LOAD", load)
    before = dict(environment)
    machine.limit_spinning(environment)
    assert environment == before  # since torch is imported
    monkeypatch.delitem(sys.modules, "torch")
    machine.limit_spinning(environment)
    assert environment == (before | {"GOMP_SPINCOUNT": "10000"} if limited else before)


@pytest.mark.parametrize("chosen, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_it_is_settled_how_threads_wait_before_torch_is_imported(chosen, expected, tmp_path):
    """In a fresh process, where in place of torch a file says how, and ends it."""
    (tmp_path / "torch.py").write_text("import os\nraise SystemExit(os.environ['GOMP_SPINCOUNT'])")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "CI": "1"} | chosen
    command, folder = [sys.executable, "-c", "import nst_utils"], Path(__file__).parents[1]
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.stderr == f"{expected}\n"
