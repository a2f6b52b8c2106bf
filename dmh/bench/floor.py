"""The floor: the least that resolving a page fault in another process can cost.

A region of the same kind (a shared memfd), a handler process that polls, reads one message and issues one UFFDIO_COPY
(C, in the native module), and nothing else: no table, no store, no eviction.  ``python -m dmh.bench.floor`` is the
handler process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from types import TracebackType
from typing import Any

from dmh.errors import KernelError
from dmh.native import check, ffi, lib


class Floor:
    """A mapping whose faults a minimal handler in another process resolves.  A context manager."""

    def __init__(self, pages: int, page_size: int, *, spin: bool = False) -> None:
        self.size = pages * page_size
        self._fd = check(lib.dmh_region_create(b"dmh-floor", self.size), "creating the floor's memory")
        self.pointer: Any = lib.dmh_map_region(self._fd, self.size, 1 << 21, 1)
        if self.pointer == ffi.NULL:
            raise KernelError(f"mapping the floor's memory: {os.strerror(ffi.errno)}")
        how, features = ffi.new("int *"), ffi.new("uint64_t *")
        self._uffd = check(lib.dmh_uffd_open(how, features), "opening a userfaultfd")
        check(lib.dmh_uffd_register(self._uffd, self.pointer, self.size), "registering the floor's memory")
        stop_read, self._stop = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dmh.bench.floor", str(self._uffd), str(stop_read), str(page_size), str(int(spin))],
            pass_fds=[self._uffd, stop_read],
            stdout=subprocess.PIPE,
        )
        os.close(stop_read)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def empty(self) -> None:
        """Take every page out again."""
        check(lib.dmh_punch_file(self._fd, 0, self.size), "punching")

    def __enter__(self) -> Floor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._stop)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        lib.dmh_unmap(self.pointer, self.size)
        os.close(self._uffd)
        os.close(self._fd)


def main() -> None:
    """The handler process."""
    parser = argparse.ArgumentParser()
    for name in ("uffd", "stop", "page_size", "spin"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    print("ready", flush=True)
    check(lib.dmh_floor_handler(args.uffd, args.page_size, args.stop, args.spin), "handling faults")


if __name__ == "__main__":
    main()
