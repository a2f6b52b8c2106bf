"""What this process and this user may have: descriptors, processes, address space, file sizes, pipes.

Facts at the moment of the call.  Called by the start-up checks and by `dmh doctor`.
"""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

from dmh.machine.kernel import capabilities
from dmh.machine.memory import PROC, group_directories
from dmh.native import check, ffi, lib

UNLIMITED = 1 << 63


def soft(which: int) -> int:
    """The soft limit of this process; `UNLIMITED` where there is none."""
    value = resource.getrlimit(which)[0]
    return UNLIMITED if value == resource.RLIM_INFINITY else value


def hard(which: int) -> int:
    """The hard limit: as far as this user may raise the soft one."""
    value = resource.getrlimit(which)[1]
    return UNLIMITED if value == resource.RLIM_INFINITY else value


def open_descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd")) - 1  # the listing's own


def tasks_left(proc: Path = PROC) -> tuple[int, str]:
    """How many more processes and threads this user may have, and what bounds it (`UNLIMITED`, "" for nothing)."""
    bounds = [(UNLIMITED, "")]
    allowed = soft(resource.RLIMIT_NPROC)
    if allowed < UNLIMITED and os.getuid() and not capabilities(proc) & {"CAP_SYS_RESOURCE", "CAP_SYS_ADMIN"}:
        bounds.append((max(allowed - _tasks_of(os.getuid(), proc), 0), "of this user's (`ulimit -u`)"))
    for directory in group_directories("pids", proc):
        with contextlib.suppress(OSError, ValueError):  # "max", or no such file in the root group
            most, used = (int((directory / name).read_text()) for name in ("pids.max", "pids.current"))
            bounds.append((max(most - used, 0), f"in the pids cgroup {directory}"))
    return min(bounds)


def cpu_time_is_rationed(proc: Path = PROC) -> bool:
    """Whether a cgroup, v1 or v2, allows this process only so much processor time a period."""
    for directory in group_directories("cpu", proc):
        for name, without in (("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")):
            with contextlib.suppress(OSError):  # no such file in the root group
                if not (directory / name).read_text().startswith(without):
                    return True
    return False


def _tasks_of(uid: int, proc: Path) -> int:
    """Processes and threads of a user: RLIMIT_NPROC counts both."""
    total = 0
    for entry in proc.iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if entry.name.isdecimal() and entry.stat().st_uid == uid:
                total += len(os.listdir(entry / "task"))
    return total


def setting(name: str, proc: Path = PROC) -> int:
    """A number in /proc/sys; 0 where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return int((proc / "sys" / name).read_text())
    return 0


def pipe_bytes(wanted: int) -> int:
    """How large a pipe this user gets now when `wanted` bytes are asked for."""
    ends = ffi.new("int[2]")
    size = check(lib.dmh_pipe(ends, wanted), "creating a pipe")
    os.close(ends[0])
    os.close(ends[1])
    return size
