"""The floor: the least that paging from another process can cost, as two subjects.

    Floor        poll, read one message, UFFDIO_COPY one page: no store, nothing is evicted
    FloorPager   the same with a page file behind it and a limit: pread before the copy, and beyond the limit the oldest
                 pages go out, written back if they were written to

Both are C (`dmh_floor.c`), one thread of a process of its own, on a shared memfd as dmh's region is.
``python -m dmh.bench.floor handler|pager ...`` is that process.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from dmh.bench.words import fill
from dmh.bench.work import Memory
from dmh.errors import KernelError
from dmh.native import check, ffi, lib

T = TypeVar("T")

FILLING = 0x5A
"""Every byte of every page that the handler gives."""


class _Watched:
    """A mapping of a memfd and the process that resolves its faults."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._fd = check(lib.dmh_region_create(b"dmh-floor", size), "creating the floor's memory")
        self.pointer: Any = lib.dmh_map_region(self._fd, size, 1 << 21, 1)
        if self.pointer == ffi.NULL:
            raise KernelError(f"mapping the floor's memory: {os.strerror(ffi.errno)}")
        self._uffd = -1
        self._control, self._theirs = socket.socketpair()
        self._process: subprocess.Popen[bytes] | None = None
        self.memory = Memory(np.frombuffer(ffi.buffer(self.pointer, size), np.uint64))

    def _start(self, role: str, *numbers: int, descriptors: tuple[int, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dmh.bench.floor", role, str(self._uffd), str(self._theirs.fileno())]
            + [str(number) for number in numbers],
            pass_fds=[self._uffd, self._theirs.fileno(), *descriptors],
            stdout=subprocess.PIPE,
        )
        self._theirs.close()
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise KernelError("the floor's process did not start; its message is above")

    def call(self, work: Callable[..., T], *args: Any) -> T:
        """``work(memory, *args)``."""
        return work(self.memory, *args)

    def close(self) -> None:
        """End the process, then let the memory go."""
        self._control.close()
        if self._process is not None:
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
        lib.dmh_unmap(self.pointer, self.size)
        if self._uffd >= 0:
            os.close(self._uffd)
        os.close(self._fd)

    def __exit__(self, *exc: object) -> None:
        self.close()


class Floor(_Watched):
    """A mapping whose faults a minimal handler in another process resolves.  A context manager."""

    def __init__(self, pages: int, page_size: int, *, spin: bool = False) -> None:
        super().__init__(pages * page_size)
        how, features = ffi.new("int *"), ffi.new("uint64_t *")
        self._uffd = check(lib.dmh_uffd_open(how, features), "opening a userfaultfd")
        check(lib.dmh_uffd_register(self._uffd, self.pointer, self.size), "registering the floor's memory")
        self._start("handler", page_size, int(spin))

    def empty(self) -> None:
        """Take every page out again."""
        check(lib.dmh_punch_file(self._fd, 0, self.size), "punching")

    def __enter__(self) -> Floor:
        return self


class FloorPager(_Watched):
    """A mapping that a minimal pager keeps within `limit` bytes, with a page file that is warm in the page cache.

    It begins as `words.fill` would leave it, all of it in the file.

    Raises:
        KernelError: this kernel cannot write-protect shared memory through userfaultfd.
    """

    def __init__(self, size: int, page_size: int, limit: int) -> None:
        super().__init__(size)
        try:
            self._uffd = check(lib.dmh_pager_watch(self.pointer, size), "write-protecting shared memory (userfaultfd)")
        except OSError as error:
            self.close()
            raise KernelError(str(error)) from error
        with tempfile.TemporaryFile(prefix="dmh-bench-", dir="/var/tmp") as file:
            os.ftruncate(file.fileno(), size)
            fill(np.memmap(file, np.uint64, "r+"))
            base = int(ffi.cast("uintptr_t", self.pointer))
            numbers = self._fd, file.fileno(), base, size // page_size, page_size, limit // page_size
            self._start("pager", *numbers, descriptors=(self._fd, file.fileno()))

    def empty(self) -> None:
        """Write back and take out every page."""
        self._control.send(b"e")
        if not self._control.recv(1):
            raise KernelError("the floor pager has ended; its message is above")

    def __enter__(self) -> FloorPager:
        return self


def main() -> None:
    """The process that resolves faults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["handler", "pager"])
    parser.add_argument("uffd", type=int)
    parser.add_argument("control", type=int)
    parser.add_argument("numbers", type=int, nargs="+")
    args = parser.parse_args()
    print("ready", flush=True)
    if args.role == "handler":
        page_size, spin = args.numbers
        check(lib.dmh_floor_handler(args.uffd, page_size, args.control, spin), "handling faults")
        return
    try:
        memory, file, base, pages, page_size, limit = args.numbers
        check(
            lib.dmh_floor_pager(args.uffd, memory, file, base, pages, page_size, limit, args.control),
            "the floor pager",
        )
    except OSError:
        # Whoever waits for a page would wait for ever.
        os.kill(os.getppid(), signal.SIGTERM)
        raise


if __name__ == "__main__":
    main()
