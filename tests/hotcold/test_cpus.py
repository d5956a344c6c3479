"""The number of CPUs: affinity, cgroup quotas as the kernel writes them, and more threads than CPUs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hotcold import cpus
from hotcold.errors import InputError

V2 = "0::/{group}\n"
V1 = "9:name=systemd:/x\n4:cpu,cpuacct:/{group}\n0::/y\n"
MOUNT_V2 = "35 24 0:30 {root} {mount} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
MOUNT_V1 = "32 31 0:29 {root} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
OTHER = "22 1 8:1 / / rw - ext4 /dev/root rw\n29 24 0:27 / /m rw - cgroup cgroup rw,memory\n"


@pytest.fixture
def machine(tmp_path):
    """Makes /proc/PID and a cgroup file system; returns the quotas that are found there."""

    def make(version: int, limits: dict[str, str], group: str, root: str = "/") -> list[float]:
        mount = tmp_path / "cgroup fs"
        for folder, limit in limits.items():
            place = mount / folder
            place.mkdir(parents=True, exist_ok=True)
            if version == 2:
                (place / "cpu.max").write_text(f"{limit}\n")
            else:
                for name, value in zip(("quota", "period"), limit.split(), strict=True):
                    (place / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
        process = tmp_path / "proc"
        process.mkdir()
        (process / "cgroup").write_text((V2 if version == 2 else V1).format(group=group))
        line = (MOUNT_V2 if version == 2 else MOUNT_V1).format(
            root=root, mount=str(mount).replace(" ", "\\040")
        )
        (process / "mountinfo").write_text(OTHER + line)
        return list(cpus._quotas(process))

    return make


@pytest.mark.parametrize(
    ("version", "limits", "group", "root", "expected"),
    [
        (2, {"": "max 100000"}, "", "/", []),
        (2, {"": "150000 100000"}, "", "/", [1.5]),
        (2, {"a/b": "50000 100000"}, "a/b", "/", [0.5]),
        (2, {"a": "400000 100000", "a/b": "max 100000"}, "a/b", "/", [4.0]),
        (2, {"a": "200000 100000", "a/b": "300000 100000", "": "max 1000"}, "a/b", "/", [3.0, 2.0]),
        (2, {"other": "50000 100000"}, "a", "/", []),
        (1, {"": "-1 100000"}, "", "/", []),
        (1, {"docker/1": "200000 100000"}, "docker/1", "/", [2.0]),
        (
            1,
            {"": "200000 100000"},
            "docker/1",
            "/docker/1",
            [2.0],
        ),  # a container's own view
        (1, {"sub": "70000 50000"}, "docker/1/sub", "/docker/1", [1.4]),
    ],
)
def test_quotas_are_read_from_the_group_up_to_the_mount(machine, version, limits, group, root, expected):
    assert machine(version, limits, group, root) == pytest.approx(expected)


@pytest.mark.parametrize("damaged", ["", "max", "x 100000", "100000", "5 0"])
def test_a_limit_that_cannot_be_read_is_none(machine, damaged):
    assert machine(2, {"": damaged}, "") == []


@pytest.mark.parametrize(
    ("quotas", "affinity", "expected"),
    [
        ([], 8, 8),
        ([0.5], 8, 1),
        ([1.0], 8, 1),
        ([2.9], 8, 2),
        ([6.0, 3.5], 8, 3),
        ([16.0], 4, 4),
        ([], 999, 256),
    ],
)
def test_cpus_are_rounded_down_to_one_at_least(monkeypatch, quotas, affinity, expected):
    monkeypatch.setattr(cpus, "_quotas", lambda process: iter(quotas))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    assert cpus.available_cpus() == expected


def test_more_threads_than_cpus_are_capped_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cpus, "available_cpus", lambda: 3)
    monkeypatch.setattr(cpus, "_said", set())
    assert [cpus.thread_count(asked) for asked in (None, 1, 3, 4, 4, 1000)] == [3, 1, 3, 3, 3, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "-t 4: this process has 3 CPUs; running 3 threads",
        "-t 1000: this process has 3 CPUs; running 3 threads",
    ]
    with pytest.raises(InputError, match="at least 1"):
        cpus.thread_count(0)


def test_the_affinity_of_a_process_counts():
    """A real one, bound to one CPU before Python starts."""
    one = min(os.sched_getaffinity(0))
    code = "from hotcold.cpus import available_cpus; print(available_cpus())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )  # fmt: skip
    assert found.stdout == "1\n"


def test_pieces_run_side_by_side_on_one_cpu_each():
    """As many at a time as asked for, results in order; the first error ends it."""
    import threading

    import torch

    meeting = threading.Barrier(3, timeout=30)

    def work(item: int) -> tuple[int, int]:
        if item < 3:
            meeting.wait()  # all three are at work at the same time
        if item == 5:
            raise ValueError("five")
        return item, torch.get_num_threads()

    found = cpus.in_threads(work, range(100), 3)
    assert [next(found) for _ in range(5)] == [(n, 1) for n in range(5)]
    with pytest.raises(ValueError, match="five"):
        next(found)
