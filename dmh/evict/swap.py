"""Could the kernel move a program's pages to swap?  What has to be known before every batch of pages is unmapped.

MADV_PAGEOUT, which `dmh.evict.unmap` unmaps pages with, writes them to swap where there is any.  Nothing would be lost,
but pages would leave local memory behind dmh's back.  With cgroup v2, `memory.swap.max = 0` in a process's group or in
one above it keeps its pages in memory.  cgroup v1 has nothing as strong: `memory.swappiness` does not bind MADV_PAGEOUT
and `memory.memsw.limit_in_bytes` bounds a sum, so there only a machine without swap will do.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


class SwapWatch:
    """Looks at the machine's swap, cheaply enough to be asked before every batch."""

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS) -> None:
        self._proc, self._cgroups = proc, cgroups
        self._why = ""
        try:
            self._fd = os.open(proc / "swaps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._fd = -1
            self._why = f"{proc / 'swaps'} cannot be read ({error.strerror}), so nothing says that there is no swap"
        else:
            weakref.finalize(self, os.close, self._fd)

    def in_reach(self, pids: Callable[[], Iterable[int]]) -> str | None:
        """Why pages of one of these processes could go to swap; None where they cannot."""
        if self._fd < 0:
            return self._why
        areas = os.pread(self._fd, 4096, 0).decode().splitlines()[1:]
        if not areas:
            return None
        for pid in pids():
            if not _kept_from_swap(pid, self._proc, self._cgroups):
                return (
                    f"there is swap ({areas[0].split()[0]}), and process {pid} may use it: `swapoff -a`, or set "
                    "memory.swap.max of its cgroup to 0"
                )
        return None


def _kept_from_swap(pid: int, proc: Path, cgroups: Path) -> bool:
    """Does cgroup v2 forbid this process to use swap?"""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        return True  # it has ended, and its pages are nobody's
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    if path is None:
        return False
    # In a cgroup namespace the root, too, is a group with limits of its own.
    root = cgroups / "unified" if (cgroups / "unified").is_dir() else cgroups
    group = root / path.lstrip("/")
    return any(_swap_max(above) == "0" for above in (group, *group.parents) if above == root or root in above.parents)


def _swap_max(group: Path) -> str | None:
    """None where the memory controller is not on in this group: one above may still forbid swap."""
    try:
        return (group / "memory.swap.max").read_text().strip()
    except OSError:
        return None
