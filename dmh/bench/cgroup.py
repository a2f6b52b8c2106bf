"""A memory control group for one process: how the kernel's own paging is held to the same limit as dmh.

Owns finding where a group may be made (cgroup v1's memory controller, or cgroup v2's), making it and removing it.
Used by `dmh.bench.mapped`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "dmh-bench-"
_numbers = itertools.count()


class NoGroupError(Exception):
    """No memory group can be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted hierarchy that has the memory controller.

    Attributes:
        version: 1 or 2.
        places: directories to make a group in, the own group's first.
    """

    version: int
    places: tuple[Path, ...]


def hierarchies(mountinfo: str, own: str) -> list[Hierarchy]:
    """Those of /proc/self/mountinfo and /proc/self/cgroup, v2 first.  Pure."""
    groups = dict(line.split(":", 2)[1:] for line in own.splitlines())
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        kind, _, options = (after.split() + [""] * 3)[:3]
        if kind == "cgroup2":
            version, path = 2, groups.get("", "/")
        elif kind == "cgroup" and "memory" in options.split(","):
            names = [name for name in groups if "memory" in name.split(",")]
            version, path = 1, groups[names[0]] if names else "/"
        else:
            continue
        inside = os.path.relpath(path, root) if path.startswith(root) else "."
        places = dict.fromkeys((Path(os.path.normpath(os.path.join(point, inside))), Path(point)))
        found.append(Hierarchy(version, tuple(places)))
    return sorted(found, key=lambda hierarchy: -hierarchy.version)


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A new group that may hold `limit` bytes; yields the file that a process writes its number to, to join.

    Raises:
        NoGroupError: none can be made.
    """
    found = hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    if not found:
        raise NoGroupError("no cgroup hierarchy with the memory controller is mounted")
    reasons = []
    for hierarchy in found:
        for place in hierarchy.places:
            try:
                group = _make(hierarchy.version, place, limit)
            except OSError as error:
                reasons.append(f"{place}: {error.strerror}")
                continue
            try:
                yield group / "cgroup.procs"
            finally:
                group.rmdir()
            return
    raise NoGroupError("no memory cgroup can be made (" + "; ".join(reasons) + ")")


def _make(version: int, place: Path, limit: int) -> Path:
    _remove_forgotten(place)
    if version == 2 and "memory" not in (place / "cgroup.subtree_control").read_text().split():
        # Refused where the group has processes of its own, and where the controller belongs to cgroup v1.
        (place / "cgroup.subtree_control").write_text("+memory")
    group = place / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
    group.mkdir()
    try:
        (group / ("memory.max" if version == 2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError:
        group.rmdir()
        raise
    return group


def _remove_forgotten(place: Path) -> None:
    """Groups of measurements that were killed."""
    for group in place.glob(f"{_PREFIX}*"):
        pid = group.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            with suppress(OSError):
                group.rmdir()
