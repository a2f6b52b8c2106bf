"""A running service as seen from outside: its processes, its table, its memory, its descriptors.

Reads /proc and the shared table only.  Asks the service nothing, because a question would wait for a worker that has
just been killed.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from dmh.errors import ServiceError
from dmh.lspt.table import Table
from dmh.native import lib
from dmh.observe.names import CELLS

LATER = Counter({"/proc/N/task/N/stat": 1, "/proc/loadavg": 1, "socket:[N]": 1})
"""Descriptors that a worker may open while it works: the monitor looks at the thread that it follows, and who else
wants to run; a store's connection is made when it is first needed.
"""


class Look:
    """The service whose launcher is a given process.

    Attributes:
        launcher: process id.
        table: its shared table.
        seen: every process that ever belonged to the service, with the time it started (a pid may be used again).
    """

    def __init__(self, launcher: int) -> None:
        self.launcher = launcher
        self._fds = {name: self._open(f"/memfd:dmh-{name} ") for name in ("lspt", "region", "victims")}
        self.table = Table(self._fds["lspt"])
        self.seen: dict[int, int] = {}
        self.remember()

    def _open(self, memfd: str) -> int:
        for link in Path(f"/proc/{self.launcher}/fd").iterdir():
            if os.readlink(link).startswith(memfd):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
        raise ServiceError(f"process {self.launcher} has no {memfd.strip()}: it is no launcher of this version of dmh")

    def close(self) -> None:
        """Let go of the table and the memory."""
        self.table.close()
        for fd in self._fds.values():
            os.close(fd)

    # ---- processes

    def workers(self) -> dict[int, int]:
        """Worker number -> process id, of those that have one now."""
        pids = self.table.raw.pids
        return {number: int(pids[number]) for number in range(self.table.workers) if pids[number]}

    def role(self, number: int) -> str:
        """What the worker of this number does."""
        return {0: "monitor", self.table.workers - 1: "evictor"}.get(number, "resolver")

    def successors(self, number: int) -> int:
        """How often a worker of this number has taken the place of a dead one, and set right what that one left."""
        return int(lib.dmh_counters_of(self.table.raw, number).cell[CELLS["restarts"]])

    def remember(self) -> None:
        """Note every process that belongs to the service now."""
        for pid in [self.launcher, *self._children()]:
            if pid not in self.seen and (started := started_at(pid)):
                self.seen[pid] = started

    def left(self) -> list[int]:
        """Of the processes ever seen, those that are still there."""
        return [pid for pid, started in self.seen.items() if started_at(pid) == started]

    def dead_children(self) -> int:
        """Workers that have ended and that nobody has waited for."""
        return sum(_state(pid) == "Z" for pid in self._children())

    def _children(self) -> list[int]:
        try:
            return [
                int(pid) for pid in Path(f"/proc/{self.launcher}/task/{self.launcher}/children").read_text().split()
            ]
        except OSError:
            return []

    # ---- what it holds

    def descriptors(self) -> dict[str, Counter[str]]:
        """Process ("launcher", "monitor", "resolver 1", ...) -> kind of descriptor -> how many it has open."""
        names = {f"{self.role(number)} {number}": pid for number, pid in self.workers().items()}
        return {name: kinds_of(pid) for name, pid in {"launcher": self.launcher, **names}.items()}

    def connected(self) -> bool:
        """Whether the monitor has its connection to every resolver: they come up side by side, and some later."""
        sockets = kinds_of(self.workers().get(0, 0))["socket:[N]"]
        return sockets > self.table.workers - 2  # and one to the launcher

    def memory(self) -> int:
        """Bytes that the kernel has given to the region and to the victim buffer."""
        return sum(os.fstat(self._fds[name]).st_blocks * 512 for name in ("region", "victims"))

    def page(self, number: int) -> str:
        """A page's state, for a message."""
        word = self.table.word(number)
        return f"page {number} is {word.state.name}, worker {word.worker}, generation {word.generation}"


def kinds_of(pid: int) -> Counter[str]:
    """The descriptors of a process, by what they refer to; numbers (of sockets, pipes, processes) do not count."""
    kinds: Counter[str] = Counter()
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return kinds
    for link in links:
        try:
            kinds[re.sub(r"\d+", "N", os.readlink(link))] += 1
        except OSError:
            continue  # closed meanwhile
    return kinds


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
