"""Live regions for tests: started with few settings, looked into from outside, and checked to leave nothing behind.

Owns the look through /proc at a running service: its processes, its shared page table, its memory.  The fixture
`open_region` in conftest.py owns the regions' lifetime.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import dmh
from dmh.config import Config, loads
from dmh.lspt.states import State
from dmh.lspt.table import Table
from dmh.native import ffi, lib
from dmh.service.paths import service_directory

_serial = itertools.count()

BASE = """
region: {size: 4MiB}
memory: {limit: 256KiB}
store: {url: "memory:", timeout: 5s, on_failure: poison}
"""


def unique_name() -> str:
    return f"t{os.getpid()}-{next(_serial)}"


def settings(*overrides: str) -> Config:
    """A configuration of its own name; `overrides` as for `dmh.open` ("memory.limit=8 pages" and so on)."""
    return loads(BASE, [f"region.name={unique_name()}", *overrides])


class Inside:
    """A running service, seen from outside.

    Attributes:
        launcher: process id.
        workers: role ("monitor", "resolver", "evictor") -> process ids.
        table: the shared page table.
    """

    def __init__(self, launcher: int) -> None:
        self.launcher = launcher
        self.workers: dict[str, list[int]] = {}
        for pid in _children(launcher):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            role = next((part[8:].decode() for part in command if part.startswith(b"workers.")), "other")
            self.workers.setdefault(role, []).append(pid)
        self._fds = [self._open("dmh-lspt"), self._open("dmh-region"), self._open("dmh-victims")]
        self.table = Table(self._fds[0])

    @property
    def table_fd(self) -> int:
        """The shared page table's memory, for another process to map."""
        return self._fds[0]

    @property
    def region_fd(self) -> int:
        """The region's memory."""
        return self._fds[1]

    @property
    def processes(self) -> list[int]:
        """Every process of the service."""
        return [self.launcher, *(pid for pids in self.workers.values() for pid in pids)]

    def _open(self, memfd: str) -> int:
        directory = Path(f"/proc/{self.launcher}/fd")
        for link in directory.iterdir():
            if os.readlink(link).startswith(f"/memfd:{memfd} "):
                return os.open(link, os.O_RDWR | os.O_CLOEXEC)
        raise AssertionError(f"the launcher has no memfd named {memfd}")

    def allocated(self) -> tuple[int, int]:
        """Bytes of memory that the kernel has given to the region and to the victim buffer."""
        region, victims = (os.fstat(fd).st_blocks * 512 for fd in self._fds[1:])
        return region, victims

    def present(self) -> set[int]:
        """Pages of the region that have memory, by the kernel's word (a page partly present counts)."""
        fd, size, at, found = self._fds[1], self.table.page_size, 0, set[int]()
        while True:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                return found
            at = os.lseek(fd, data, os.SEEK_HOLE)
            found |= set(range(data // size, -(-at // size)))

    def states(self, first: int, count: int) -> list[State]:
        return [self.table.state(page) for page in range(first, first + count)]

    def validate(self) -> None:
        """Check what must hold once nothing is under way any more: counters, page states, slots and the kernel
        agree.
        """
        deadline = time.monotonic() + 10
        while problems := self._disagreements():
            # LPET may be at work, between a page's state and its slot's: only what stays is wrong.
            assert time.monotonic() < deadline, problems
            time.sleep(0.005)

    def _disagreements(self) -> list[str]:
        states, resident, staged = self.table.states(), self.table.resident, self.table.staged
        slots = [self.table.word(int(page)).slot for page in self.table.in_state(State.STAGED)]
        checks = {
            f"pages are under way: {states}": not states[State.FETCHING] and not states[State.EVICTING],
            f"resident is {resident}: {states}": states[State.RESIDENT] == resident <= int(self.table.raw.resident_max),
            f"staged is {staged}: {states}": states[State.STAGED] == staged <= self.table.slots,
            "memory and states differ": self.present() == set(self.table.in_state(State.RESIDENT).tolist()),
            f"two pages in one slot: {slots}": len(set(slots)) == len(slots),
        }
        return [problem for problem, holds in checks.items() if not holds]

    def close(self) -> None:
        # Dropped first: the table's arrays lie over the mapping that goes.
        self.table.close()
        for fd in self._fds:
            os.close(fd)


def launcher_of(region: dmh.Region) -> int:
    """The launcher behind `dmh.open`."""
    launcher = region._connection._launcher
    assert launcher is not None, "an attached region has no launcher of its own"
    return launcher.pid


@contextmanager
def inside(region: dmh.Region) -> Iterator[Inside]:
    look = Inside(launcher_of(region))
    try:
        yield look
    finally:
        look.close()


def page_of(region: dmh.Region, array: Any) -> int:
    """The number of an array's first page."""
    return region.offset_of(array) // region.page_size


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """For what another process does and tells nobody about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.002)


def traces() -> set[str]:
    """What a region must not leave in this process and on this machine."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # the listing's own descriptor
            continue
        if "dmh" in target or "userfaultfd" in target:
            found.add(f"descriptor {link.name}: {target}")
    return found | {f"/dev/shm/{path.name}" for path in Path("/dev/shm").iterdir() if "dmh" in path.name}


def left_by(name: str, processes: list[int]) -> list[str]:
    """What is still there of a service that has ended."""
    left = [f"process {pid}" for pid in processes if Path(f"/proc/{pid}").exists()]
    directory = service_directory(name)
    return left + ([f"{directory}: {[entry.name for entry in directory.iterdir()]}"] if directory.exists() else [])


def processes_of(launcher: int) -> list[int]:
    return [launcher, *_children(launcher)]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def run_python(
    code: str, *arguments: object, env: dict[str, str] | None = None, timeout: float = 40.0, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; a hang is a failure."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | (env or {}),
        check=False,
        **options,
    )


def start_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start a program that talks through its standard input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def pattern(page: int, page_size: int, version: int = 0) -> np.ndarray[Any, Any]:
    """Bytes that no other page and no other version has."""
    return np.random.default_rng((page, version, page_size)).integers(0, 256, page_size, np.uint8)


def follows() -> bool:
    """May this process's forks be followed?"""
    fd = lib.dmh_uffd_open_following(ffi.new("int *"), ffi.new("uint64_t *"))
    if fd >= 0:
        os.close(fd)
    return fd >= 0
