"""How much memory there is: every kind of bound, from /proc and cgroup files as kernels write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmh.machine.limits import UNLIMITED, cpu_time_is_rationed, tasks_left
from dmh.machine.memory import group_directories, memory_groups, rooms

MIB = 1 << 20


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A /proc of a machine of 8 GiB without cgroups."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "sys/vm").mkdir(parents=True)
    (proc / "sys/vm/overcommit_memory").write_text("0\n")
    (proc / "self/cgroup").write_text("0::/\n")
    (proc / "self/mountinfo").write_text("")
    memory(proc)
    return proc


def memory(proc: Path, **fields: int) -> None:
    """Write meminfo; sizes in MiB."""
    info = {
        "MemTotal": 8192,
        "MemAvailable": 6144,
        "SwapTotal": 0,
        "SwapFree": 0,
        "CommitLimit": 4096,
        "Committed_AS": 1024,
    }
    lines = [f"{name}:{size * 1024:>15} kB\n" for name, size in (info | fields).items()]
    (proc / "meminfo").write_text("".join(lines) + "HugePages_Total:       0\n")


def v2(proc: Path, root: Path, path: str, mounted: str = "/", **files: object) -> Path:
    """A cgroup v2 of this process with these files, "__" for a dot."""
    (proc / "self/cgroup").write_text(f"0::{path}\n")
    (proc / "self/mountinfo").write_text(
        f"31 23 0:28 {mounted} {root} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    directory = root / path.removeprefix(mounted).lstrip("/")
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")
    return directory


def test_without_other_bounds_it_is_what_the_machine_has_available(proc: Path) -> None:
    (room,) = rooms(proc)
    assert room.bytes == 6144 * MIB
    assert "MemAvailable of 8.0 GiB in all" in room.bound


def test_free_swap_counts_because_nobody_is_killed_while_there_is_some(proc: Path) -> None:
    memory(proc, SwapTotal=4096, SwapFree=1024)
    (room,) = rooms(proc)
    assert room.bytes == 7168 * MIB
    assert "1.0 GiB of free swap" in room.bound


def test_with_strict_overcommit_the_commit_limit_counts(proc: Path) -> None:
    (proc / "sys/vm/overcommit_memory").write_text("2\n")
    assert rooms(proc)[0].bytes == 3072 * MIB
    assert "commit limit" in rooms(proc)[0].bound


def test_a_cgroup_v2_counts_its_file_cache_as_free(proc: Path, tmp_path: Path) -> None:
    stat = f"anon 1\nfile {300 * MIB}\nshmem {100 * MIB}\ninactive_file {150 * MIB}\nactive_file {50 * MIB}\n"
    group = v2(proc, tmp_path / "cgroup", "/job", memory__max=512 * MIB, memory__current=400 * MIB, memory__stat=stat)
    tightest = rooms(proc)[0]
    assert tightest.bytes == (512 - 400 + 200) * MIB
    assert str(group) in tightest.bound


def test_a_group_further_up_bounds_too(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    v2(proc, root, "/job", memory__max=256 * MIB, memory__current=56 * MIB, memory__stat="")
    v2(proc, root, "/job/step", memory__max="max", memory__current=10 * MIB, memory__stat="")
    assert rooms(proc)[0].bytes == 200 * MIB
    assert [group.path.name for group in memory_groups(proc)] == ["job"]


def test_a_container_that_sees_its_own_group_as_the_root(proc: Path, tmp_path: Path) -> None:
    v2(proc, tmp_path / "cgroup", "/docker/abc", "/docker/abc", memory__max=MIB, memory__current=0, memory__stat="")
    assert memory_groups(proc)[0].limit == MIB


def test_a_group_outside_of_what_is_mounted_is_looked_up_at_the_mount(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    v2(proc, root, "/docker/abc", "/docker/abc", memory__max=MIB, memory__current=0, memory__stat="")
    (proc / "self/cgroup").write_text("0::/../other\n")
    assert list(group_directories("memory", proc)) == [root]


def test_cgroup_v1_and_its_number_for_no_limit(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "memory"
    for path, limit in ((root, 0x7FFFFFFFFFFFF000), (root / "job", 64 * MIB)):
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (path / "memory.usage_in_bytes").write_text(f"{40 * MIB}\n")
        (path / "memory.stat").write_text(f"inactive_file 5\ntotal_inactive_file {8 * MIB}\ntotal_active_file 0\n")
    (proc / "self/cgroup").write_text("9:name=systemd:/x\n4:memory:/job\n0::/\n")
    (proc / "self/mountinfo").write_text(
        f"30 23 0:27 / {tmp_path}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n35 31 0:32 / {root} rw - cgroup cgroup rw,memory\n"
    )
    assert [(group.path, group.limit, group.used) for group in memory_groups(proc)] == [
        (root / "job", 64 * MIB, 32 * MIB)
    ]


def test_a_pids_cgroup_bounds_the_processes(proc: Path, tmp_path: Path) -> None:
    (proc / "self/status").write_text("CapEff:\t000001ffffffffff\n")
    assert tasks_left(proc) == (UNLIMITED, "")
    group = v2(proc, tmp_path / "cgroup", "/job", pids__max=20, pids__current=15)
    assert tasks_left(proc) == (5, f"in the pids cgroup {group}")


@pytest.mark.parametrize(
    ("said", "rationed"), [({"cpu__max": "max 100000"}, False), ({"cpu__max": "150000 100000"}, True), ({}, False)]
)
def test_a_cpu_cgroup_may_ration_processor_time(
    proc: Path, tmp_path: Path, said: dict[str, str], rationed: bool
) -> None:
    v2(proc, tmp_path / "cgroup", "/job", **said)
    v2(proc, tmp_path / "cgroup", "/job/step", cpu__max="max 100000")
    assert cpu_time_is_rationed(proc) is rationed


@pytest.mark.parametrize(("quota", "rationed"), [("-1", False), ("50000", True)])
def test_so_may_cgroup_v1(proc: Path, tmp_path: Path, quota: str, rationed: bool) -> None:
    root = tmp_path / "cpu"
    (root / "job").mkdir(parents=True)
    (root / "job" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (proc / "self/cgroup").write_text("3:cpu,cpuacct:/job\n")
    (proc / "self/mountinfo").write_text(f"30 23 0:27 / {root} rw - cgroup cgroup rw,cpu,cpuacct\n")
    assert cpu_time_is_rationed(proc) is rationed


def test_files_that_cannot_be_read_are_no_bound(tmp_path: Path) -> None:
    assert not cpu_time_is_rationed(tmp_path / "nothing")
    assert rooms(tmp_path / "nothing") == []
