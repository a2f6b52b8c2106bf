"""How much memory a service could still use here, and what bounds it: the machine, a cgroup, the commit limit.

Pure but for reading /proc and cgroup files, whose places the tests replace.  Called by the start-up checks and by
`dmh doctor`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that may still be used, and what sets the bound."""

    bytes: int
    bound: str


@dataclass(frozen=True, slots=True)
class Group:
    """A memory cgroup that bounds this process.

    Attributes:
        path: its directory.
        limit: bytes.
        used: bytes, without the file cache, which makes way.
    """

    path: Path
    limit: int
    used: int


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where it cannot be read."""
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def rooms(proc: Path = PROC) -> list[Room]:
    """Every bound that holds for this process, the tightest first."""
    found = []
    if info := meminfo(proc):
        swap = f" and {info['SwapFree'] / 2**30:,.1f} GiB of free swap" if info.get("SwapFree") else ""
        found.append(
            Room(
                info["MemAvailable"] + info.get("SwapFree", 0),
                f"available on this machine (MemAvailable of {info['MemTotal'] / 2**30:,.1f} GiB in all{swap})",
            )
        )
        if overcommit(proc) == 2:
            found.append(
                Room(
                    max(info["CommitLimit"] - info["Committed_AS"], 0),
                    "left of the commit limit (vm.overcommit_memory=2; raise vm.overcommit_ratio)",
                )
            )
    found += [Room(max(g.limit - g.used, 0), f"left in the memory cgroup {g.path}") for g in memory_groups(proc)]
    return sorted(found, key=lambda room: room.bytes)


def overcommit(proc: Path = PROC) -> int:
    """vm.overcommit_memory; 0 where it cannot be read."""
    return _number(proc / "sys/vm/overcommit_memory") or 0


def memory_groups(proc: Path = PROC) -> list[Group]:
    """The cgroups, v1 and v2, that bound this process's memory, from its own up to the root's."""
    found = []
    for directory in group_directories("memory", proc):
        v2 = (directory / "memory.current").exists()
        limit = _number(directory / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _number(directory / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if limit is None or used is None or limit >= 1 << 62:  # v1 writes a huge number for "none"
            continue
        prefix = "" if v2 else "total_"
        cache = sum(_stat(directory / "memory.stat", f"{prefix}{kind}_file") for kind in ("active", "inactive"))
        found.append(Group(directory, limit, max(used - cache, 0)))
    return found


def group_directories(controller: str, proc: Path = PROC) -> Iterator[Path]:
    """The directories of this process's cgroups that have `controller`, each followed by those above it."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        root, point = fields.split()[3:5]
        kind_name, _, options = kind.split(" ", 2)
        if kind_name == "cgroup2":
            path = next((path for number, names, path in memberships if number == "0" and not names), None)
        elif kind_name == "cgroup" and controller in options.split(","):
            path = next((path for _, names, path in memberships if controller in names.split(",")), None)
        else:
            continue
        if path is None:
            continue
        # A container may see only a part of the tree: `root` is what is mounted of it.
        inside = os.path.relpath(path, root) if (path + "/").startswith(root.rstrip("/") + "/") else "."
        directory = Path(point, inside)
        while directory.is_relative_to(point):
            yield directory
            if directory == Path(point):
                break
            directory = directory.parent


def _number(path: Path) -> int | None:
    """A file that holds a number; None where it holds "max", or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.lstrip("-").isdecimal() else None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)
